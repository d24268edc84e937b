"""The configuration of preference optimisation."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from relax.config.options import option, options, section
from relax.config.rules import Given, given_by, unused
from relax.config.schema import (
    Hyperparams,
    InferenceConfig,
    OutputConfig,
    PeftConfig,
    RowsConfig,
    TrainerConfig,
)

KTO = "kto"
# The names of `relax.losses.dpo.LOSSES`, which this module cannot import; a test compares them.
LOSSES = (
    "sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "apo_zero", "apo_down", "exo_pair",
    "nca_pair", "bco_pair", "sppo_hard", "sft", "simpo", "orpo",
)  # fmt: skip
WITHOUT_REFERENCE = ("sft", "simpo", "orpo")
READERS = {
    "label_smoothing": ("sigmoid", "robust", "exo_pair"),
    "simpo_gamma": ("simpo",),
    "desirable_weight": (KTO,),
    "undesirable_weight": (KTO,),
    "beta": tuple(name for name in (*LOSSES, KTO) if name != "sft"),
}


@dataclass(slots=True, kw_only=True)
class PreferenceConfig(RowsConfig):
    """Which rows are trained on, and how they become batches."""

    max_length: int | None = option(
        1024, "Tokens of prompt and answer at most; none = no limit.", at_least=2
    )
    truncation_mode: Literal["keep_start", "keep_end", "drop", "error"] = option(
        "keep_start", "Of a longer row: cut the answers' ends, the prompt's beginning, ..."
    )
    pack_pairs: bool = option(
        False, "Several pairs to a row of twice max_length; each answer has a prompt of its own."
    )
    pad_to_multiple_of: int | None = option(
        None, "Round the padded lengths up to a multiple; none = 8.", at_least=1
    )


@dataclass(slots=True, kw_only=True)
class DPOSection:
    """Direct preference optimisation."""

    beta: float = option(0.1, "How close to the reference the policy is held.", above=0)
    loss_type: list[str] = option(
        ["sigmoid"], "Losses, added up: sigmoid,sft say; see docs/dpo.md. kto takes single answers."
    )
    loss_weights: list[float] | None = option(None, "One per loss; none = all 1.")
    label_smoothing: float = option(
        0.0, "Share of pairs taken to be the wrong way round.", at_least=0, below=0.5
    )
    simpo_gamma: float = option(0.5, "Margin that simpo asks for.")
    desirable_weight: float = option(1.0, "Of good answers in kto.", above=0)
    undesirable_weight: float = option(1.0, "Of bad answers in kto.", above=0)
    precompute_ref_log_probs: bool = option(
        False, "Compute the reference's once, keep them in files, and hold no reference."
    )
    ref_log_probs_dir: str | None = option(
        None, "Directory of those files, for several runs; none = in output_dir."
    )
    sync_ref_model: bool = option(False, "Move the reference towards the policy.")
    ref_model_mixup_alpha: float = option(
        0.6, "The policy's share when it moves.", above=0, at_most=1
    )
    ref_model_sync_steps: int = option(512, "Updates between moves.", at_least=1)
    loss_chunk_size: int = option(256, "Tokens whose logits exist at once.", at_least=1)


@dataclass(slots=True, kw_only=True)
class DPOConfig(TrainerConfig):
    """DPO: of two answers to a prompt the chosen one becomes likelier than the rejected one."""

    algorithm: ClassVar[str] = "dpo"
    # What the run with no flags needs to tell right sums from wrong ones in a minute. Without sft
    # the log-probability of right sums falls as well, if less than that of wrong ones.
    embedded: ClassVar[dict[str, Any]] = {
        "loss_type": ["sigmoid", "sft"],
        "learning_rate": 5e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20.0,
        "per_device_train_batch_size": 128,
        "pad_to_multiple_of": 4,
        "max_steps": 300,
        "logging_steps": 20.0,
        "eval_strategy": "steps",
        "eval_steps": 100.0,
        "eval_on_start": True,
        "per_device_eval_batch_size": 250,
    }

    hyperparams: Hyperparams = section(Hyperparams, learning_rate=1e-6)
    # With dropout the first loss would not be ln 2: the reference has none.
    peft: PeftConfig = section(PeftConfig, lora_dropout=0.0)
    data: PreferenceConfig = section(PreferenceConfig)
    inference: InferenceConfig = section(InferenceConfig)
    output: OutputConfig = section(OutputConfig, output_dir="outputs/dpo")
    dpo: DPOSection = section(DPOSection)

    def problems(self) -> list[str]:
        # With slots, super() does not find the class.
        found = TrainerConfig.problems(self)
        if found:
            return found
        known, values = options(type(self)), self.flat()
        given = given_by(known, values, self.embedded)
        return [*_losses(values, given), *_reference(values, given), *batch_problems(values, given)]


def _losses(values: dict[str, Any], given: Given) -> Iterator[str]:
    names, weights = values["loss_type"], values["loss_weights"]
    for name in names:
        if name not in (*LOSSES, KTO):
            yield f"loss_type must be of {', '.join((*LOSSES, KTO))}, got {name!r}"
    if not names or len(set(names)) < len(names):
        yield f"loss_type must name each loss once, got {','.join(names) or 'none'}"
    if KTO in names and len(names) > 1:
        yield f"loss_type kto takes no other loss beside it, got {','.join(names)}"
    if weights is not None and len(weights) != len(names):
        yield f"loss_weights must be one per loss, got {len(weights)} for {len(names)}"
    if weights is not None and names == [KTO]:
        yield unused("loss_weights", "kto has desirable_weight and undesirable_weight")
    for option_name, readers in READERS.items():
        if given(option_name) and not set(readers) & set(names):
            yield unused(option_name, f"only {', '.join(readers)} read it")
    if "exo_pair" in names and not values["label_smoothing"]:
        yield "loss_type exo_pair needs label_smoothing above 0; 0.001 is its authors'"


def _reference(values: dict[str, Any], given: Given) -> Iterator[str]:
    names, precomputes = values["loss_type"], values["precompute_ref_log_probs"]
    has_none = all(name in WITHOUT_REFERENCE for name in names)
    for name in ("precompute_ref_log_probs", "sync_ref_model"):
        if given(name) and has_none:
            yield unused(name, f"loss_type {','.join(names)} reads no reference")
    if given("ref_log_probs_dir") and not precomputes:
        yield unused("ref_log_probs_dir", "precompute_ref_log_probs is false")
    if not values["sync_ref_model"]:
        for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            if given(name):
                yield unused(name, "sync_ref_model is false")
    elif precomputes:
        yield "sync_ref_model excludes precompute_ref_log_probs: the reference moves"
    elif values["use_peft"] or values["freeze"]:
        yield "sync_ref_model excludes use_peft and freeze: the reference is the frozen base"


def batch_problems(values: dict[str, Any], given: Given) -> Iterator[str]:
    """What is wrong with how pairs become batches."""
    if given("truncation_mode") and values["max_length"] is None:
        yield unused("truncation_mode", "max_length is none, so no row is too long")
    if values["pack_pairs"] and values["max_length"] is None:
        yield "pack_pairs needs max_length: packed rows are twice that long"
    attention = values["attn_implementation"]
    if attention in ("cudnn", "splash") and not values["pack_pairs"]:
        yield unused(
            "attn_implementation",
            f"answers that share a prompt are not computed by {attention}; give pack_pairs",
        )
