"""The configuration of `relax sample`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from relax.config.options import option, section
from relax.config.rl import SamplingOptions
from relax.config.rules import NoEffect, Rule, Values
from relax.config.schema import Dtype, LimitsConfig, RenderingConfig
from relax.config.settings import Settings


@dataclass(slots=True, kw_only=True)
class SampleModelConfig:
    """Model and precision."""

    model_name_or_path: str | None = option(
        None, "Hugging Face model directory or name, or an adapter directory."
    )
    dtype: Dtype = option("float32", "Precision of the computation.")
    param_dtype: Dtype = option("float32", "Precision of the parameters.")


@dataclass(slots=True, kw_only=True)
class PromptConfig:
    """Prompts, and the output file."""

    prompt: str | None = option(
        None, "A single prompt; its completion is streamed to the terminal."
    )
    prompts_file: str | None = option(
        None,
        "Rows with a prompt column (.jsonl, .json, .parquet), or a .txt file with a prompt per "
        "line.",
    )
    output_file: str | None = option(
        None, "File for prompts and completions, one JSON object per line."
    )
    chat: bool | None = option(
        None, "Apply the chat template to prompts; none = yes if the tokenizer has one."
    )


@dataclass(slots=True, kw_only=True)
class SamplingSection(SamplingOptions):
    """Sampling."""

    max_new_tokens: int = option(256, "Maximum tokens of a completion.", at_least=1)
    min_new_tokens: int = option(0, "Minimum tokens of a completion.", at_least=0)
    temperature: float = option(1.0, "Sampling temperature; 0 = greedy.", at_least=0)
    stop: list[str] | None = option(
        None, "Texts that end a completion; none = those of the profile."
    )
    num_return_sequences: int = option(1, "Completions per prompt.", at_least=1)
    seed: int | None = option(None, "Random seed; none = a new one each time.", at_least=0)
    slots: int = option(64, "Completions decoded at a time.", at_least=1)


def _problems(v: Values) -> Iterator[str]:
    if v["model_name_or_path"] is None:
        yield "model_name_or_path must name a model, got none"
    if (v["prompt"] is None) == (v["prompts_file"] is None):
        got = "neither" if v["prompt"] is None else "both"
        yield f"give either prompt or prompts_file, got {got}"
    if v["min_new_tokens"] > v["max_new_tokens"]:
        yield (
            f"min_new_tokens {v['min_new_tokens']} is more than max_new_tokens "
            f"{v['max_new_tokens']}"
        )


NO_EFFECT = (
    NoEffect(
        "top_k top_p min_p seed num_return_sequences",
        lambda v: v["temperature"] == 0,
        "temperature 0 is greedy",
    ),
    NoEffect(
        "profile system_prompt chat_template_path "
        "template_timeout_s template_output_ratio template_memory_mib",
        lambda v: v["chat"] is False,
        "chat is false",
    ),
)


@dataclass(slots=True, kw_only=True)
class SampleConfig(Settings):
    """Generate completions of prompts with a model."""

    algorithm: ClassVar[str] = "sample"
    examples: ClassVar[tuple[str, ...]] = (
        '--model_name_or_path DIR --prompt "What is the capital of France?"',
        "--model_name_or_path DIR --prompts_file prompts.txt --output_file out.jsonl",
    )
    shared_rules: ClassVar[tuple[Rule, ...]] = (_problems,)
    no_effect: ClassVar[tuple[NoEffect, ...]] = NO_EFFECT

    model: SampleModelConfig = section(SampleModelConfig)
    profile: RenderingConfig = section(RenderingConfig)
    limits: LimitsConfig = section(LimitsConfig)
    prompts: PromptConfig = section(PromptConfig)
    sampling: SamplingSection = section(SamplingSection)
