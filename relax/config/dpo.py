"""The configuration of preference optimisation."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from relax.config.options import option, section
from relax.config.rules import NoEffect, Rule, Values, needs, unknown_choice, warns
from relax.config.schema import (
    CachedRowsConfig,
    Hyperparams,
    OutputConfig,
    PeftConfig,
    TrainerConfig,
)

KTO = "kto"
# The names in `relax.losses.PREFERENCE_LOSSES`; this module imports no jax. A test compares them.
LOSSES = (
    "sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "apo_zero", "apo_down", "exo_pair",
    "nca_pair", "bco_pair", "sppo_hard", "discopop", "aot", "aot_unpaired", "sft", "simpo", "orpo",
)  # fmt: skip
WITHOUT_REFERENCE = ("sft", "simpo", "orpo")
ANY_DIVERGENCE = ("sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "discopop")
COMPARING = ("aot", "aot_unpaired")
READERS = {
    "label_smoothing": ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"),
    "simpo_gamma": ("simpo",),
    "discopop_tau": ("discopop",),
    "f_divergence_type": ANY_DIVERGENCE,
    "desirable_weight": (KTO,),
    "undesirable_weight": (KTO,),
    "beta": tuple(name for name in (*LOSSES, KTO) if name != "sft"),
}


@dataclass(slots=True, kw_only=True)
class PreferenceConfig(CachedRowsConfig):
    """Training and evaluation pairs, truncation and packing."""

    max_length: int | None = option(
        1024, "Maximum tokens of prompt and completion; none = no limit.", at_least=2
    )
    truncation_mode: Literal["keep_start", "keep_end", "drop", "error"] = option(
        "keep_start",
        "Treatment of longer rows: cut the ends of completions, cut the start of the prompt, "
        "drop the row, or stop with an error.",
    )
    pack_pairs: bool = option(
        False,
        "Count as one row of a batch as many pairs as fit into twice max_length tokens.",
    )
    pad_to_multiple_of: int | None = option(
        None, "Make the length of packed rows a multiple of this number.", at_least=1
    )


@dataclass(slots=True, kw_only=True)
class ReferenceSection:
    """KL penalty and reference model."""

    beta: float = option(0.1, "KL penalty strength (beta).", above=0)
    sync_ref_model: bool = option(
        False, "Update the reference model towards the policy during training."
    )
    ref_model_mixup_alpha: float = option(
        0.6, "Weight of the policy in an update of the reference model.", above=0, at_most=1
    )
    ref_model_sync_steps: int = option(
        512, "Steps between updates of the reference model.", at_least=1
    )


@dataclass(slots=True, kw_only=True)
class DPOSection(ReferenceSection):
    """Loss and reference model of DPO."""

    loss_type: list[str] = option(
        ["sigmoid"],
        "Losses, added up, such as sigmoid,sft, or your own, path/to/file.py:function; see "
        "docs/dpo.md. kto takes unpaired completions.",
    )
    loss_weights: list[float] | None = option(None, "Weight of each loss; none = all 1.")
    label_smoothing: float = option(
        0.0, "Assumed fraction of pairs with swapped labels.", at_least=0, below=0.5
    )
    simpo_gamma: float = option(0.5, "Target margin of simpo.")
    discopop_tau: float = option(0.05, "Temperature of discopop.", above=0, below=1)
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = (
        option("reverse_kl", "Divergence from the reference that the loss is derived from.")
    )
    f_alpha_divergence_coef: float = option(0.5, "Alpha of alpha_divergence; not 1.")
    ld_alpha: float | None = option(
        None,
        "Weight of the tokens of a completion past the length of the other one (LD-DPO); none = 1.",
        at_least=0,
        at_most=1,
    )
    use_weighting: bool = option(
        False, "Weight pairs by the policy's probability of their completions (WPO)."
    )
    desirable_weight: float = option(1.0, "Weight of desirable completions in kto.", above=0)
    undesirable_weight: float = option(1.0, "Weight of undesirable completions in kto.", above=0)
    precompute_ref_log_probs: bool = option(
        False, "Compute reference logprobs before training, and keep no reference model in memory."
    )
    ref_log_probs_dir: str | None = option(
        None, "Directory of precomputed reference logprobs, shared by runs; none = in output_dir."
    )
    loss_chunk_size: int = option(
        256, "Tokens per chunk of logits; smaller saves memory.", at_least=1
    )


def _losses(v: Values) -> Iterator[str]:
    names, weights = v["loss_type"], v["loss_weights"]
    for name in names:
        yield from unknown_choice("loss_type", name, (*LOSSES, KTO))
    if not names or len(set(names)) < len(names):
        yield f"loss_type must name each loss once, got {','.join(names) or 'none'}"
    if KTO in names and len(names) > 1:
        yield f"loss_type kto cannot be combined with another loss, got {','.join(names)}"
    if weights is not None and len(weights) != len(names):
        yield f"loss_weights must be one per loss, got {len(weights)} for {len(names)}"
    if "exo_pair" in names and not v["label_smoothing"]:
        yield "loss_type exo_pair needs label_smoothing above 0; its authors use 0.001"


def _variants(v: Values) -> Iterator[str]:
    names, kind = v["loss_type"], v["f_divergence_type"]
    fixed = [n for n in names if n in LOSSES and n not in (*ANY_DIVERGENCE, *WITHOUT_REFERENCE)]
    if kind != "reverse_kl" and fixed and names != [KTO]:
        yield (
            f"f_divergence_type {kind} is defined for {', '.join(ANY_DIVERGENCE)}, got loss_type "
            f"{','.join(fixed)}"
        )
    if kind == "alpha_divergence" and abs(v["f_alpha_divergence_coef"] - 1) < 1e-6:
        yield "f_alpha_divergence_coef 1 is f_divergence_type reverse_kl; use that"
    if v["use_weighting"] and set(names) & set(COMPARING):
        yield f"use_weighting weights pairs, and loss_type {','.join(names)} sorts those of all"
    if v["ld_alpha"] is not None and v["precompute_ref_log_probs"]:
        yield (
            "ld_alpha excludes precompute_ref_log_probs, which keeps only the sums of the "
            "reference's logprobs"
        )


def _reference(v: Values) -> Iterator[str]:
    if v["precompute_ref_log_probs"] and v["lora_modules_to_save"]:
        yield (
            "precompute_ref_log_probs keeps no reference, whose modules lora_modules_to_save "
            "trains: leave one of them out"
        )
    if not v["sync_ref_model"] or _reads_no_reference(v):
        return
    if v["precompute_ref_log_probs"]:
        yield "sync_ref_model excludes precompute_ref_log_probs: the reference moves"
    elif v["use_peft"] or v["freeze"]:
        yield "sync_ref_model excludes use_peft and freeze: the reference is the frozen base"


def pairs_problems(v: Values) -> Iterator[str]:
    """Contradictions of packing."""
    if v["pack_pairs"] and v["max_length"] is None:
        yield "pack_pairs needs max_length: packed rows are twice that long"


def _reads_no_reference(v: Values) -> bool:
    return all(name in WITHOUT_REFERENCE for name in v["loss_type"])


def _only(name: str, readers: tuple[str, ...]) -> NoEffect:
    others = {*LOSSES, KTO} - set(readers)  # a loss of the user's own may read any
    return warns(name, lambda v: set(v["loss_type"]) <= others, f"only {', '.join(readers)} use it")


DPO = (
    NoEffect(
        "loss_weights",
        lambda v: v["loss_type"] == [KTO],
        "kto has desirable_weight and undesirable_weight",
    ),
    *(_only(name, readers) for name, readers in READERS.items()),
    needs("f_alpha_divergence_coef", "f_divergence_type", "alpha_divergence", warn=True),
    NoEffect("ld_alpha use_weighting", lambda v: v["loss_type"] == [KTO], "kto has no pairs"),
    warns("ld_alpha", _reads_no_reference, "loss_type {loss_type} uses no reference"),
    warns(
        "precompute_ref_log_probs sync_ref_model",
        _reads_no_reference,
        "loss_type {loss_type} uses no reference",
    ),
    needs("ref_log_probs_dir", "precompute_ref_log_probs"),
    needs("ref_model_mixup_alpha ref_model_sync_steps", "sync_ref_model"),
)


@dataclass(slots=True, kw_only=True)
class DPOConfig(TrainerConfig):
    """DPO and related losses: prefer chosen to rejected completions."""

    algorithm: ClassVar[str] = "dpo"
    examples: ClassVar[tuple[str, ...]] = (
        "--model_name_or_path DIR --dataset_name pairs.jsonl --beta 0.1 --output_dir outputs/mine",
    )
    # Defaults of the run without flags, which learns to prefer right sums in a minute.
    # Without sft the logprobs of right sums fall too, only less than those of wrong ones.
    demo: ClassVar[dict[str, Any]] = {
        "loss_type": ["sigmoid", "sft"],
        "learning_rate": 5e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20.0,
        "per_device_train_batch_size": 128,
        "max_steps": 300,
        "logging_steps": 20.0,
        "eval_strategy": "steps",
        "eval_steps": 100.0,
        "eval_on_start": True,
        "per_device_eval_batch_size": 250,
    }
    rules: ClassVar[tuple[Rule, ...]] = (_losses, _variants, _reference, pairs_problems)
    no_effect: ClassVar[tuple[NoEffect, ...]] = TrainerConfig.no_effect + DPO

    hyperparams: Hyperparams = section(Hyperparams, learning_rate=1e-6)
    # With dropout the first loss would not be ln 2: the reference has none.
    peft: PeftConfig = section(PeftConfig, lora_dropout=0.0)
    data: PreferenceConfig = section(PreferenceConfig)
    output: OutputConfig = section(OutputConfig, output_dir="outputs/dpo")
    dpo: DPOSection = section(DPOSection)
