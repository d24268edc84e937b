"""The losses of policy optimisation that a `loss_type` of GRPO names, per token.

With ρ = π_θ / π_old and advantages Â; sg stops the gradient. Each is an `Objective`: a function of
`Tokens` and `PolicyOptions` to losses `[B, T]`. `relax.losses.policy` aggregates them.

Axes: B completions, T tokens of a completion.
"""

import jax
import jax.numpy as jnp

from relax.losses.masked import masked_mean
from relax.losses.policy import LOSS_TYPES, PolicyOptions, Tokens
from relax.losses.ratios import bounded_exp, log_interval, ratio_interval

sg = jax.lax.stop_gradient
MAX_WEIGHT = 20.0  # of an importance weight without a gradient in DPPO, as in verl
MIN_SEQUENCE_RATIO = 1e-8  # in VESPO, as in its authors' code


def clipped(t: Tokens, o: PolicyOptions) -> jax.Array:
    """-min(ρ Â, clip(ρ, 1 - low, 1 + high) Â).

    Schulman et al., PPO, 2017, https://arxiv.org/abs/1707.06347, eq. 7
    """
    bounded = t.ratio if o.clip.delta is None else jnp.minimum(t.ratio, o.clip.delta)
    inside = jnp.clip(t.ratio, *ratio_interval(o.clip))
    return -jnp.minimum(bounded * t.advantages, inside * t.advantages)


# TRL's bnpo divides by the tokens of a micro-batch and its dapo by those of a generation; here both
# divide by those of the update and are the same.
for _name, _aggregation in {
    "dapo": "token_mean",
    "grpo": "sequence_mean",
    "bnpo": "token_mean",
    "dr_grpo": "constant_mean",
}.items():
    LOSS_TYPES.register(
        _name,
        aggregation=_aggregation,
        reads=("epsilon", "epsilon_high", "delta"),
        vanishes=True,
        interval=ratio_interval,
    )(clipped)
# A completion's one ratio, times its length: long completions are not shortened by the mean.
# LUSPO, 2026, https://arxiv.org/abs/2602.05261
LOSS_TYPES.register(
    "luspo",
    aggregation="sequence_sum",
    level="sequence",
    reads=("epsilon", "epsilon_high", "delta"),
    vanishes=True,
    interval=ratio_interval,
)(clipped)


@LOSS_TYPES.register(
    "cispo", reads=("epsilon", "epsilon_high"), vanishes=True, interval=ratio_interval
)
def cispo(t: Tokens, o: PolicyOptions) -> jax.Array:
    """-sg(clip(ρ, 1 - low, 1 + high)) Â log π_θ: no token loses its gradient.

    MiniMax, MiniMax-M1, 2025, https://arxiv.org/abs/2506.13585, eq. 4 and 5. TRL's bound is
    `epsilon_high` itself: `cispo_absolute`.
    """
    return -sg(jnp.clip(t.ratio, *ratio_interval(o.clip))) * t.advantages * t.logprobs


@LOSS_TYPES.register(
    "cispo_absolute", reads=("epsilon_high",), vanishes=True, interval=ratio_interval
)
def cispo_absolute(t: Tokens, o: PolicyOptions) -> jax.Array:
    """-sg(min(ρ, high)) Â log π_θ, as in TRL: `high` is the bound itself, such as 5."""
    return -sg(jnp.minimum(t.ratio, o.clip.high)) * t.advantages * t.logprobs


@LOSS_TYPES.register(
    "sapo",
    aggregation="sequence_mean",
    reads=("sapo_temperature_pos", "sapo_temperature_neg"),
    vanishes=True,
)
def sapo(t: Tokens, o: PolicyOptions) -> jax.Array:
    """-(4 / τ) σ(τ (ρ - 1)) Â, with τ_pos where Â > 0, else τ_neg: a soft gate, not a clip.

    The gradient with respect to ρ is that of ρ Â at ρ = 1 and decays on both sides.

    Soft Adaptive Policy Optimization (SAPO), 2025, https://arxiv.org/abs/2511.20347
    """
    tau = jnp.where(t.advantages > 0, o.sapo_temperature_pos, o.sapo_temperature_neg)
    return -(4 / tau) * jax.nn.sigmoid(tau * (t.ratio - 1)) * t.advantages


