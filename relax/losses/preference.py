"""Preference losses: functions of the log-probabilities of two completions of one prompt.

With s = log π_θ(y) - log π_ref(y) of the chosen (c) and the rejected (r) completion, Δ = s_c - s_r:

    sigmoid   -(1 - ε) log σ(βΔ) - ε log σ(-βΔ)

`PREFERENCE_LOSSES` has all of them by name; they are in `relax.losses.dpo`. To add your own:

    @register_loss("mine", "dpo")
    def mine(pairs, options):  # -> [N]
        return -options.beta * pairs.margin

Axes: N pairs, C tokens of a completion.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from relax.losses.masked import masked_mean
from relax.losses.registry import Registry
from relax.losses.shapes import require_same_shape

MAX_EXPONENT = 80.0  # e^80 is finite in float32; TRL bounds its α-divergence's exponent there too


class Pairs(NamedTuple):
    """Log-probabilities (nats) of whole completions, and their lengths, `[N]` float32 each.

    Attributes:
      chosen, rejected: log-probabilities under the policy.
      ref_chosen, ref_rejected: log-probabilities under the reference; zeros if the loss uses none.
      chosen_length, rejected_length: tokens, at least 1.
      mean_chosen_length: mean over all pairs that the loss is averaged over.
      mask: bool, true on pairs that count; None: all. For losses that compare pairs.
    """

    chosen: jax.Array
    rejected: jax.Array
    ref_chosen: jax.Array
    ref_rejected: jax.Array
    chosen_length: jax.Array
    rejected_length: jax.Array
    mean_chosen_length: jax.Array
    mask: jax.Array | None = None

    @property
    def chosen_score(self) -> jax.Array:
        """s_c."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_score(self) -> jax.Array:
        """s_r."""
        return self.rejected - self.ref_rejected

    @property
    def margin(self) -> jax.Array:
        """Δ."""
        return self.chosen_score - self.rejected_score

    @property
    def mean_margin(self) -> jax.Array:
        """s_c / |y_c| - s_r / |y_r|."""
        chosen = self.chosen_score / self.chosen_length
        return chosen - self.rejected_score / self.rejected_length


