"""PPO: advantage estimation, surrogate and entropy, against rlax and torch.

TRL 1.16 has no PPO trainer any more.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import rlax
import torch
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from relax.losses import (
    Clip,
    PolicyOptions,
    gae,
    linear_logprobs,
    masked_whiten,
    policy_loss,
    value_losses,
)

SECTION = "PPO and log-probabilities"
B, T = 4, 9
RNG = np.random.default_rng(8)
LENGTHS = np.array([9, 4, 1, 6])
MASK = np.arange(T)[None, :] < LENGTHS[:, None]
REWARDS, VALUES, LOGPS = RNG.normal(size=(3, B, T)).astype(np.float32)


def check_gae(parity):
    for gamma, lam in ((1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (0.9, 0.0)):
        mine, returns = gae(REWARDS, VALUES, MASK, gamma=gamma, lam=lam)
        expected = np.zeros((B, T), np.float32)
        for row, n in enumerate(LENGTHS):
            values = jnp.append(VALUES[row, :n], 0.0)
            discounts = jnp.full(n, gamma)
            expected[row, :n] = rlax.truncated_generalized_advantage_estimation(
                jnp.asarray(REWARDS[row, :n]), discounts, lam, values
            )
        subject = f"`gae`, γ {gamma}, λ {lam}"
        parity.equal(subject, "rlax", "advantages", mine, expected, tolerance=1e-5)
        wanted = np.where(MASK, expected + VALUES, 0)
        parity.equal(subject, "rlax", "returns", returns, wanted, tolerance=1e-5)


def check_lambda_returns(parity):
    _, returns = gae(REWARDS, VALUES, np.ones_like(MASK), gamma=0.97, lam=0.8)
    behind = np.append(VALUES[:, 1:], np.zeros((B, 1), np.float32), axis=1)
    expected = jax.vmap(lambda r, v: rlax.lambda_returns(r, jnp.full(T, 0.97), v, 0.8))
    parity.equal("`gae`", "rlax", "λ-returns", returns, expected(REWARDS, behind), tolerance=1e-5)


def check_clipped_surrogate(parity):
    old = LOGPS + RNG.normal(size=(B, T)).astype(np.float32) / 3

    def mine(logps):
        whole = np.ones_like(MASK)
        return policy_loss(
            logps, old, jnp.asarray(REWARDS), whole, options=PolicyOptions(Clip(0.2, 0.2))
        ).loss

    def other(logps):
        ratios = jnp.exp(logps - old).reshape(-1)
        return rlax.clipped_surrogate_pg_loss(ratios, jnp.asarray(REWARDS).reshape(-1), 0.2)

    logps = jnp.asarray(LOGPS)
    found, wanted = (jax.value_and_grad(f)(logps) for f in (mine, other))
    subject = "clipped surrogate, advantages per token"
    parity.equal(subject, "rlax", "value and gradient", found, wanted)


def check_value_loss(parity):
    values = jnp.asarray(VALUES)
    mine = value_losses(values, values, jnp.asarray(REWARDS), MASK, clip=None).losses
    wanted = jnp.where(MASK, rlax.l2_loss(values, jnp.asarray(REWARDS)), 0.0)
    parity.equal("`value_losses` without a bound", "rlax", "value", mine, wanted)


def check_whitening(parity):
    mine = masked_whiten(jnp.asarray(REWARDS), MASK)[MASK]
    real = torch.from_numpy(REWARDS[MASK])
    wanted = (real - real.mean()) / torch.sqrt(real.var() + 1e-8)
    parity.equal("whitening over the mask", "torch", "value", mine, wanted)


def check_logprobs_and_entropy(parity):
    hidden = RNG.normal(size=(20, 16)).astype(np.float32)
    matrix = RNG.normal(size=(50, 16)).astype(np.float32)
    targets = RNG.integers(0, 50, size=20).astype(np.int32)
    mine = linear_logprobs(hidden, matrix, targets, temperature=0.7, chunk_size=8)
    logits = torch.from_numpy(hidden @ matrix.T) / 0.7
    wanted = selective_log_softmax(logits, torch.from_numpy(targets).long())
    subject = "`linear_logprobs` at temperature 0.7"
    parity.equal(subject, "trl", "log-probabilities", mine.logprobs, wanted)
    parity.equal(subject, "trl", "entropy", mine.entropy, entropy_from_logits(logits))
    entropy = jax.vmap(lambda row: rlax.softmax().entropy(row))(jnp.asarray(logits.numpy()))
    parity.equal(subject, "rlax", "entropy", mine.entropy, entropy)


def check_that_trl_has_no_ppo():
    """If it is back, compare with it."""
    assert importlib.util.find_spec("trl.experimental.ppo") is None
