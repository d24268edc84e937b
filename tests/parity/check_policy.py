"""Policy losses and their gradients, against `_compute_loss` of TRL's GRPO and RLOO trainers.

The trainers get given log-probabilities and entropies in place of a model's.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peers import bare
from trl import GRPOTrainer, RLOOTrainer
from trl.experimental.gmpo import GMPOTrainer

from relax.losses import (
    Clip,
    PolicyOptions,
    clip_fractions,
    high_entropy,
    kl_estimate,
    masked_mean,
    near_policy,
    policy_loss,
)

SECTION = "Policy losses"
B, T, MOST = 6, 7, 10  # completions, their longest, and what a completion may have
RNG = np.random.default_rng(4)
LENGTHS = np.array([7, 2, 5, 1, 6, 3])
MASK = np.arange(T)[None, :] < LENGTHS[:, None]
LOGPS = -RNG.exponential(1.0, size=(B, T)).astype(np.float32)
OLD = LOGPS + RNG.normal(size=(B, T)).astype(np.float32) / 3
REF = LOGPS + RNG.normal(size=(B, T)).astype(np.float32) / 2
ENTROPY = RNG.exponential(1.0, size=(B, T)).astype(np.float32)
ADVANTAGES = RNG.normal(size=B).astype(np.float32)
SETTINGS = {
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "beta": 0.0,
    "use_bias_correction_kl": False,
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "delta": None,
    "entropy_coef": 0.0,
    "steps_per_generation": 1,
    "gradient_accumulation_steps": 1,
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
}


def theirs(rows=slice(None), cls=GRPOTrainer, num_items=None, **changed):
    """TRL's loss of some rows, its gradients with respect to log-probabilities, and metrics."""
    s = SimpleNamespace(**SETTINGS | changed)
    logps = torch.from_numpy(LOGPS[rows].copy()).requires_grad_()
    entropies = torch.from_numpy(ENTROPY[rows].copy())
    trainer = bare(
        cls,
        args=s,
        loss_type=s.loss_type,
        importance_sampling_level=s.importance_sampling_level,
        beta=s.beta,
        epsilon_low=s.epsilon_low,
        epsilon_high=s.epsilon_high,
        top_entropy_quantile=s.top_entropy_quantile,
        off_policy_mask_threshold=s.off_policy_mask_threshold,
        use_vllm=False,
        current_gradient_accumulation_steps=s.gradient_accumulation_steps,
        max_completion_length=MOST,
        use_adaptive_entropy=False,
        entropy_coef=s.entropy_coef,
        _entropy_bonus_enabled=s.entropy_coef != 0,
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, entropies, None),
    )
    mask = torch.from_numpy(MASK[rows].astype(np.int64))
    old = torch.from_numpy(OLD[rows])
    one = torch.ones(len(mask), 1, dtype=torch.long)
    batch = {
        "prompt_ids": one,
        "prompt_mask": one,
        "completion_ids": torch.ones_like(mask),
        "completion_mask": mask,
        "advantages": torch.from_numpy(ADVANTAGES[rows]),
        "old_per_token_logps": old,
        "old_logps": (old * mask).sum(1),
        "ref_per_token_logps": torch.from_numpy(REF[rows]),
        "num_items_in_batch": torch.tensor(num_items or int(mask.sum())),
    }
    loss = trainer._compute_loss(None, batch)
    loss.backward()
    return loss.detach().numpy(), logps.grad.numpy(), trainer._metrics["train"]


def kept(s, logps, rows):
    """Tokens that ReLax keeps, of those that two options exclude."""
    keep, mask = None, jnp.asarray(MASK[rows])
    if s.off_policy_mask_threshold is not None:
        moved = (logps, jnp.asarray(OLD[rows]), jnp.asarray(ADVANTAGES[rows]), mask)
        keep = near_policy(*moved, threshold=s.off_policy_mask_threshold)
    if s.top_entropy_quantile < 1:
        keep = high_entropy(jnp.asarray(ENTROPY[rows]), mask, fraction=s.top_entropy_quantile)
    return keep


