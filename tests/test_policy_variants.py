"""The later losses and advantages of GRPO against numbers computed apart in float64.

The arrays are those of test_policy_losses. sapo, luspo, vespo and gmpo are what TRL 1.16 computes
from them, dppo, gpg, clip_cov and kl_cov what verl does; gradients are torch's.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_policy_losses import LOGPROBS, MASK, OLD, A

from relax.config import grpo as config
from relax.losses import (
    ADVANTAGES,
    LOSS_TYPES,
    Clip,
    PolicyOptions,
    gdpo_advantages,
    high_entropy,
    near_policy,
    pass_at_k_advantages,
    policy_loss,
    register_loss,
)
from relax.losses.ratios import log_interval
from relax.trainers.rl.entropy import EntropyControl

DPPO = [[-0.122797, 0, -0.100537, 0], [0.058404, 0, 0, 0], [0, 0.222222, 0.331517, 0]]
GOLDEN = [
    ("sapo", {}, 0.883719,
     [[-0.122458, -0.156125, -0.10031, 0], [0.087542, 0.075215, 0, 0],
      [0.121212, 0.166667, 0.23277, 0.15043]]),
    ("luspo", {}, 1.849139, [[-0.380877] * 3 + [0], [0.162552] * 2 + [0, 0], [0.666667] * 4]),
    ("vespo", {}, -0.428447, [[-0.056546] * 3 + [0], [0.052716] * 2 + [0, 0], [0.222222] * 4]),
    ("gmpo", {}, 0.489782,
     [[-0.118771, 0, -0.118771, 0], [0.081276, 0.081276, 0, 0], [0] + [0.170886] * 3]),
    ("dppo_tv", {"clip": Clip(0.05, 0.05)}, 0.123484, DPPO),
    ("dppo_kl", {"clip": Clip(0.01, 0.01)}, 0.123484, DPPO),
    ("dppo_kl", {"clip": Clip(0.012, 0.01)}, 0.043054,
     [*DPPO[:2], [0, 0.222222, 0.331517, 0.201075]]),
    ("gpg", {}, -0.238889, [[-0.111111] * 3 + [0], [0.055556] * 2 + [0, 0], [0.222222] * 4]),
    ("kl_cov", {"kl_cov_ratio": 0.25}, 0.716798,
     [[-0.122797, -0.054647, -0.100537, 0], [0.058404, 0.050269, 0, 0],
      [0.053515, 0.222222, 0.331517, 0.201075]]),
    ("clip_cov", {"clip_cov_lb": 0.05, "clip_cov_ratio": 1.0}, 0.575924,
     [[-0.122797, 0, -0.100537, 0], [0] * 4, [0, 0.222222, 0.331517, 0.201075]]),
]  # fmt: skip


def loss_of(logprobs, name="dapo", **options):
    keep = options.pop("keep", None)
    return policy_loss(
        logprobs, OLD, A, MASK, loss_type=name, options=PolicyOptions(**options), keep=keep,
        key=jax.random.key(0),
    ).loss  # fmt: skip


@pytest.mark.parametrize("name, options, loss, gradient", GOLDEN)
def test_losses_and_gradients_equal_the_golden_numbers(name, options, loss, gradient):
    found = jax.value_and_grad(lambda x: loss_of(x, name, **options))(jnp.asarray(LOGPROBS))
    np.testing.assert_allclose(found[0], loss, atol=1e-6)
    np.testing.assert_allclose(found[1], gradient, atol=1e-6)


def test_kl_cov_is_the_plain_gradient_where_the_policy_has_not_moved():
    """The slope of |log ρ| is 0 at 0, as in torch."""
    logprobs = jnp.asarray(np.where(MASK, OLD, 0))
    plain, found = (jax.grad(lambda x, n=n: loss_of(x, n))(logprobs) for n in ("dapo", "kl_cov"))
    np.testing.assert_array_equal(found, plain)


def test_clip_cov_drops_no_more_than_its_share_and_other_tokens_with_another_key():
    """Four tokens have a covariance in the interval and are not clipped; one of nine is dropped."""
    logprobs = jnp.asarray(np.where(MASK, OLD, 0))  # on policy: no token is clipped
    options = PolicyOptions(clip_cov_lb=0.0, clip_cov_ratio=0.12)
    dropped = set()
    for seed in range(8):

        def loss(x, seed=seed):
            return policy_loss(
                x, OLD, A, MASK, loss_type="clip_cov", options=options, key=jax.random.key(seed)
            ).loss

        where = np.argwhere((np.asarray(jax.grad(loss)(logprobs)) == 0) & MASK)
        assert len(where) == 1
        dropped.add(tuple(where[0]))
    assert len(dropped) > 1
    with pytest.raises(ValueError, match="draws tokens at random: pass key, got None"):
        policy_loss(logprobs, OLD, A, MASK, loss_type="clip_cov")


def test_what_is_not_kept_counts_in_the_denominator_alone():
    keep = np.array([[1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 1, 1]], bool)
    gradient = jax.grad(lambda x: loss_of(x, keep=keep))(jnp.asarray(LOGPROBS))
    expected = [[-0.122797, 0, 0, 0], [0.058404, 0, 0, 0], [0, 0.222222, 0.331517, 0.201075]]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_completions_that_the_policy_has_left_are_not_lowered():
    """By hand: mean falls of -0.25 (A > 0), 0.6 and 0.4 nats per token (A < 0)."""
    sampled = np.float32([[-1, -1, 0], [-1, -1, np.nan], [-1, -1, -1]])
    logprobs = np.float32([[-0.5, -1, 0], [-1.5, -1.7, np.nan], [-1.2, -1.5, -1.5]])
    mask = np.array([[1, 1, 0], [1, 1, 0], [1, 1, 1]], bool)
    kept = near_policy(logprobs, sampled, jnp.array([1.0, -1.0, -1.0]), mask, threshold=0.5)
    assert kept.tolist() == [[True], [False], [True]]


def test_tokens_of_the_highest_entropy_are_those_of_torch_quantile():
    """The threshold of TRL: the linearly interpolated quantile over the tokens of the batch."""
    rng = np.random.default_rng(0)
    entropy, mask = rng.exponential(size=(4, 7)).astype(np.float32), rng.random((4, 7)) < 0.7
    spoilt = np.where(mask, entropy, np.nan)
    for fraction in (0.2, 0.5, 1.0):
        expected = mask & (entropy >= np.quantile(entropy[mask], 1 - fraction))
        found = high_entropy(spoilt, mask, fraction=fraction)
        np.testing.assert_array_equal(found, expected)
    assert not high_entropy(spoilt, np.zeros_like(mask), fraction=0.5).any()


def test_the_entropy_coefficient_follows_the_entropy_of_the_step_before():
    control = EntropyControl(target=0.5, delta=0.1, lowest=0.0, highest=0.25)
    state, applied = control.start(0.1), []
    for entropy in (0.4, 0.5, 0.3, 0.6, 0.4):
        applied.append(float(control.applied(state)))
        state = control.adapted(state, jnp.float32(entropy))
    np.testing.assert_allclose(applied, [0, 0.2, 0.25, 0.25, 0], rtol=1e-6)
    np.testing.assert_allclose(state["entropy_coef"], 0.25, rtol=1e-6)


THREE = [[1, 0, 0, 1], [0.5, 0.5, 0.5, 0.5], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    "name, rewards, expected",
    [
        ("reinforce_plus_plus", THREE,
         [[1.397127, -0.997948, -0.997948, 1.397127], [0.19959] * 4,
          [-0.997948, -0.997948, -0.997948, 1.397127]]),
        ("reinforce_plus_plus_baseline", THREE,
         [[1.253252, -1.253252, -1.253252, 1.253252], [0] * 4,
          [-0.626626, -0.626626, -0.626626, 1.879878]]),
        ("maxrl", [*THREE, [0] * 4], [[1, -1, -1, 1], [0] * 4, [-1, -1, -1, 3], [0] * 4]),
        ("maxrl", [[-1, 1, np.nan], [-3, 1, 1]], [[0] * 3] * 2),  # no success rate
        # Two of three groups are unequal: 1.5 (r - mean).
        ("gpg", THREE, [[0.75, -0.75, -0.75, 0.75], [0] * 4, [-0.375, -0.375, -0.375, 1.125]]),
        # The paper's equations give 1 and -1/3.
        ("pass@2", [[1, 0, 0, 0], [0.5] * 4, [1, np.nan, np.nan, np.nan]],
         [[0.9998, -0.333267, -0.333267, -0.333267], [0] * 4, [0] * 4]),
    ],
)  # fmt: skip
def test_advantages_equal_the_golden_numbers(name, rewards, expected):
    found = ADVANTAGES[name](np.array(rewards, np.float64))
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_pass_at_k_is_the_mean_over_all_subsets(k):
    """Counted out: every subset of k of five rewards, and of the four that are not NaN."""
    for rewards in ([0.3, -1, 2.5, 0.3, 0], [0, 1, np.nan, 1, 0]):
        there = [i for i, r in enumerate(rewards) if not np.isnan(r)]
        expected = np.zeros(5)
        subsets = list(itertools.combinations(there, k))
        if subsets:
            best = np.array([max(rewards[i] for i in s) for s in subsets])
            for i in there:
                own = np.mean([b for b, s in zip(best, subsets, strict=True) if i in s])
                expected[i] = (own - best.mean()) / (best.std() + 1e-4)
        found = pass_at_k_advantages(np.array([rewards]), k)[0]
        np.testing.assert_allclose(found, expected, atol=1e-9)


def test_rewards_normalised_before_their_sum_equal_trls():
    rewards = np.array([[[1, 10], [0, 30], [1, 20], [0, np.nan]], [[1, 5], [1, 5], [1, 5], [1, 9]]])
    found = gdpo_advantages(rewards.astype(np.float64), np.array([1, 0.5]))
    expected = [[0.6100, -0.6100, 1.4437, -1.4437], [-0.4168, -0.4168, -0.4168, 1.2504]]
    np.testing.assert_allclose(found, expected, atol=5e-5)
    nothing = np.where(np.arange(4)[None, :, None] == 2, np.nan, rewards)
    assert (gdpo_advantages(nothing, np.ones(2))[:, 2] == 0).all()


def test_the_configuration_knows_the_losses_and_what_they_read():
    assert set(config.LOSSES) == set(LOSS_TYPES)
    assert set(config.ADVANTAGES) == set(ADVANTAGES)
    for name, loss in LOSS_TYPES.items():
        reads = {option for option, readers in config.READERS.items() if name in readers}
        assert reads == set(loss.reads), name
        assert config.LEVELS.get(name) == loss.level, name


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_losses_read_the_options_that_they_name_and_no_others(name):
    rng = np.random.default_rng(0)
    old = -rng.exponential(size=(24, 4)).astype(np.float32)
    logprobs = np.minimum(old + 0.4 * rng.normal(size=old.shape), -0.01).astype(np.float32)
    advantages, mask = rng.normal(size=24).astype(np.float32), np.ones(old.shape, bool)
    fields = {"epsilon": Clip(0.1, 0.2), "epsilon_high": Clip(0.2, 0.1)}
    fields["delta"] = Clip(0.2, 0.2, 1.05)
    base = PolicyOptions(Clip(0.2, 0.2), clip_cov_lb=0.05, clip_cov_ratio=0.25, kl_cov_ratio=0.25)
    near = {"clip_cov_lb": -1.0, "clip_cov_ub": 0.2, "clip_cov_ratio": 1.0, "kl_cov_ratio": 0.5}

    def gradient(options):
        if name.startswith("dppo"):
            options = options._replace(clip=Clip(options.clip.low / 4, options.clip.high / 4))

        def loss(x):
            arrays = (x, old, advantages, mask)
            return policy_loss(
                *arrays, loss_type=name, options=options, key=jax.random.key(0)
            ).loss  # fmt: skip

        return jax.grad(loss)(jnp.asarray(logprobs))

    before = gradient(base)
    for option in config.READERS:
        changed = {option: near.get(option, 0.5)}
        if option in fields:
            changed = {"clip": fields[option]}
        same = np.array_equal(before, gradient(base._replace(**changed)))
        assert same == (option not in LOSS_TYPES[name].reads), option


def test_the_interval_of_gmpo_is_that_of_log_ratios():
    np.testing.assert_allclose(log_interval(Clip(0.4, 0.3)), np.exp([-0.4, 0.3]), rtol=1e-6)


OWN = """
from relax.losses import register_loss

