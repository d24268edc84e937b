"""The parts of PPO against golden numbers and loops: rewards per token, value loss, KL control."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.losses import Clip, PolicyOptions, policy_loss, value_losses
from relax.trainers.rl.experience import adapt_kl_coef, advantages_and_returns, token_rewards

# The golden numbers of the formulas: three real tokens of six, garbage behind them.
LOGPROBS, REF = np.array([-1, -0.5, -0.8]), np.array([-1.1, -0.7, -0.6])
VALUES = np.array([0.1, 0.2, 0.3, 0.4, 0.0, 0.0])
MASK = np.arange(6)[None] < 3


def padded(values, garbage):
    return np.concatenate([values, np.full(6 - len(values), garbage)])[None].astype(np.float32)


GOLDEN = {
    "after_eos": {
        "rewards": [-0.005, -0.01, 0.01, 1, 0, 0],
        "returns": [0.8942, 0.936, 0.98, 1, 0, 0],
        "advantages": [1.006358, -0.012842, -0.993516, 0, 0, 0],
        "value_mask": [1, 1, 1, 1, 0, 0],
    },
    "last_token": {
        "rewards": [-0.005, -0.01, 1.01, 0, 0, 0],
        "returns": [0.921275, 0.9645, 1.01, 0, 0, 0],
        "advantages": [1.006743, -0.013629, -0.993114, 0, 0, 0],
        "value_mask": [1, 1, 1, 0, 0, 0],
    },
}


@pytest.mark.parametrize("garbage", [0.0, 1e4, np.nan])
@pytest.mark.parametrize("reward_at", GOLDEN)
def test_experience_equals_the_golden_numbers_whatever_the_padding_holds(reward_at, garbage):
    values = padded(VALUES[: 4 if reward_at == "after_eos" else 3], garbage)
    found = advantages_and_returns(
        jnp.ones(1), padded(LOGPROBS - REF, garbage), values, MASK, jnp.array([3]), 0.05,
        reward_at=reward_at,
    )  # fmt: skip
    for name, expected in GOLDEN[reward_at].items():
        # float32, over a spread of 0.06
        np.testing.assert_allclose(found[name][0], expected, atol=3e-6, err_msg=name)


@pytest.mark.parametrize(
    "reward_at, lengths, places",
    [
        ("last_token", [2, 4, 3, 3], [1, 3, 2, None]),
        # Behind the end where there is a place, observations or not.
        ("after_eos", [2, 4, 3, 3], [2, 3, 3, None]),
    ],
)
def test_the_score_is_given_where_it_is_said_to_be(reward_at, lengths, places):
    """The third completion begins with an observation, the last is one throughout."""
    mask = np.arange(4)[None] < np.array(lengths)[:, None]
    mask[2, :2] = mask[3] = False
    scores = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    rewards, value_mask = token_rewards(
        scores, np.zeros((4, 4)), mask, np.array(lengths), kl_coef=0.1, reward_at=reward_at
    )
    for row, place in enumerate(places):
        expected, states = np.zeros(4), mask[row].copy()
        if place is not None:
            expected[place], states[place] = scores[row], True
        np.testing.assert_array_equal(rewards[row], expected)
        np.testing.assert_array_equal(value_mask[row], states)


def test_whitened_rewards_have_variance_one_and_keep_their_mean():
    rng = np.random.default_rng(0)
    mask = np.arange(5)[None] < np.array([5, 2, 3])[:, None]
    kl, scores = rng.normal(size=(3, 5)), rng.normal(size=3)
    rows = [np.float32(x) for x in (scores, kl, np.zeros((3, 5)))]
    plain, white = (
        np.asarray(
            advantages_and_returns(*rows, mask, mask.sum(1), 0.3, whiten_rewards=w)["rewards"]
        )[mask]
        for w in (False, True)
    )
    assert abs(plain.std(ddof=1) - 1) > 0.1
    np.testing.assert_allclose(white.std(ddof=1), 1, rtol=1e-5)
    np.testing.assert_allclose(white.mean(), plain.mean(), atol=1e-6)


def test_with_lambda_one_returns_are_those_of_monte_carlo():
    """Discounted sums of what comes, whatever the critic says; observations are passed over."""
    rng = np.random.default_rng(1)
    mask = rng.random((4, 7)) < 0.7
    mask[:, 0] = True
    kl, values = (rng.normal(size=(4, 7)).astype(np.float32) for _ in range(2))
    scores = rng.normal(size=4).astype(np.float32)
    found = advantages_and_returns(scores, kl, values, mask, np.full(4, 7), 0.2, gamma=0.9, lam=1.0)
    for row in range(4):
        total, real = 0.0, np.flatnonzero(mask[row])
        for t in reversed(real):
            total = -0.2 * kl[row, t] + (scores[row] if t == real[-1] else 0) + 0.9 * total
            np.testing.assert_allclose(found["returns"][row, t], total, rtol=1e-4, atol=1e-6)


def test_value_losses_equal_hand_made_ones():
    """Old value 0, return 1, ε 0.2: V = 0.5 is held at 0.2; V = -0.5 at -0.2, which is nearer."""
    values = jnp.array([[0.1, 0.5, -0.5, 7.0]])
    old, returns = jnp.zeros((1, 4)), jnp.ones((1, 4)).at[0, 3].set(jnp.nan)
    mask = jnp.array([[1, 1, 1, 0]]) > 0
    losses, held = value_losses(values, old, returns, mask, clip=0.2)
    np.testing.assert_allclose(losses[0], [0.405, 0.32, 1.125, 0.0], rtol=1e-6)
    assert held[0].tolist() == [False, True, False, False]
    losses, held = value_losses(values, old, returns, mask, clip=None)
    np.testing.assert_allclose(losses[0], [0.405, 0.125, 1.125, 0.0], rtol=1e-6)
    assert not held.any()
    slope = jax.grad(lambda v: value_losses(v, old, returns, mask)[0].sum())(values)
    np.testing.assert_allclose(slope[0], [-0.9, 0.0, -1.5, 0.0], rtol=1e-6)


def test_the_dual_clip_bounds_the_loss_of_bad_tokens_alone():
    """Ye et al., eq. 5: max(min(ρ Â, clip(ρ) Â), c Â) where Â is negative."""
    ratio = np.array([0.5, 1.0, 1.5, 2.5, 9.0])
    for advantage in (-2.0, 1.0):
        plain = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
        expected = np.maximum(plain, 3.0 * advantage) if advantage < 0 else plain
        loss = policy_loss(
            jnp.log(jnp.array(ratio))[None], jnp.zeros((1, 5)), jnp.array([advantage]),
            jnp.ones((1, 5), bool), options=PolicyOptions(Clip(0.2, 0.2, 3.0)),
        ).loss  # fmt: skip
        np.testing.assert_allclose(loss, -expected.mean(), rtol=1e-6)


def test_the_coefficient_follows_the_target_in_bounded_steps():
    """Target 6 nats, 100 completions of a horizon of 1000: a tenth of the error, at most 2 %."""
    for kl, factor in ((6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (0.0, 0.98), (5.4, 0.99)):
        found = adapt_kl_coef(jnp.float32(0.5), kl, target=6.0, horizon=1000.0, count=100)
        np.testing.assert_allclose(found, 0.5 * factor, rtol=1e-6)
