"""Preference losses and reward models' loss, against methods of TRL's trainers.

The methods compute the loss from a model's outputs: here the model returns given log-probabilities.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peers import bare
from trl import DPOTrainer, KTOTrainer, RewardTrainer

from relax.losses import (
    PREFERENCE_LOSSES,
    bradley_terry_loss,
    centering_loss,
    dpo_loss,
    kto_loss,
    kto_reference_point,
    ld_weights,
    wpo_weights,
)

SECTION = "Preference losses"
N, P, C = 5, 3, 8  # pairs, tokens of a prompt and at most of a completion
RNG = np.random.default_rng(2)
LENGTHS = RNG.integers(1, C + 1, size=2 * N)  # chosen, then rejected
MASK = np.arange(C)[None, :] < LENGTHS[:, None]
LOGPS = np.where(MASK, -RNG.exponential(1.0, size=(2 * N, C)), 0).astype(np.float32)
REF = np.where(MASK, LOGPS + RNG.normal(size=(2 * N, C)) / 2, 0).sum(1).astype(np.float32)
COLLISION = -0.7  # log Σ p² of every token
DEFAULTS = {
    "beta": 0.3,
    "label_smoothing": 0.0,
    "loss_weights": [1.0],
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "args": SimpleNamespace(discopop_tau=0.05),
    "precompute_ref_logps": True,
    "ld_alpha": None,
    "use_weighting": False,
}


class Outputs(torch.nn.Module):
    """A model with given log-probabilities `[2N, C]` of completions behind P tokens of a prompt."""

    def __init__(self, logps):
        super().__init__()
        self.logps = torch.nn.Parameter(torch.from_numpy(logps.copy()))

    def forward(self, labels, **kwargs):
        log_probs = torch.nn.functional.pad(self.logps, (P - 1, 0))
        log_probs = log_probs.masked_fill(labels[:, 1:] == -100, 0)  # as TRL's fused head does
        zeros = torch.zeros_like(log_probs)
        return SimpleNamespace(
            log_probs=log_probs,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
            log_sum_sq_probs=zeros + COLLISION,
        )


def inputs(mask):
    completion_mask = np.pad(mask, ((0, 0), (P, 0))).astype(np.int64)
    return {
        "input_ids": torch.ones(completion_mask.shape, dtype=torch.long),
        "attention_mask": torch.from_numpy(completion_mask),
        "completion_mask": torch.from_numpy(completion_mask),
    }


def their_dpo(loss_type, **settings):
    """TRL's loss of the batch, and its gradient with respect to the log-probabilities."""
    loss_types = [loss_type] if isinstance(loss_type, str) else loss_type
    model = Outputs(LOGPS)
    trainer = bare(DPOTrainer, loss_types=loss_types, **DEFAULTS | settings)
    ref = {"ref_chosen_logps": REF[:N], "ref_rejected_logps": REF[N:]}
    batch = inputs(MASK) | {key: torch.from_numpy(value) for key, value in ref.items()}
    loss = trainer._compute_loss(model, batch, False)
    loss.backward()
    return loss, model.logps.grad


def our_dpo(loss_type, beta=DEFAULTS["beta"], **settings):
    lengths = jnp.asarray(LENGTHS, jnp.float32)

    def loss(logps):
        sums = jnp.where(MASK, logps, 0).sum(axis=1)
        return dpo_loss(
            *(sums[:N], sums[N:], REF[:N], REF[N:]),
            chosen_length=lengths[:N],
            rejected_length=lengths[N:],
            loss_type=loss_type,
            beta=beta,
            **settings,
        ).mean()

    return jax.value_and_grad(loss)(jnp.asarray(LOGPS))


