"""The configuration of `python -m relax.sampling`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from relax.config.options import option, options, section
from relax.config.rules import Given, given_by, profile_problems, unused
from relax.config.schema import Dtype, RenderingConfig, Settings


@dataclass(slots=True, kw_only=True)
class SampleModelConfig:
    """Which model writes."""

    model_name_or_path: str | None = option(
        None, "Hugging Face model directory or name, or an adapter directory."
    )
    dtype: Dtype = option("float32", "Precision of the computation.")
    param_dtype: Dtype = option("float32", "Precision of the parameters.")


@dataclass(slots=True, kw_only=True)
class PromptConfig:
    """What it writes about."""

    prompt: str | None = option(None, "One prompt; its completion is streamed to the terminal.")
    prompts_file: str | None = option(
        None, "Rows with a prompt column (.jsonl, .json, .parquet), or a .txt file, one a line."
    )
    output_file: str | None = option(None, "Where prompts and completions go, a JSON line each.")
    chat: bool | None = option(
        None, "Apply the chat template to texts; none = where the tokenizer has one."
    )


@dataclass(slots=True, kw_only=True)
class SamplingSection:
    """How completions are drawn."""

    max_new_tokens: int = option(256, "Tokens of a completion at most.", at_least=1)
    min_new_tokens: int = option(0, "Tokens before which none ends.", at_least=0)
    temperature: float = option(1.0, "Divides the logits; 0 = the likeliest token.", at_least=0)
    top_k: int = option(0, "Draw from so many likeliest tokens; 0 = off.", at_least=0)
    top_p: float = option(1.0, "Draw from the likeliest that hold this share.", above=0, at_most=1)
    min_p: float = option(
        0.0, "Draw from tokens this share as likely as the likeliest.", at_least=0, at_most=1
    )
    repetition_penalty: float = option(1.0, "Divides the logits of tokens seen; 1 = off.", above=0)
    stop: list[str] | None = option(
        None, "Texts that end a completion; none = those of the profile."
    )
    num_return_sequences: int = option(1, "Completions per prompt.", at_least=1)
    seed: int | None = option(None, "Of the draws; none = another one each time.", at_least=0)
    slots: int = option(64, "Completions that are decoded at a time.", at_least=1)


@dataclass(slots=True, kw_only=True)
class SampleConfig(Settings):
    """Writes completions of prompts with a model."""

    algorithm: ClassVar[str] = "sample"

    model: SampleModelConfig = section(SampleModelConfig)
    profile: RenderingConfig = section(RenderingConfig)
    prompts: PromptConfig = section(PromptConfig)
    sampling: SamplingSection = section(SamplingSection)

    def problems(self) -> list[str]:
        found = Settings.problems(self)  # with slots, super() does not find the class
        if found:
            return found
        known, values = options(type(self)), self.flat()
        return list(_problems(values, given_by(known, values, self.embedded)))


def _problems(values: dict[str, Any], given: Given) -> Iterator[str]:
    if values["model_name_or_path"] is None:
        yield "model_name_or_path must name the model that writes, got none"
    if (values["prompt"] is None) == (values["prompts_file"] is None):
        got = "neither" if values["prompt"] is None else "both"
        yield f"give either prompt or prompts_file, got {got}"
    if values["temperature"] == 0:
        for name in ("top_k", "top_p", "min_p", "seed", "num_return_sequences"):
            if given(name):
                yield unused(name, "temperature 0 takes the likeliest token")
    if values["min_new_tokens"] > values["max_new_tokens"]:
        yield (
            f"min_new_tokens {values['min_new_tokens']} is more than max_new_tokens "
            f"{values['max_new_tokens']}"
        )
    yield from profile_problems(values)
    for name in ("profile", "system_prompt", "chat_template_path"):
        if values["chat"] is False and given(name):
            yield unused(name, "chat is false")
