"""Every loss on 10,000 ragged batches of extreme values, value and gradient.

What they should be is computed in float64 by numpy: loops over completions and tokens, each over
all draws at once. Padding holds NaN, infinities and huge numbers. A number that float32 holds must
be met; one that overflows it may be infinite or NaN, which skips the update, but never looks fine.

Axes: N draws, B completions, T tokens of a completion, P prompts, G completions of a group.
"""

import jax
import numpy as np
import pytest

from relax.losses import (
    ADVANTAGES,
    IGNORED,
    LOSS_TYPES,
    PREFERENCE_LOSSES,
    Clip,
    PolicyOptions,
    bradley_terry_loss,
    centering_loss,
    dpo_loss,
    gae,
    kl_estimate,
    kto_loss,
    kto_reference_point,
    linear_cross_entropy,
    linear_logprobs,
    masked_mean,
    masked_whiten,
    policy_loss,
    value_losses,
)

N, B, T = 10_000, 3, 5
GARBAGE = np.float32([np.nan, np.inf, -np.inf, 3e38, -3e38, 0, 1e4])
HUGE = 1e37  # beyond this float32 may overflow on the way


def pick(rng, choices, shape):
    return rng.choice(np.float32(choices), shape)


def ragged(rng):
    """Masks whose true entries lie at the start, with holes: environments speak in between."""
    lengths = rng.integers(0, T + 1, (N, B, 1))
    return (np.arange(T) < lengths) & (rng.random((N, B, T)) < 0.9)


def spoil(rng, values, mask):
    return np.where(mask, values, rng.choice(GARBAGE, values.shape)).astype(np.float32)


def logprobs_of(rng, mask):
    """Multiples of 1/64: their differences are float32 numbers, so the oracle sees the same."""
    small = -np.round(rng.exponential(1.0, mask.shape) * 64) / 64
    extreme = pick(rng, [0, -1 / 64, -20, -100, -1e4], mask.shape)
    return spoil(rng, np.where(rng.random(mask.shape) < 0.8, small, extreme), mask)