@LOSS_TYPES.register(
    "vespo",
    level="trajectory",
    reads=("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
    vanishes=True,
)
def vespo(t: Tokens, o: PolicyOptions) -> jax.Array:
    """-sg(φ(w)) Â log π_θ,  φ(w) = w^k e^(λ (1 - w)),  w = Π ρ of the completion.

    (k, λ) is (k_pos, λ_pos) where Â >= 0, else (k_neg, λ_neg); φ(1) = 1.

    VESPO: Variational Sequence-Level Soft Policy Optimization, 2026,
    https://arxiv.org/abs/2602.10693
    """
    good, w = t.advantages >= 0, sg(jnp.maximum(t.ratio, MIN_SEQUENCE_RATIO))
    k = jnp.where(good, o.vespo_k_pos, o.vespo_k_neg)
    rate = jnp.where(good, o.vespo_lambda_pos, o.vespo_lambda_neg)
    return -jnp.exp(k * jnp.log(w) + rate * (1 - w)) * t.advantages * t.logprobs


@LOSS_TYPES.register(
    "gmpo",
    aggregation="sequence_mean",
    level="token",
    reads=("epsilon", "epsilon_high"),
    vanishes=True,
    interval=log_interval,
)
def gmpo(t: Tokens, o: PolicyOptions) -> jax.Array:
    """-(Π_t ρ'_t)^(1 / |y|) Â: the geometric mean of ratios clipped to [e^-low, e^high].

    As in PPO, a ratio is clipped only on the side to which Â moves it. The paper's low and high
    are 0.4.

    Zhao et al., Geometric-Mean Policy Optimization, 2025, https://arxiv.org/abs/2507.20673
    """
    log_ratio = t.logprobs - t.old_logprobs
    inside = jnp.clip(log_ratio, -o.clip.low, o.clip.high)
    held = jnp.where(
        t.advantages > 0, jnp.minimum(log_ratio, inside), jnp.maximum(log_ratio, inside)
    )
    return -bounded_exp(masked_mean(held, t.mask, axis=1))[:, None] * t.advantages


def _trusted(t: Tokens, outside: jax.Array) -> jax.Array:
    """-sg(min(ρ, 20)) Â log π_θ, 0 for tokens `outside` the trust region."""
    weight = sg(jnp.minimum(t.ratio, MAX_WEIGHT))
    return jnp.where(outside, 0.0, -weight * t.advantages * t.logprobs)


@LOSS_TYPES.register("dppo_tv", level="token", reads=("epsilon", "epsilon_high"), vanishes=True)
def dppo_tv(t: Tokens, o: PolicyOptions) -> jax.Array:
    """-sg(min(ρ, 20)) Â log π_θ, 0 where π_θ - π_old > high (Â > 0) or < -low (Â <= 0).

    The bound is on the probability, not on its ratio: rare tokens may move by large factors. The
    paper's low and high are 0.15.

    Rethinking the Trust Region in LLM Reinforcement Learning (DPPO-Binary-TV), 2026,
    https://arxiv.org/abs/2602.04879; as verl's `dppo_tv`
    """
    moved = jnp.exp(t.logprobs) - jnp.exp(t.old_logprobs)
    return _trusted(t, jnp.where(t.advantages > 0, moved > o.clip.high, moved < -o.clip.low))


@LOSS_TYPES.register("dppo_kl", level="token", reads=("epsilon", "epsilon_high"), vanishes=True)
def dppo_kl(t: Tokens, o: PolicyOptions) -> jax.Array:
    """As `dppo_tv`, with a bound on the KL of (token, any other) where π_θ moves away from π_old.

        KL = π_old log(π_old / π_θ) + (1 - π_old) log((1 - π_old) / (1 - π_θ)) > high or low

    The paper's low and high are 0.05. As verl's `dppo_kl`, with its 1e-8 in the second logarithm.
    """
    p, old = jnp.exp(t.logprobs), jnp.exp(t.old_logprobs)
    # Rounding may leave a probability just above 1.
    rest = jnp.log((jnp.maximum(1 - old, 0) + 1e-8) / (jnp.maximum(1 - p, 0) + 1e-8))
    kl = old * (t.old_logprobs - t.logprobs) + (1 - old) * rest
    above = (kl > o.clip.high) & (p > old)
    return _trusted(t, jnp.where(t.advantages > 0, above, (kl > o.clip.low) & (p < old)))


@LOSS_TYPES.register("gpg", level="token", vanishes=True)
def gpg(t: Tokens, o: PolicyOptions) -> jax.Array:
    """-Â log π_θ: the plain policy gradient, without a ratio.

    Chu et al., GPG: A Simple and Strong Reinforcement Learning Baseline for Model Reasoning, 2025,
    https://arxiv.org/abs/2504.02546
    """
    del o
    return -t.advantages * t.logprobs


def _covariance(t: Tokens) -> jax.Array:
    """(Â - mean Â) (log π_θ - mean log π_θ) per token, means over the batch; no gradient."""
    A = jnp.broadcast_to(t.advantages, t.mask.shape)
    return sg((A - masked_mean(A, t.mask)) * (t.logprobs - masked_mean(t.logprobs, t.mask)))


def _first(count: jax.Array, values: jax.Array, where: jax.Array) -> jax.Array:
    """`[B, T]` bool: the `count` smallest values among those `where` is true."""
    order = jnp.argsort(jnp.where(where, values, jnp.inf).reshape(-1))
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.size)).reshape(where.shape)
    return where & (rank < count)