def ours(rows=slice(None), **changed):
    """ReLax's loss and gradient, as GRPOTrainer composes them."""
    s = SimpleNamespace(**SETTINGS | changed)
    mask, old, ref = (jnp.asarray(x[rows]) for x in (MASK, OLD, REF))
    penalty = -s.entropy_coef * jnp.asarray(ENTROPY[rows]) if s.entropy_coef else None

    def loss(logps):
        kl = s.beta * kl_estimate(logps, ref, mask) if s.beta else None
        return policy_loss(
            *(logps, old, jnp.asarray(ADVANTAGES[rows]), mask),
            loss_type=s.loss_type,
            importance_sampling_level=s.importance_sampling_level,
            options=PolicyOptions(Clip(s.epsilon_low, s.epsilon_high, s.delta)),
            keep=kept(s, logps, rows),
            penalty=penalty,
            kl=kl,
            unbiased_kl=s.use_bias_correction_kl,
            max_length=MOST,
        )[:2]

    (value, weight), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(LOGPS[rows]))
    return np.asarray(value), np.asarray(gradient), float(weight)


def compare(parity, subject, mine, other, more=""):
    parity.equal(subject, "trl", f"value and gradient{more}", mine[:2], other[:2])


VARIANTS = {
    "": {},
    " with `epsilon_high` 0.28": {"epsilon_high": 0.28},
    " with `delta` 1.4": {"delta": 1.4},
    " with `beta` 0.04": {"beta": 0.04},
    " with `beta` 0.04, `use_bias_correction_kl`": {"beta": 0.04, "use_bias_correction_kl": True},
}


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def check_clipped_losses(parity, loss_type, level):
    for name, changed in VARIANTS.items():
        changed = {"loss_type": loss_type, "importance_sampling_level": level} | changed
        compare(parity, f"`{loss_type}`, {level} level", ours(**changed), theirs(**changed), name)


def check_cispo(parity):
    bound = {"epsilon_high": 1.2}
    compare(
        parity,
        "`cispo_absolute` (`cispo` in TRL)",
        ours(loss_type="cispo_absolute", **bound),
        theirs(loss_type="cispo", **bound),
    )
    wide = {"epsilon_low": 1.0, "epsilon_high": 0.2}  # an interval of [0, 1.2]
    parity.departs(
        "`cispo`",
        "trl",
        "value",
        ours(loss_type="cispo", **wide)[0],
        theirs(loss_type="cispo", epsilon_high=0.2)[0],
        "ReLax clips the ratio to [1 - `epsilon`, 1 + `epsilon_high`], as in MiniMax-M1, eq. 5; "
        "TRL takes the minimum of the ratio and `epsilon_high` itself: `cispo_absolute`.",
        explained=theirs(loss_type="cispo", epsilon_high=1.2)[0],
    )


def check_rloo(parity):
    changed = {"importance_sampling_level": "trajectory", "loss_type": "grpo"}
    other = theirs(cls=RLOOTrainer)
    compare(parity, "RLOO: `grpo`, trajectory level", ours(**changed), other)


def check_metrics(parity):
    _, _, metrics = theirs(beta=0.04)
    ratio = np.exp(np.where(MASK, LOGPS - OLD, 0))
    clipped = clip_fractions(jnp.asarray(ratio), jnp.asarray(ADVANTAGES), MASK, Clip())
    kl = kl_estimate(jnp.asarray(LOGPS), REF, MASK)
    shares = {name: masked_mean(where, MASK, axis=1) for name, where in clipped.items()}
    found = {
        "kl": masked_mean(kl, MASK),
        "entropy": masked_mean(jnp.asarray(ENTROPY), MASK),
        "clip_ratio/low_mean": masked_mean(clipped["low"], MASK),
        "clip_ratio/high_mean": masked_mean(clipped["high"], MASK),
        "clip_ratio/low_min": shares["low"].min(),
        "clip_ratio/high_max": shares["high"].max(),
        "clip_ratio/region_mean": masked_mean(clipped["low"] | clipped["high"], MASK),
    }
    assert set(found) == set(metrics)
    for name, value in found.items():
        parity.equal("metrics", "trl", f"`{name}`", value, np.float32(metrics[name][0]))


HALVES = slice(0, 3), slice(3, 6)  # 14 and 10 tokens