def assert_met(found, expected, scale, unsure=None, tolerance=3e-5):
    """|found - expected| within `tolerance` of `scale`, the sum of what was added up."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    error = np.abs(found - expected)
    fine = error <= tolerance * (scale + np.abs(expected)) + 1e-30
    fine |= (scale > HUGE) & ~np.isfinite(found)
    if unsure is not None:  # a draw on the edge of a clip: either side is right
        assert unsure.mean() < 0.05
        fine |= unsure
    where = np.argwhere(~fine)
    assert not where.size, (
        f"{len(where)} of {fine.size}, the first {where[0]}: {found[tuple(where[0])]} in place of "
        f"{expected[tuple(where[0])]}"
    )


def value_and_grad(function, *arguments, argnums=0):
    """Of all draws: vmapped and compiled once."""
    return jax.jit(jax.vmap(jax.value_and_grad(function, argnums)))(*arguments)


# The policy losses.

CLIP = Clip(0.2, 0.3)
LIMIT = 20.0


def objective(loss_type, rho, A, logprob, old, clip):
    """Loss of a token, and its derivatives with respect to the ratio and the log-probability."""
    if loss_type == "gpg":
        return -A * logprob, 0 * rho, -A
    if loss_type == "sapo":
        tau = np.where(A > 0, 1.0, 1.05)
        gate = sigmoid(tau * (rho - 1))
        return -4 / tau * gate * A, -4 * gate * (1 - gate) * A, 0 * rho
    if loss_type == "vespo":
        k, rate, w = np.where(A >= 0, 2.0, 3.0), np.where(A >= 0, 3.0, 2.0), np.maximum(rho, 1e-8)
        weight = np.exp(k * np.log(w) + rate * (1 - w))
        return -weight * A * logprob, 0 * rho, -weight * A
    if loss_type.startswith("dppo"):
        p, q = np.exp(logprob), np.exp(old)
        high, low = p - q > clip.high, p - q < -clip.low
        if loss_type == "dppo_kl":
            kl = q * (old - logprob) + (1 - q) * np.log((1 - q + 1e-8) / (1 - p + 1e-8))
            high, low = (kl > clip.high) & (p > q), (kl > clip.low) & (p < q)
        weight = np.where(np.where(A > 0, high, low), 0, np.minimum(rho, 20))
        return -weight * A * logprob, 0 * rho, -weight * A
    if loss_type.startswith("cispo"):
        absolute = loss_type == "cispo_absolute"
        weight = (
            np.minimum(rho, clip.high) if absolute else np.clip(rho, 1 - clip.low, 1 + clip.high)
        )
        return -weight * A * logprob, 0 * rho, -weight * A
    free = rho if clip.delta is None else np.minimum(rho, clip.delta)
    inside = np.clip(rho, 1 - clip.low, 1 + clip.high)
    takes_free = free * A <= inside * A
    moves = np.where(takes_free, free == rho, inside == rho)
    return -np.minimum(free * A, inside * A), -A * moves, 0 * rho


def policy_oracle(logprobs, old, A, mask, loss_type, level, clip):
    """Loss `[N]`, gradient `[N, B, T]`, the magnitudes added up, and draws on an edge."""
    l64, o64 = (np.where(mask, x, 0).astype(np.float64) for x in (logprobs, old))
    log_ratio, counts = l64 - o64, mask.sum(axis=2)
    loss, scale, unsure = np.zeros(N), np.zeros(N), np.zeros(N, bool)
    gradient = np.zeros(mask.shape)
    level = LOSS_TYPES[loss_type].level or level
    for b in range(B):
        size = np.abs(log_ratio[:, b]).sum(axis=1)  # how well float32 knows a sum of them
        for t in range(T):
            exponent, share = log_ratio[:, b, t], np.eye(T)[t][None]
            if level != "token":
                n = np.maximum(counts[:, b], 1) if level == "sequence" else 1
                exponent = log_ratio[:, b].sum(axis=1) / n
                share = mask[:, b] / np.reshape(n, (-1, 1))
            rho = np.exp(np.clip(exponent, -LIMIT, LIMIT))
            here, a = mask[:, b, t], A[:, b].astype(np.float64)
            pair = (l64[:, b, t], o64[:, b, t])
            value, d_rho, d_logprob = objective(loss_type, rho, a, *pair, clip)
            per = {
                "grpo": B * np.maximum(counts[:, b], 1),
                "sapo": B * np.maximum(counts[:, b], 1),
                "dr_grpo": np.full(N, B * T),
                "luspo": np.full(N, B),
            }.get(loss_type, np.maximum(counts.sum(axis=1), 1))
            loss += here * value / per
            scale += here * np.abs(value) / per * (1 + size) + here * rho * np.abs(a) / per * size
            d_exponent = d_rho * rho * (np.abs(exponent) < LIMIT)
            gradient[:, b] += (here * d_exponent / per)[:, None] * share
            gradient[:, b, t] += here * d_logprob / per
            scale += here * (np.abs(d_exponent) + np.abs(d_logprob)) / per * (1 + size)
            edges = [1 - clip.low, 1 + clip.high, clip.high, clip.delta or 1]
            near = 1e-6 * (1 + size)
            unsure |= here & (np.abs(np.abs(exponent) - LIMIT) < near)
            for edge in edges:
                unsure |= here & (np.abs(rho / edge - 1) < near) & (rho != 1)
    return loss, gradient, scale, unsure


APART = ("gmpo", "clip_cov", "kl_cov")  # of which a token's loss depends on the others


def drawn(rng):
    """Log-probabilities, old ones, advantages and a mask."""
    mask = ragged(rng)
    logprobs = logprobs_of(rng, mask)
    near = spoil(rng, np.where(mask, logprobs, 0) + rng.integers(-32, 33, mask.shape) / 64, mask)
    old = np.where(rng.random(mask.shape) < 0.7, near, logprobs_of(rng, mask))
    A = pick(rng, [0, 1e-30, -1e-30, 1, -1, 0.3, -0.7, 1e4, -1e4, 1e18, -1e18], (N, B))
    return logprobs, old, A, mask


@pytest.mark.parametrize("level", ["token", "sequence", "trajectory"])
@pytest.mark.parametrize(
    "loss_type, clip",
    [(name, CLIP) for name in LOSS_TYPES if name not in APART] + [("dapo", Clip(0.2, 0.3, 4.0))],
    ids=lambda x: x if isinstance(x, str) else f"delta={x.delta}",
)
def test_policy_losses(loss_type, clip, level):
    if LOSS_TYPES[loss_type].level not in (None, level):
        pytest.skip("the loss has a ratio of its own")
    logprobs, old, A, mask = drawn(np.random.default_rng(0))
    if loss_type == "dppo_kl":  # which takes logarithms of 1 - π_old
        old = np.minimum(old, 0)

    def loss(*arrays):
        return policy_loss(
            *arrays,
            loss_type=loss_type,
            importance_sampling_level=level,
            options=PolicyOptions(clip),
        ).loss

    found, gradient = value_and_grad(loss, logprobs, old, A, mask)
    expected, d_expected, scale, unsure = policy_oracle(
        logprobs, old, A, mask, loss_type, level, clip
    )
    assert_met(found, expected, scale, unsure)
    assert_met(
        gradient,
        d_expected,
        scale[:, None, None],
        np.broadcast_to(unsure[:, None, None], mask.shape),
    )
    assert (np.asarray(gradient)[~mask] == 0).all()


def test_the_geometric_mean_of_ratios():
    logprobs, old, A, mask = drawn(np.random.default_rng(9))

    def loss(*arrays):
        return policy_loss(*arrays, loss_type="gmpo", options=PolicyOptions(CLIP)).loss

    found, gradient = value_and_grad(loss, logprobs, old, A, mask)
    l64, o64 = (np.where(mask, x, 0).astype(np.float64) for x in (logprobs, old))
    x, a, n = l64 - o64, A.astype(np.float64)[:, :, None], np.maximum(mask.sum(axis=2), 1)
    inside = np.clip(x, -CLIP.low, CLIP.high)
    held = np.where(a > 0, np.minimum(x, inside), np.maximum(x, inside))
    mean = held.sum(axis=2) / n
    some = mask.any(axis=2)
    terms = -np.exp(np.clip(mean, -LIMIT, LIMIT)) * A * some / B
    scale = np.abs(terms).sum(axis=1) * (1 + np.abs(x).max(axis=(1, 2)))
    unsure = (np.abs(np.abs(mean) - LIMIT) < 1e-4).any(axis=1)
    edge = (np.abs(x - inside) > 0) & (np.abs(x - inside) < 1e-6)
    unsure |= (edge & mask).any(axis=(1, 2))
    assert_met(found, terms.sum(axis=1), scale, unsure)
    moves = (held == x) & mask & (np.abs(mean) < LIMIT)[:, :, None]
    assert_met(gradient, (terms / n)[:, :, None] * moves, scale[:, None, None])


@pytest.mark.parametrize("loss_type", ["clip_cov", "kl_cov"])
def test_losses_of_covariance(loss_type):
    """Of each token the gradient is the plain one, none, or the penalty's in addition."""
    logprobs, old, A, mask = drawn(np.random.default_rng(10))
    options = PolicyOptions(CLIP, clip_cov_ratio=0.3, kl_cov_ratio=0.3)

    def loss(*arrays):
        key = jax.random.key(0)
        return policy_loss(*arrays, loss_type=loss_type, options=options, key=key).loss

    found, gradient = value_and_grad(loss, logprobs, old, A, mask)
    clip = CLIP if loss_type == "clip_cov" else Clip(1e9, 1e9)
    _, plain, scale, unsure = policy_oracle(logprobs, old, A, mask, "dapo", "token", clip)
    tokens = np.maximum(mask.sum(axis=(1, 2)), 1)[:, None, None]
    x = np.where(mask, logprobs, 0).astype(np.float64) - np.where(mask, old, 0)
    others = [0 * plain] if loss_type == "clip_cov" else [plain + np.sign(x) / tokens]
    near = [
        np.abs(gradient - g) <= 3e-5 * (scale[:, None, None] + np.abs(g)) for g in [plain, *others]
    ]
    fine = np.any(near, axis=0) | unsure[:, None, None]
    assert fine.all() and (np.asarray(gradient)[~mask] == 0).all() and np.isfinite(found).all()
    changed = (~near[0] & mask & ~unsure[:, None, None]).sum(axis=(1, 2))
    assert (changed <= np.maximum(np.floor(0.3 * mask.sum(axis=(1, 2))), 1)).all()
    assert (changed > 0).any()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimates(estimator):
    rng = np.random.default_rng(1)
    mask = ragged(rng)
    logprobs, ref = logprobs_of(rng, mask), logprobs_of(rng, mask)

    def total(*arrays):
        return kl_estimate(*arrays, estimator).sum()

    found, gradient = value_and_grad(total, logprobs, ref, mask)
    loss, scale, slopes = np.zeros(N), np.zeros(N), np.zeros(mask.shape)
    with np.errstate(over="ignore"):
        for b, t in np.ndindex(B, T):
            here = mask[:, b, t]
            d = np.where(here, logprobs[:, b, t], 0.0) - np.where(here, ref[:, b, t], 0.0)
            value, slope = {
                "k1": (d, 1 + 0 * d),
                "k2": (d * d / 2, d),
                "k3": (np.exp(-d) + d - 1, 1 - np.exp(-d)),
            }[estimator]
            loss += value
            scale += np.abs(value) + np.abs(d) + np.abs(slope) * (1 + np.abs(d))
            slopes[:, b, t] = here * slope
    fits = loss < HUGE
    assert_met(np.asarray(found)[fits], loss[fits], scale[fits])
    assert not np.isfinite(np.asarray(found)[loss > 4e38]).any()  # never a healthy number
    assert_met(np.asarray(gradient)[fits], slopes[fits], scale[fits][:, None, None])