def plain(tokens, options):
    return -tokens.ratio * tokens.advantages

@register_loss("summed", aggregation="sequence_sum")
def summed(tokens, options):
    return -tokens.ratio * tokens.advantages

def best(rewards):
    return rewards - rewards.max(axis=1, keepdims=True)
"""


def test_a_loss_and_an_advantage_are_named_by_their_file(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    ones = jnp.zeros((2, 2)), jnp.zeros((2, 2)), jnp.array([3.0, 1.0]), jnp.ones((2, 2), bool)
    try:
        assert policy_loss(*ones, loss_type=f"{file}:plain").loss == -2
        assert policy_loss(*ones, loss_type=f"{file}:summed").loss == -4  # as registered
        assert ADVANTAGES[f"{file}:best"](np.array([[1.0, 3.0]])).tolist() == [[-2, 0]]
        with pytest.raises(ValueError, match="has no object 'plian'. Did you mean plain"):
            LOSS_TYPES[f"{file}:plian"]
    finally:
        for registry in (LOSS_TYPES, ADVANTAGES):
            for name in [n for n in registry if n.startswith(str(file)) or n == "summed"]:
                del registry[name]
    with pytest.raises(ValueError, match="unknown algorithm 'gpro'. Did you mean grpo"):
        register_loss("mine", "gpro")
