"""The configuration of online DPO."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from relax.config.dpo import LOSSES, READERS, WITHOUT_REFERENCE, ReferenceSection
from relax.config.options import option, section
from relax.config.rl import READS_SAMPLER, RLConfig, broken_groups, generation_problems
from relax.config.rules import NoEffect, Rule, Values, needs, unknown_choice, warns
from relax.config.schema import CachedRowsConfig, OutputConfig


@dataclass(slots=True, kw_only=True)
class OnlineDPOSection(ReferenceSection):
    """Loss and reference model of online DPO."""

    loss_type: str = option(
        "sigmoid",
        "Loss of a pair, as in dpo, or your own, path/to/file.py:function; see docs/dpo.md.",
    )
    label_smoothing: float = option(
        0.0, "Assumed fraction of pairs with swapped labels.", at_least=0, below=0.5
    )
    loss_chunk_size: int = option(
        256, "Tokens per chunk of logits; smaller saves memory.", at_least=1
    )


def _groups(v: Values) -> Iterator[str]:
    yield from broken_groups(v, v["gradient_accumulation_steps"])


def _online(v: Values) -> Iterator[str]:
    yield from unknown_choice("loss_type", v["loss_type"], LOSSES)
    if v["num_generations"] < 2:
        yield (
            "num_generations must be at least 2, since the best completion of a prompt is compared "
            f"with the worst, got {v['num_generations']}"
        )
    if v["loss_type"] == "exo_pair" and not v["label_smoothing"]:
        yield "loss_type exo_pair needs label_smoothing above 0; its authors use 0.001"
    if v["sync_ref_model"] and (v["use_peft"] or v["freeze"]):
        yield "sync_ref_model excludes use_peft and freeze: the reference is the frozen base"


def _reads_no_reference(v: Values) -> bool:
    return v["loss_type"] in WITHOUT_REFERENCE


ONLINE_DPO = (
    warns(
        "label_smoothing",
        lambda v: v["loss_type"] in set(LOSSES) - set(READERS["label_smoothing"]),
        "loss_type {loss_type} does not use it",
    ),
    warns("sync_ref_model", _reads_no_reference, "loss_type {loss_type} uses no reference"),
    needs("ref_model_mixup_alpha ref_model_sync_steps", "sync_ref_model"),
    NoEffect(
        READS_SAMPLER,
        lambda v: True,
        "the loss reads no log-probabilities of the sampler",
    ),
)


@dataclass(slots=True, kw_only=True)
class OnlineDPOConfig(RLConfig):
    """Online DPO: prefer the policy's best completions to its worst."""

    algorithm: ClassVar[str] = "online_dpo"
    # Defaults of the run without flags, which learns addition from rewards in a few minutes.
    demo: ClassVar[dict[str, Any]] = RLConfig.demo | {
        "learning_rate": 2e-4,
        "warmup_steps": 30.0,
        "per_device_train_batch_size": 512,
        "max_steps": 300,
        "logging_steps": 10.0,
        "eval_steps": 100.0,
    }
    rules: ClassVar[tuple[Rule, ...]] = (_groups, generation_problems, _online)
    no_effect: ClassVar[tuple[NoEffect, ...]] = RLConfig.no_effect + ONLINE_DPO

    data: CachedRowsConfig = section(CachedRowsConfig)
    output: OutputConfig = section(OutputConfig, output_dir="outputs/online_dpo")
    online_dpo: OnlineDPOSection = section(OnlineDPOSection)