# The critic.


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_losses(clip):
    rng = np.random.default_rng(2)
    mask = ragged(rng)
    values, old, returns = (
        spoil(rng, pick(rng, [0, 0.25, -0.5, 0.125, 3, -1e4, 1e9, -1e15], mask.shape), mask)
        for _ in range(3)
    )

    def total(*arrays):
        return value_losses(*arrays, clip=clip).losses.sum()

    found, gradient = value_and_grad(total, values, old, returns, mask)
    loss, scale, slopes = np.zeros(N), np.zeros(N), np.zeros(mask.shape)
    for b, t in np.ndindex(B, T):
        here = mask[:, b, t]
        v, o, r = (np.where(here, x[:, b, t], 0).astype(np.float64) for x in (values, old, returns))
        near = v if clip is None else np.clip(v, o - clip, o + clip)
        free, held = (v - r) ** 2, (near - r) ** 2
        loss += np.maximum(free, held) / 2
        # A tie is a value inside the interval, or an error of the same size on the other side.
        inside = near == v
        slope = np.where(free > held, v - r, np.where(free < held, (near - r) * inside, v - r))
        tie = (free == held) & ~inside
        slopes[:, b, t] = here * np.where(tie, (v - r) / 2, slope)
        scale += np.maximum(free, held) + np.abs(v) + np.abs(r)
    assert_met(found, loss, scale)
    rounded = np.broadcast_to((scale > 1e12)[:, None, None], mask.shape)
    assert_met(np.where(rounded, 0, gradient), np.where(rounded, 0, slopes), scale[:, None, None])
    assert np.isfinite(gradient).all() and (np.asarray(gradient)[~mask] == 0).all()