def _share(ratio: float, mask: jax.Array) -> jax.Array:
    """`ratio` of the tokens, rounded down, at least 1."""
    return jnp.maximum(jnp.floor(ratio * mask.sum()), 1)


@LOSS_TYPES.register(
    "clip_cov",
    level="token",
    reads=("epsilon", "epsilon_high", "clip_cov_ratio", "clip_cov_lb", "clip_cov_ub"),
    interval=ratio_interval,
)
def clip_cov(t: Tokens, o: PolicyOptions) -> jax.Array:
    """-min(ρ Â, clip(ρ) Â), 0 for a random share of the tokens of high covariance.

    Up to `clip_cov_ratio` of all tokens are drawn from those that the clip leaves, and whose
    covariance (Â - mean Â) (log π_θ - mean log π_θ) is between `clip_cov_lb` and `clip_cov_ub`:
    they are what lowers the entropy. Means are over the micro-batch.

    Cui et al., The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models, 2025,
    https://arxiv.org/abs/2505.22617, section 4.2
    """
    if t.key is None:
        raise ValueError("loss_type 'clip_cov' draws tokens at random: pass key, got None.")
    free, inside = t.ratio * t.advantages, jnp.clip(t.ratio, *ratio_interval(o.clip)) * t.advantages
    covariance = _covariance(t)
    drawn_from = (covariance > o.clip_cov_lb) & (covariance < o.clip_cov_ub)
    drawn_from &= t.mask & (inside >= free)
    noise = jax.random.uniform(t.key, t.mask.shape)
    dropped = _first(_share(o.clip_cov_ratio, t.mask), noise, drawn_from)
    return jnp.where(dropped, 0.0, -jnp.minimum(free, inside))


@LOSS_TYPES.register("kl_cov", level="token", reads=("kl_cov_ratio", "kl_cov_coef"))
def kl_cov(t: Tokens, o: PolicyOptions) -> jax.Array:
    """-ρ Â, plus c |log ρ| for the share of tokens with the highest covariance.

    `kl_cov_ratio` of the tokens, at least one; the covariance is that of `clip_cov`.

    As `clip_cov`, section 4.3
    """
    chosen = _first(_share(o.kl_cov_ratio, t.mask), -_covariance(t), t.mask)
    log_ratio = t.logprobs - t.old_logprobs
    # |x| as x sign(x): at 0, where every token of a first update is, abs has the gradient 1.
    penalty = o.kl_cov_coef * log_ratio * sg(jnp.sign(log_ratio))
    return -t.ratio * t.advantages + jnp.where(chosen, penalty, 0.0)