THEIRS = (
    *("sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "apo_zero", "apo_down"),
    *("exo_pair", "nca_pair", "bco_pair", "sppo_hard", "sft", "discopop", "aot", "aot_unpaired"),
)


@pytest.mark.parametrize("name", THEIRS)
def check_pairs(parity, name):
    smoothing = {"label_smoothing": 0.1} if name in ("robust", "exo_pair", "aot") else {}
    ours, theirs = our_dpo(name, **smoothing), their_dpo(name, **smoothing)
    subject = f"DPO, `{name}`" + (" with `label_smoothing`" if smoothing else "")
    parity.equal(subject, "trl", "value and gradient", ours, theirs)


def check_label_smoothing_of_the_sigmoid_loss(parity):
    ours = our_dpo("sigmoid", label_smoothing=0.1)
    plain, flipped = our_dpo("sigmoid"), our_dpo("sigmoid", beta=-DEFAULTS["beta"])
    explained = 0.9 * np.float32(plain[0]) + 0.1 * np.float32(flipped[0])
    parity.equal("DPO, `sigmoid`", "trl", "value", plain[0], their_dpo("sigmoid")[0])
    parity.departs(
        "DPO, `sigmoid` with `label_smoothing`",
        "trl",
        "value",
        ours[0],
        their_dpo("sigmoid", label_smoothing=0.1)[0],
        "ReLax computes cDPO's loss, with the labels flipped with probability ε; TRL ignores ε.",
        explained=explained,
    )


DIVERGENT = [name for name, loss in PREFERENCE_LOSSES.items() if loss.any_divergence]


@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", DIVERGENT)
def check_divergences(parity, kind, name):
    settings = {"f_divergence_type": kind, "f_alpha_divergence_coef": 0.6}
    settings |= {"label_smoothing": 0.1} if name in ("robust", "exo_pair") else {}
    ours, theirs = our_dpo(name, **settings), their_dpo(name, **settings)
    subject = f"DPO, `--f_divergence_type {kind}`"
    parity.equal(subject, "trl", f"`{name}`, value and gradient", ours, theirs, tolerance=1e-5)


def check_weights_of_tokens_and_pairs(parity):
    """`ld_alpha` with precomputed sums of the reference, and `use_weighting`."""
    lengths = LENGTHS.reshape(2, N).T

    def ours(logps, alpha, weighs):
        tokens = jnp.where(MASK, logps, 0).reshape(2, N, C).swapaxes(0, 1)  # [N, 2, C]
        sums = (ld_weights(jnp.asarray(lengths), C, alpha) * tokens).sum(axis=2)
        losses = dpo_loss(*sums.T, REF[:N], REF[N:], beta=DEFAULTS["beta"])
        mask = MASK.reshape(2, N, C).swapaxes(0, 1)
        weights = wpo_weights(tokens, jnp.full(tokens.shape, COLLISION), mask)
        return (losses * weights).mean() if weighs else losses.mean()

    for subject, alpha, weighs in (("ld_alpha 0.4", 0.4, False), ("use_weighting", 1.0, True)):
        mine = jax.value_and_grad(ours)(jnp.asarray(LOGPS), alpha, weighs)
        theirs = their_dpo("sigmoid", ld_alpha=alpha, use_weighting=weighs)
        parity.equal(f"DPO, `--{subject}`", "trl", "value and gradient", mine, theirs)


def check_several_losses(parity):
    weights = [1.0, 0.25, 2.0]
    names = ["sigmoid", "sft", "apo_zero"]
    theirs = their_dpo(names, loss_weights=weights)
    parts = [our_dpo(name) for name in names]
    ours = [sum(w * part[i] for w, part in zip(weights, parts, strict=True)) for i in (0, 1)]
    parity.equal("DPO, weighted sum of 3 losses", "trl", "value and gradient", ours, theirs)


def check_which_losses_are_not_there(parity):
    with pytest.raises(ValueError) as error:
        their_dpo("none such")
    known = error.value.args[0].split("[")[1].strip("]. ").replace("'", "").split(", ")
    assert set(THEIRS) <= set(known)
    for name in sorted(set(known) - set(PREFERENCE_LOSSES)):
        parity.missing(f"DPO, `--loss_type {name}`", "trl")
    parity.missing("KTO, `--loss_type apo_zero_unpaired`", "trl")


@pytest.mark.parametrize("desirable", [[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
def check_kto(parity, desirable):
    """The rejected rows are the completions of the KL estimate."""
    desirable = np.array(desirable, bool)
    model, kl_model = Outputs(LOGPS[:N]), Outputs(LOGPS[N:])

    models = iter([kl_model, model])  # TRL computes the KL estimate first

    class Both(torch.nn.Module):
        def forward(self, **kwargs):
            return next(models)(**kwargs)

    trainer = bare(
        KTOTrainer,
        beta=DEFAULTS["beta"],
        loss_type="kto",
        calculate_KL=True,
        precompute_ref_logps=True,
        desirable_weight=1.0,
        undesirable_weight=1.5,
    )
    batch = inputs(MASK[:N])
    batch |= {f"KL_{key}": value for key, value in inputs(MASK[N:]).items()}
    batch |= {
        "label": torch.from_numpy(desirable),
        "ref_logps": torch.from_numpy(REF[:N]),
        "ref_KL_logps": torch.from_numpy(REF[N:]),
    }
    loss = trainer._compute_loss(Both(), batch, False)
    loss.backward()

    def ours(logps):
        scores = jnp.where(MASK, logps, 0).sum(axis=1) - REF
        kl = kto_reference_point(scores[N:], jnp.ones(N, bool))
        weights = {"desirable_weight": 1.0, "undesirable_weight": 1.5}
        return kto_loss(scores[:N], kl, desirable, beta=DEFAULTS["beta"], **weights).mean()

    value, gradient = jax.value_and_grad(ours)(jnp.asarray(LOGPS))
    subject = f"KTO, {desirable.sum()} of {N} desirable"
    found, wanted = (value, gradient[:N]), (loss, model.logps.grad)
    parity.equal(subject, "trl", "value and gradient", found, wanted)
    assert kl_model.logps.grad is None
    assert not np.asarray(gradient[N:]).any()


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("coefficient", [None, 0.01])
def check_reward_model(parity, margin, coefficient):
    scores = RNG.normal(size=2 * N).astype(np.float32) * 3
    margins = RNG.uniform(size=N).astype(np.float32)
    logits = torch.from_numpy(scores[:, None].copy()).requires_grad_()
    trainer = bare(RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=coefficient))
    batch = {"attention_mask": torch.ones(2 * N, 4, dtype=torch.long)}
    if margin:
        batch["margin"] = torch.from_numpy(margins)
    loss = trainer.compute_loss(lambda **kwargs: SimpleNamespace(logits=logits), batch)
    loss.backward()

    def ours(scores):
        chosen, rejected = scores[:N], scores[N:]
        losses = bradley_terry_loss(chosen, rejected, margins if margin else None)
        return (losses + (coefficient or 0.0) * centering_loss(chosen, rejected)).mean()

    value, gradient = jax.value_and_grad(ours)(jnp.asarray(scores))
    subject = "Bradley-Terry" + (", `margin`" if margin else "")
    subject += ", `center_rewards_coefficient`" if coefficient else ""
    wanted = loss, logits.grad[:, 0]
    parity.equal(subject, "trl", "value and gradient", (value, gradient), wanted)