def test_generalised_advantages():
    rng = np.random.default_rng(3)
    mask = ragged(rng)
    rewards, values = (
        spoil(rng, pick(rng, [0, 1, -1, 0.25, 99.9, -1e4, 1e8, -1e15], mask.shape), mask)
        for _ in range(2)
    )
    advantages, returns = jax.jit(jax.vmap(lambda *a: gae(*a, gamma=0.9, lam=0.7)))(
        rewards, values, mask
    )
    for b in range(B):
        next_value, next_advantage, scale = np.zeros(N), np.zeros(N), np.zeros(N)
        for t in reversed(range(T)):
            here = mask[:, b, t]
            r, v = (np.where(here, x[:, b, t], 0).astype(np.float64) for x in (rewards, values))
            scale += np.abs(r) + 2 * np.abs(v)
            a = r + 0.9 * next_value - v + 0.63 * next_advantage
            assert_met(advantages[:, b, t], here * a, scale)
            assert_met(returns[:, b, t], here * (a + v), scale)
            next_value = np.where(here, v, next_value)
            next_advantage = np.where(here, a, next_advantage)


def test_masked_means_and_whitening():
    rng = np.random.default_rng(4)
    mask = ragged(rng)
    values = spoil(rng, pick(rng, [0, 1, 2, -1, 99.9, 99.9, 1e4], mask.shape), mask)
    found, gradient = value_and_grad(masked_mean, values, mask)
    white = np.asarray(jax.jit(jax.vmap(masked_whiten))(values, mask))
    counts = np.maximum(mask.sum(axis=(1, 2)), 1)
    v = np.where(mask, values, 0).astype(np.float64)
    mean = v.sum(axis=(1, 2)) / counts
    assert_met(found, mean, np.abs(v).sum(axis=(1, 2)))
    assert_met(gradient, mask / counts[:, None, None], 1.0)
    centred = np.where(mask, v - mean[:, None, None], 0)
    variance = (centred**2).sum(axis=(1, 2)) / np.maximum(counts - 1, 1)
    expected = centred / np.sqrt(variance + 1e-8)[:, None, None]
    assert_met(white, expected, 1.0, tolerance=1e-3)
    equal = np.array([len(set(x[m])) < 2 for x, m in zip(values, mask, strict=True)])
    assert equal.sum() > 50 and (white[equal] == 0).all()