class LossOptions(NamedTuple):
    """Hyperparameters of the preference losses.

    Attributes:
      beta: strength of the KL constraint, above 0.
      label_smoothing: ε, assumed fraction of pairs with swapped labels, in [0, 0.5).
      simpo_gamma: γ, SimPO's target margin.
      discopop_tau: τ of DiscoPOP, in (0, 1).
      f_divergence_type: a name in `DIVERGENCES`, that the policy is kept near the reference by.
      f_alpha_divergence_coef: α of `alpha_divergence`, not 1.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    discopop_tau: float = 0.05
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5


# f' of the ratio u = π_θ / π_ref as a function of s = log u and α. The constants in which they
# differ from the papers' cancel in Δ.
# Wang et al., Beyond Reverse KL: Generalizing DPO with Diverse Divergence Constraints, 2023,
# https://arxiv.org/abs/2309.16240, table 1; α as in TRL: (u^(α - 1) - 1) / (α - 1)
DIVERGENCES: Registry[Callable[[jax.Array, float], jax.Array]] = Registry("f_divergence_type")


@DIVERGENCES.register("reverse_kl")
def reverse_kl(s: jax.Array, alpha: float) -> jax.Array:
    """log u, as in DPO."""
    del alpha
    return s


@DIVERGENCES.register("forward_kl")
def forward_kl(s: jax.Array, alpha: float) -> jax.Array:
    """1 - 1 / u."""
    del alpha
    return 1 - jnp.exp(jnp.minimum(-s, MAX_EXPONENT))


@DIVERGENCES.register("js_divergence")
def js_divergence(s: jax.Array, alpha: float) -> jax.Array:
    """log(2 u / (u + 1))."""
    del alpha
    return math.log(2) + jax.nn.log_sigmoid(s)


@DIVERGENCES.register("alpha_divergence")
def alpha_divergence(s: jax.Array, alpha: float) -> jax.Array:
    """(u^(α - 1) - 1) / (α - 1); the limit for α = 1 is reverse_kl."""
    return jnp.expm1(jnp.minimum((alpha - 1) * s, MAX_EXPONENT)) / (alpha - 1)


class PreferenceLoss(NamedTuple):
    """A loss and its inputs, besides the policy's log-probabilities and beta.

    Attributes:
      function: `(Pairs, LossOptions) -> [N]`.
      needs_reference: whether it uses the reference's log-probabilities.
      needs_lengths: whether it uses the numbers of tokens.
      reads: fields of `LossOptions` that it uses besides beta.
      any_divergence: whether it is defined for every f-divergence; its scores are then f'(u).
      compares_pairs: whether the loss of a pair depends on the others.
    """

    function: Callable[[Pairs, LossOptions], jax.Array]
    needs_reference: bool = True
    needs_lengths: bool = False
    reads: tuple[str, ...] = ()
    any_divergence: bool = False
    compares_pairs: bool = False

    def __call__(self, pairs: Pairs, options: LossOptions) -> jax.Array:
        """The loss of each pair, `[N]`, with the scores of `f_divergence_type`."""
        if self.any_divergence:
            of_score = DIVERGENCES[options.f_divergence_type]
            alpha, zeros = options.f_alpha_divergence_coef, jnp.zeros_like(pairs.chosen)
            pairs = pairs._replace(
                chosen=of_score(pairs.chosen_score, alpha),
                rejected=of_score(pairs.rejected_score, alpha),
                ref_chosen=zeros,
                ref_rejected=zeros,
            )
        return self.function(pairs, options)


PREFERENCE_LOSSES: Registry[PreferenceLoss] = Registry("loss_type", PreferenceLoss)


def dpo_loss(
    chosen: jax.Array,
    rejected: jax.Array,
    ref_chosen: jax.Array | None = None,
    ref_rejected: jax.Array | None = None,
    *,
    chosen_length: jax.Array | None = None,
    rejected_length: jax.Array | None = None,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.5,
    discopop_tau: float = 0.05,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> jax.Array:
    """Preference loss of each pair, by default that of DPO:

        L = -log σ(β [(log π_θ(y_c) - log π_ref(y_c)) - (log π_θ(y_r) - log π_ref(y_r))])

    Args:
      chosen, rejected: `[N]` log-probabilities of whole completions under the policy, nats.
      ref_chosen, ref_rejected: `[N]` under the reference; None for losses that use none.
      chosen_length, rejected_length: `[N]` tokens (>= 1), for losses per token.
      loss_type: a name in `PREFERENCE_LOSSES`.
      beta, label_smoothing, simpo_gamma, discopop_tau, f_divergence_type, f_alpha_divergence_coef:
        see `LossOptions`.

    Returns:
      `[N]`, log 2 if policy and reference agree; `DPOTrainer` minimises its mean.

    Raises:
      ValueError: the loss is unknown, an argument that it needs is None, or the shapes differ.

    Example:
      >>> loss = dpo_loss(*(jnp.array([x]) for x in (-10.0, -11.0, -10.5, -10.0)))
      >>> round(loss.item(), 4)  # Δ = 1.5
      0.621

    References:
      Rafailov et al., Direct Preference Optimization, 2023, https://arxiv.org/abs/2305.18290, eq. 7
    """
    loss = PREFERENCE_LOSSES[loss_type]
    read: dict[str, Any] = {"chosen": chosen, "rejected": rejected}
    if loss.needs_reference:
        read |= {"ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
    if loss.needs_lengths:
        read |= {"chosen_length": chosen_length, "rejected_length": rejected_length}
    if missing := [name for name, value in read.items() if value is None]:
        raise ValueError(f"loss_type {loss_type!r} reads {', '.join(missing)}, got None.")
    require_same_shape(1, **read)
    zeros, ones = jnp.zeros_like(chosen), jnp.ones_like(chosen)
    pairs = Pairs(
        chosen,
        rejected,
        read.get("ref_chosen", zeros),
        read.get("ref_rejected", zeros),
        read.get("chosen_length", ones),
        read.get("rejected_length", ones),
        jnp.full_like(chosen, jnp.mean(read.get("chosen_length", ones))),
    )
    options = LossOptions(
        beta, label_smoothing, simpo_gamma, discopop_tau, f_divergence_type, f_alpha_divergence_coef
    )
    check_divergence(loss_type, options)
    return loss(pairs, options)


def check_divergence(name: str, options: LossOptions) -> None:
    """Refuses a divergence that a loss is not defined for.

    Raises:
      ValueError: the divergence is unknown, α is 1, or the loss is for reverse_kl only.
    """
    kind, loss = options.f_divergence_type, PREFERENCE_LOSSES[name]
    DIVERGENCES[kind]
    if kind != "reverse_kl" and loss.needs_reference and not loss.any_divergence:
        able = [n for n, other in PREFERENCE_LOSSES.items() if other.any_divergence]
        raise ValueError(
            f"f_divergence_type {kind!r} is defined for {', '.join(able)}, got loss_type {name!r}."
        )
    if kind == "alpha_divergence" and abs(options.f_alpha_divergence_coef - 1) < 1e-6:
        raise ValueError(
            "f_alpha_divergence_coef must not be 1, the limit of which is f_divergence_type "
            "reverse_kl: use that."
        )


def ld_weights(lengths: jax.Array, width: int, alpha: float) -> jax.Array:
    """LD-DPO's weights of tokens: 1 up to the length of the shorter completion, then α.

    A longer completion has more log-probability to gain or lose; α below 1 reduces that bias.

    Args:
      lengths: `[N, 2]` tokens of the two completions.
      width: C.
      alpha: α, in [0, 1].

    Returns:
      `[N, 2, C]`, by which to multiply log-probabilities per token before they are summed.

    Raises:
      ValueError: `lengths` does not have two axes.

    Example:
      >>> ld_weights(jnp.array([[1, 3]]), 3, 0.5).tolist()
      [[[1.0, 0.5, 0.5], [1.0, 0.5, 0.5]]]

    References:
      Liu et al., Length Desensitization in Direct Preference Optimization, 2024,
      https://arxiv.org/abs/2409.06411, eq. 11
    """
    require_same_shape(2, lengths=lengths)
    shared = jnp.arange(width)[None, :] < lengths.min(axis=1, keepdims=True)  # [N, C]
    weights = jnp.where(shared, 1.0, alpha)[:, None, :]
    return jnp.broadcast_to(weights, (*lengths.shape, width))


def wpo_weights(logprobs: jax.Array, collision: jax.Array, mask: jax.Array) -> jax.Array:
    """WPO's weights of pairs: how likely the policy is to write their completions.

        w = w(y_c) w(y_r),   w(y) = exp(mean_t (log π_θ(y_t) - log Σ_v π_θ(v)²))

    Pairs that the policy would write itself count more: off-policy data is made to look on-policy.

    Args:
      logprobs: `[N, 2, C]` of the tokens, nats; the result has no gradient.
      collision: `[N, 2, C]` log Σ_v π_θ(v)², see `linear_collision`.
      mask: `[N, 2, C]` bool, true on tokens; other entries are ignored.

    Returns:
      `[N]`.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> half = jnp.log(jnp.full((1, 2, 1), 0.5))  # a token as likely as a draw from π_θ
      >>> wpo_weights(half, half, jnp.ones((1, 2, 1), bool)).tolist()
      [1.0]

    References:
      Zhou et al., WPO: Enhancing RLHF with Weighted Preference Optimization, 2024,
      https://arxiv.org/abs/2406.11827, eq. 2 and section 3.2 (alignment by sampled tokens); as TRL
    """
    require_same_shape(3, logprobs=logprobs, collision=collision, mask=mask)
    aligned = jnp.where(mask, logprobs, 0.0) - jnp.where(mask, collision, 0.0)
    means = masked_mean(aligned, mask, axis=2)  # [N, 2]
    return jax.lax.stop_gradient(jnp.exp(means.sum(axis=1)))
