"""The configuration of supervised fine-tuning."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from relax.config.options import option, section
from relax.config.rules import Rule, Values, unknown_choice
from relax.config.schema import DataConfig, OutputConfig, TrainerConfig

LOSSES = ("nll", "dft")  # the names in `relax.losses.SFT_LOSSES`; a test compares them


@dataclass(slots=True, kw_only=True)
class SFTSection:
    """Supervised fine-tuning."""

    completion_only_loss: bool | None = option(
        None, "Train on completions only; none = yes where rows have a prompt."
    )
    assistant_only_loss: bool = option(False, "Train on assistant messages only.")
    train_on: Literal["all_assistant", "last_assistant"] = option(
        "all_assistant", "Assistant messages to train on: all, or the last of each row."
    )
    thinking: Literal["keep", "strip", "last_only"] = option(
        "keep",
        "Thoughts of the assistant: keep all, strip all, or keep those behind the last question.",
    )
    loss_type: str = option(
        "nll", "Loss of a token: nll, dft, or your own, path/to/file.py:function; see docs/sft.md."
    )
    label_smoothing_factor: float = option(
        0.0, "Probability of nll's target spread over the vocabulary.", at_least=0, below=1
    )
    z_loss_coef: float = option(0.0, "Penalty on (log Z)^2 of the softmax (z-loss).", at_least=0)
    neftune_noise_alpha: float | None = option(
        None, "Noise on embeddings in training (NEFTune), such as 5; none = no noise.", above=0
    )
    loss_chunk_size: int = option(
        256, "Tokens per chunk of logits; smaller saves memory.", at_least=1
    )


def _losses(v: Values) -> Iterator[str]:
    yield from unknown_choice("loss_type", v["loss_type"], LOSSES)
    if v["label_smoothing_factor"] and v["loss_type"] != "nll":
        yield f"label_smoothing_factor is of loss_type nll, got loss_type {v['loss_type']}"


@dataclass(slots=True, kw_only=True)
class SFTConfig(TrainerConfig):
    """Supervised fine-tuning (SFT): next-token cross-entropy."""

    algorithm: ClassVar[str] = "sft"
    examples: ClassVar[tuple[str, ...]] = (
        "--max_steps 100",
        "--model_name_or_path DIR --dataset_name rows.jsonl --output_dir outputs/mine",
    )
    # Defaults of the run without flags, which learns addition from scratch in about a minute.
    demo: ClassVar[dict[str, Any]] = {
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 50.0,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "per_device_train_batch_size": 128,
        "pad_to_multiple_of": 4,
        "max_steps": 900,
        "logging_steps": 100.0,
    }

    rules: ClassVar[tuple[Rule, ...]] = (_losses,)

    data: DataConfig = section(DataConfig)
    output: OutputConfig = section(OutputConfig, output_dir="outputs/sft")
    sft: SFTSection = section(SFTSection)