# Advantages of groups.


@pytest.mark.parametrize("name", ["group", "batch", "none", "rloo"])
def test_advantages(name):
    rng = np.random.default_rng(5)
    P, G = 2, 4
    rewards = rng.choice([0, 1, 0.1, 99.9, -512.3, 1e7 + 0.25, 1e7 + 0.5, 1e15, -1e18], (N, P, G))
    repeat = rng.random((N, P, 1)) < 0.3
    rewards = np.where(repeat, rewards[:, :, :1], rewards)
    rewards = np.where(rng.random(rewards.shape) < 0.2, np.nan, rewards)
    for draw in rewards[:: 1 if name == "group" else 5]:
        found = ADVANTAGES[name](draw)
        there = draw[~np.isnan(draw)]
        for p in range(P):
            group = draw[p][~np.isnan(draw[p])].astype(np.longdouble)
            for g in range(G):
                r = draw[p, g]
                if np.isnan(r):
                    assert found[p, g] == 0
                    continue
                centred = r - group.mean()
                if (group == r).all():
                    assert found[p, g] == 0  # exactly, however large
                    continue
                if name == "rloo":
                    expected = r - (group.sum() - r) / (len(group) - 1)
                elif name == "none":
                    expected = centred
                else:
                    spread = group if name == "group" else there.astype(np.longdouble)
                    expected = centred / (spread.std(ddof=1) + 1e-4)
                rest = (
                    1e-12 * max(1.0, float(np.abs(group).max()))
                    if name in ("rloo", "none")
                    else 1e-8
                )
                assert abs(found[p, g] - expected) <= 1e-9 * abs(expected) + rest


# Pairs.

BETA, SMOOTHING, GAMMA = 0.1, 0.1, 0.5


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def sigmoid(x):
    return np.exp(log_sigmoid(x))


def log_odds(x):
    x = np.minimum(x, 0)
    held = np.minimum(x, -1e-6)
    return x - np.log(-np.expm1(held))


def ranked(x):
    return np.sort(x, axis=1)


def smoothed(z):
    return -0.9 * log_sigmoid(z) - 0.1 * log_sigmoid(-z)


def discopop(z):
    return sigmoid(-z / 0.05) * -log_sigmoid(z) + np.exp(log_sigmoid(z / 0.05) - z)