def accumulated(**changed):
    parts = [ours(rows, **changed) for rows in HALVES]
    total = sum(weight for _, _, weight in parts)
    value = sum(value * weight for value, _, weight in parts) / total
    return value, np.concatenate([g * weight / total for _, g, weight in parts])


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def check_two_micro_batches(parity, loss_type):
    """The micro-batches have unequal numbers of tokens."""
    steps = {"steps_per_generation": 2, "gradient_accumulation_steps": 2}
    parts = [
        theirs(rows, num_items=int(MASK.sum()), loss_type=loss_type, **steps) for rows in HALVES
    ]
    other = sum(part[0] for part in parts), np.concatenate([part[1] for part in parts])
    mine = accumulated(loss_type=loss_type)
    subject = f"`{loss_type}`, 2 micro-batches"
    if loss_type != "bnpo":
        return compare(parity, subject, mine, other)
    tokens = [MASK[rows].sum() / MASK.sum() for rows in HALVES]
    explained = np.concatenate([2 * w * p[1] for w, p in zip(tokens, parts, strict=True)])
    why = "ReLax divides by the tokens of the update; TRL by those of each micro-batch."
    return parity.departs(subject, "trl", "gradient", mine[1], other[1], why, explained=explained)


def check_two_updates_of_one_generation(parity):
    """Each update has half of a generation's completions."""
    steps = {"steps_per_generation": 2, "gradient_accumulation_steps": 1}
    rows, tokens = HALVES[0], int(MASK.sum())
    other = theirs(rows, num_items=tokens, **steps)
    parity.departs(
        "`dapo`, 2 updates of one generation",
        "trl",
        "gradient",
        ours(rows)[1],
        other[1],
        "ReLax divides by the tokens of the update; TRL by the mean over the updates of its "
        "generation.",
        explained=other[1] * tokens / 2 / MASK[rows].sum(),
    )


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def check_entropy_bonus(parity, loss_type):
    changed = {"loss_type": loss_type, "entropy_coef": 0.01}
    mine, other = ours(**changed), theirs(**changed)
    subject = f"`{loss_type}`, `entropy_coef` 0.01"
    if loss_type == "dapo":
        return parity.equal(subject, "trl", "value", mine[0], other[0])
    plain = theirs(loss_type=loss_type)
    per_row = np.where(MASK, ENTROPY, 0).sum(1) / LENGTHS
    return parity.departs(
        subject,
        "trl",
        "value",
        mine[0],
        other[0],
        "ReLax averages the bonus as the loss averages its tokens; TRL always over all tokens.",
        explained=plain[0] - 0.01 * per_row.mean(),
    )


def check_large_ratios(parity):
    """One token of a completion with A < 0 has a log-ratio of 100."""
    rows = slice(0, 1)
    logps, advantage = LOGPS[0, 0], ADVANTAGES[0]
    OLD[0, 0], ADVANTAGES[0] = logps - 100, -1.0
    try:
        mine, other = ours(rows), theirs(rows)
    finally:
        OLD[0, 0], ADVANTAGES[0] = logps + 0.1, advantage
    parity.departs(
        "log-ratio of 100, A < 0",
        "trl",
        "value",
        mine[0],
        other[0],
        "ReLax bounds log-ratios at ±20, as verl and OpenRLHF do; TRL's ratio overflows to "
        "infinity.",
    )


@pytest.mark.parametrize("name", ["sapo", "luspo", "vespo"])
def check_later_losses(parity, name):
    level = "sequence" if name == "luspo" else "token"
    changed = {"loss_type": name, "importance_sampling_level": level, "beta": 0.04}
    compare(parity, f"`{name}`", ours(**changed), theirs(**changed), ", with `beta` 0.04")


def check_gmpo(parity):
    wide = {"epsilon_low": 0.4, "epsilon_high": 0.4, "beta": 0.04}
    mine, other = ours(loss_type="gmpo", **wide), theirs(cls=GMPOTrainer, **wide)
    compare(parity, "`gmpo` (GMPOTrainer)", mine, other, ", with `beta` 0.04")


@pytest.mark.parametrize(
    "changed", [{"off_policy_mask_threshold": 0.05}, {"top_entropy_quantile": 0.3}], ids=str
)
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def check_tokens_kept(parity, loss_type, changed):
    [(name, value)] = changed.items()
    changed = changed | {"loss_type": loss_type, "beta": 0.04}
    compare(parity, f"`--{name} {value}`", ours(**changed), theirs(**changed), f", `{loss_type}`")