# Of chosen and rejected log-probabilities c, r, those of the reference C, R, and the lengths n, m.
PAIR_ORACLES = {
    "sigmoid": lambda c, r, C, R, n, m: (
        -0.9 * log_sigmoid(BETA * (c - C - r + R)) - 0.1 * log_sigmoid(-BETA * (c - C - r + R))
    ),
    "robust": lambda c, r, C, R, n, m: (
        (-0.9 * log_sigmoid(BETA * (c - C - r + R)) + 0.1 * log_sigmoid(-BETA * (c - C - r + R)))
        / 0.8
    ),
    "hinge": lambda c, r, C, R, n, m: np.maximum(0, 1 - BETA * (c - C - r + R)),
    "ipo": lambda c, r, C, R, n, m: ((c - C) / n - (r - R) / m - 1 / (2 * BETA)) ** 2,
    "sigmoid_norm": lambda c, r, C, R, n, m: -log_sigmoid(BETA * ((c - C) / n - (r - R) / m)),
    "apo_zero": lambda c, r, C, R, n, m: sigmoid(-BETA * (c - C)) + sigmoid(BETA * (r - R)),
    "apo_down": lambda c, r, C, R, n, m: sigmoid(BETA * (c - C)) + sigmoid(-BETA * (c - C - r + R)),
    "exo_pair": lambda c, r, C, R, n, m: (
        sigmoid(BETA * (c - C - r + R)) * (log_sigmoid(BETA * (c - C - r + R)) - np.log(0.9))
        + sigmoid(-BETA * (c - C - r + R)) * (log_sigmoid(-BETA * (c - C - r + R)) - np.log(0.1))
    ),
    "nca_pair": lambda c, r, C, R, n, m: (
        -log_sigmoid(BETA * (c - C))
        - 0.5 * log_sigmoid(-BETA * (c - C))
        - 0.5 * log_sigmoid(-BETA * (r - R))
    ),
    "bco_pair": lambda c, r, C, R, n, m: (
        -log_sigmoid(BETA * (c - C)) - log_sigmoid(-BETA * (r - R))
    ),
    "sppo_hard": lambda c, r, C, R, n, m: (c - C - 0.5 / BETA) ** 2 + (r - R + 0.5 / BETA) ** 2,
    "discopop": lambda c, r, C, R, n, m: discopop(BETA * (c - C - r + R)),
    "aot": lambda c, r, C, R, n, m: smoothed(BETA * (ranked(c - r) - ranked(C - R))),
    "aot_unpaired": lambda c, r, C, R, n, m: smoothed(BETA * (ranked(c - C) - ranked(r - R))),
    "sft": lambda c, r, C, R, n, m: -c / n.mean(axis=1, keepdims=True),
    "simpo": lambda c, r, C, R, n, m: -log_sigmoid(BETA * (c / n - r / m) - GAMMA),
    "orpo": lambda c, r, C, R, n, m: -c / n - BETA * log_sigmoid(log_odds(c / n) - log_odds(r / m)),
}


def slope_of(function, arguments, index, h=1e-6):
    """A central difference, as the kinks of these functions are nowhere that is drawn."""
    up, down = (
        function(*(x + d if i == index else x for i, x in enumerate(arguments))) for d in (h, -h)
    )
    return (up - down) / (2 * h)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_preference_losses(name):
    rng = np.random.default_rng(6)
    pairs = 4
    choices = [-1 / 64, -0.5, -3, -11, -30.25, -100, -1000.5, -1e4]
    chosen, rejected, ref_chosen, ref_rejected = (pick(rng, choices, (N, pairs)) for _ in range(4))
    lengths = [rng.integers(1, 6, (N, pairs)).astype(np.float32) for _ in range(2)]

    def loss(chosen, rejected, *others):
        return dpo_loss(
            chosen, rejected, *others[:2], chosen_length=others[2], rejected_length=others[3],
            loss_type=name, beta=BETA, label_smoothing=SMOOTHING, simpo_gamma=GAMMA,
        ).sum()  # fmt: skip

    arrays = (chosen, rejected, ref_chosen, ref_rejected, *lengths)
    found, gradients = value_and_grad(loss, *arrays, argnums=(0, 1))
    wide = [x.astype(np.float64) for x in arrays]
    oracle = PAIR_ORACLES[name]
    losses = oracle(*wide)
    size = sum(np.abs(x) for x in wide[:4])  # what float32 rounds
    scale = (np.abs(losses) + 1e-3 * size).sum(axis=1)
    assert_met(found, losses.sum(axis=1), scale)
    for index in range(2):
        slope, gradient = slope_of(oracle, wide, index), gradients[index]
        if PREFERENCE_LOSSES[name].compares_pairs:  # ties are sorted in any order
            slope, gradient = (x.sum(axis=1, keepdims=True) for x in (slope, gradient))
        rest = np.abs(slope) + 1e-6 * size if name in ("ipo", "sppo_hard") else np.abs(slope) + 1e-2
        assert_met(gradient, slope, rest, tolerance=1e-3)


def test_kto_and_reward_losses():
    rng = np.random.default_rng(7)
    scores, other, margin = (
        pick(rng, [0, 0.5, -0.5, 3, -20, 100, -1000, 1e4], (N, B)) for _ in range(3)
    )
    is_desirable, mask = rng.random((2, N, B)) < 0.5
    z = jax.jit(jax.vmap(kto_reference_point))(spoil(rng, other, mask), mask)
    counts = np.maximum(mask.sum(axis=1), 1)
    expected_z = np.maximum(np.where(mask, other, 0).astype(np.float64).sum(axis=1) / counts, 0)
    assert_met(z, expected_z, np.abs(other).sum(axis=1))

    def kto(scores, kl, is_desirable):
        return kto_loss(scores, kl, is_desirable, desirable_weight=2.0).sum()

    z = expected_z.astype(np.float32)
    found, gradient = value_and_grad(kto, scores, z, is_desirable)
    x = BETA * (scores.astype(np.float64) - z.astype(np.float64)[:, None])
    losses = np.where(is_desirable, 2 * sigmoid(-x), sigmoid(x))
    bell = BETA * sigmoid(x) * sigmoid(-x)
    assert_met(found, losses.sum(axis=1), 1 + np.abs(x).sum(axis=1) * 1e-2)
    assert_met(gradient, np.where(is_desirable, -2 * bell, bell), 1e-2 * (1 + np.abs(x)))

    def bradley_terry(chosen, rejected, margin):
        return bradley_terry_loss(chosen, rejected, margin).sum()

    found, gradient = value_and_grad(bradley_terry, scores, other, margin)
    x = scores.astype(np.float64) - other - margin
    assert_met(found, -log_sigmoid(x).sum(axis=1), np.abs(x).sum(axis=1))
    assert_met(gradient, -sigmoid(-x), 1.0)

    found, gradient = value_and_grad(lambda *a: centering_loss(*a).sum(), scores, other)
    total = scores.astype(np.float64) + other
    assert_met(found, (total**2).sum(axis=1), 1.0)
    assert_met(gradient, 2 * total, np.abs(total))


# From hidden states.

M, D, V = 6, 3, 7


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_cross_entropy_and_log_probabilities(softcap):
    """Whole numbers, whose products and sums float32 holds: logits of up to 12,000."""
    rng = np.random.default_rng(8)
    hidden = pick(rng, [0, 1, -1, 2, -3, 7, 1024, -1024], (N, M, D))
    matrix = pick(rng, [0, 1, -1, 2, -3, 4], (N, V, D))
    targets = np.where(rng.random((N, M)) < 0.3, IGNORED, rng.integers(0, V, (N, M)))
    targets[:50] = IGNORED
    trained = targets != IGNORED
    hidden = spoil(rng, hidden, np.broadcast_to(trained[:, :, None], hidden.shape))

    def nll(hidden, matrix, targets):
        return linear_cross_entropy(hidden, matrix, targets, chunk_size=4, softcap=softcap).loss

    def total(hidden, matrix, targets):
        out = linear_logprobs(hidden, matrix, targets, chunk_size=4, softcap=softcap)
        return -out.logprobs.sum()

    loss, d_hidden, d_matrix = np.zeros(N), np.zeros((N, M, D)), np.zeros((N, V, D))
    wide = matrix.astype(np.float64)
    for m in range(M):
        here = trained[:, m]
        h = np.where(here[:, None], hidden[:, m], 0).astype(np.float64)
        z = np.einsum("nd,nvd->nv", h, wide)
        slope = np.ones_like(z) if softcap is None else 1 - np.tanh(z / softcap) ** 2
        z = z if softcap is None else softcap * np.tanh(z / softcap)
        z = z - z.max(axis=1, keepdims=True)
        logs = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        target = np.where(here, targets[:, m], 0)
        loss -= here * logs[np.arange(N), target]
        d = (np.exp(logs) - np.eye(V)[target]) * slope * here[:, None]
        d_hidden[:, m] = np.einsum("nv,nvd->nd", d, wide)
        d_matrix += np.einsum("nv,nd->nvd", d, h)
    for function in (nll, total):
        found, (by_hidden, by_matrix) = value_and_grad(
            function, hidden, matrix, targets, argnums=(0, 1)
        )
        assert_met(found, loss, 1.0)
        assert_met(by_hidden, d_hidden, 1.0)
        assert_met(
            by_matrix,
            d_matrix,
            np.abs(np.where(trained[:, :, None], hidden, 0)).sum((1, 2))[:, None, None],
        )
