"""Preference losses: functions of the log-probabilities of two completions of one prompt.

With s = log π_θ(y) - log π_ref(y) of the chosen (c) and the rejected (r) completion, Δ = s_c - s_r:

    sigmoid   -(1 - ε) log σ(βΔ) - ε log σ(-βΔ)

`PREFERENCE_LOSSES` has all of them by name. To add your own:

    @register_preference_loss("mine")
    def mine(pairs, options):  # -> [N]
        return -options.beta * pairs.margin

Axes: N pairs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from relax.losses.masked import masked_mean
from relax.losses.registry import Registry
from relax.losses.shapes import require_same_shape

log_sigmoid = jax.nn.log_sigmoid


class Pairs(NamedTuple):
    """Log-probabilities (nats) of whole completions, and their lengths, `[N]` float32 each.

    Attributes:
      chosen, rejected: log-probabilities under the policy.
      ref_chosen, ref_rejected: log-probabilities under the reference; zeros if the loss uses none.
      chosen_length, rejected_length: tokens, at least 1.
      mean_chosen_length: mean over all pairs that the loss is averaged over.
    """

    chosen: jax.Array
    rejected: jax.Array
    ref_chosen: jax.Array
    ref_rejected: jax.Array
    chosen_length: jax.Array
    rejected_length: jax.Array
    mean_chosen_length: jax.Array

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
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5


class PreferenceLoss(NamedTuple):
    """A loss and its inputs, besides the policy's log-probabilities and beta.

    Attributes:
      function: `(Pairs, LossOptions) -> [N]`.
      needs_reference: whether it uses the reference's log-probabilities.
      needs_lengths: whether it uses the numbers of tokens.
      reads: fields of `LossOptions` that it uses besides beta.
    """

    function: Callable[[Pairs, LossOptions], jax.Array]
    needs_reference: bool = True
    needs_lengths: bool = False
    reads: tuple[str, ...] = ()


PREFERENCE_LOSSES: Registry[PreferenceLoss] = Registry("loss_type")


def register_preference_loss(
    name: str,
    *,
    needs_reference: bool = True,
    needs_lengths: bool = False,
    reads: tuple[str, ...] = (),
):
    """Decorator that registers a function of pairs as a `loss_type` of `DPOTrainer` and `dpo_loss`.

    Args:
      name: its name.
      needs_reference, needs_lengths, reads: see `PreferenceLoss`.

    Example:
      >>> @register_preference_loss("margin")
      ... def margin(pairs, options):
      ...     return -options.beta * pairs.margin
      >>> PREFERENCE_LOSSES.pop("margin").function is margin
      True
    """

    def add(function: Callable[[Pairs, LossOptions], jax.Array]):
        PREFERENCE_LOSSES[name] = PreferenceLoss(function, needs_reference, needs_lengths, reads)
        return function

    return add


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
) -> jax.Array:
    """Preference loss of each pair, by default that of DPO:

        L = -log σ(β [(log π_θ(y_c) - log π_ref(y_c)) - (log π_θ(y_r) - log π_ref(y_r))])

    Args:
      chosen, rejected: `[N]` log-probabilities of whole completions under the policy, nats.
      ref_chosen, ref_rejected: `[N]` under the reference; None for losses that use none.
      chosen_length, rejected_length: `[N]` tokens (>= 1), for losses per token.
      loss_type: a name in `PREFERENCE_LOSSES`.
      beta, label_smoothing, simpo_gamma: see `LossOptions`.

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
    return loss.function(pairs, LossOptions(beta, label_smoothing, simpo_gamma))


@register_preference_loss("sigmoid", reads=("label_smoothing",))
def sigmoid(p: Pairs, o: LossOptions) -> jax.Array:
    """-(1 - ε) log σ(βΔ) - ε log σ(-βΔ).

    Rafailov et al., Direct Preference Optimization, 2023, https://arxiv.org/abs/2305.18290, eq. 7;
    with ε: Mitchell, A note on DPO with noisy preferences and relationship to IPO (cDPO), 2023,
    https://ericmitchell.ai/cdpo.pdf. TRL 1.16 ignores ε here.
    """
    z = o.beta * p.margin
    return -(1 - o.label_smoothing) * log_sigmoid(z) - o.label_smoothing * log_sigmoid(-z)


@register_preference_loss("robust", reads=("label_smoothing",))
def robust(p: Pairs, o: LossOptions) -> jax.Array:
    """[-(1 - ε) log σ(βΔ) + ε log σ(-βΔ)] / (1 - 2ε), unbiased if a fraction ε is flipped.

    Chowdhury et al., Provably Robust DPO, 2024, https://arxiv.org/abs/2403.00409, section 3.2
    """
    z, noise = o.beta * p.margin, o.label_smoothing
    return (-(1 - noise) * log_sigmoid(z) + noise * log_sigmoid(-z)) / (1 - 2 * noise)


@register_preference_loss("hinge")
def hinge(p: Pairs, o: LossOptions) -> jax.Array:
    """max(0, 1 - βΔ).

    Zhao et al., SLiC-HF, 2023, https://arxiv.org/abs/2305.10425; Liu et al., Statistical Rejection
    Sampling Improves Preference Optimization (RSO), 2023, https://arxiv.org/abs/2309.06657, eq. 11
    """
    return jax.nn.relu(1 - o.beta * p.margin)


@register_preference_loss("ipo", needs_lengths=True)
def ipo(p: Pairs, o: LossOptions) -> jax.Array:
    """(s_c / |y_c| - s_r / |y_r| - 1 / (2β))².

    Azar et al., A General Theoretical Paradigm to Understand Learning from Human Preferences, 2023,
    https://arxiv.org/abs/2310.12036, eq. 17; per token as in TRL and, by its account, the authors'
    code; the paper's text does not divide by lengths.
    """
    return jnp.square(p.mean_margin - 1 / (2 * o.beta))


@register_preference_loss("sigmoid_norm", needs_lengths=True)
def sigmoid_norm(p: Pairs, o: LossOptions) -> jax.Array:
    """-log σ(β (s_c / |y_c| - s_r / |y_r|)), DPO per token.

    Lambert et al., Tülu 3, 2024, https://arxiv.org/abs/2411.15124, eq. 6
    """
    return -log_sigmoid(o.beta * p.mean_margin)


@register_preference_loss("apo_zero")
def apo_zero(p: Pairs, o: LossOptions) -> jax.Array:
    """1 - σ(β s_c) + σ(β s_r): raises the chosen one, lowers the rejected one.

    D'Oosterlinck et al., Anchored Preference Optimization, 2024, https://arxiv.org/abs/2408.06266,
    eq. 7
    """
    return jax.nn.sigmoid(-o.beta * p.chosen_score) + jax.nn.sigmoid(o.beta * p.rejected_score)


@register_preference_loss("apo_down")
def apo_down(p: Pairs, o: LossOptions) -> jax.Array:
    """σ(β s_c) + 1 - σ(βΔ): lowers both, the rejected one more. As `apo_zero`, eq. 8."""
    return jax.nn.sigmoid(o.beta * p.chosen_score) + jax.nn.sigmoid(-o.beta * p.margin)


@register_preference_loss("exo_pair", reads=("label_smoothing",))
def exo_pair(p: Pairs, o: LossOptions) -> jax.Array:
    """KL of (σ(βΔ), σ(-βΔ)) from (1 - ε, ε); ε must be above 0.

    Ji et al., Towards Efficient Exact Optimization of Language Model Alignment, 2024,
    https://arxiv.org/abs/2402.00856, eq. 16
    """
    z, noise = o.beta * p.margin, o.label_smoothing
    chosen = jax.nn.sigmoid(z) * (log_sigmoid(z) - jnp.log1p(-noise))
    return chosen + jax.nn.sigmoid(-z) * (log_sigmoid(-z) - jnp.log(noise))


@register_preference_loss("nca_pair")
def nca_pair(p: Pairs, o: LossOptions) -> jax.Array:
    """-log σ(β s_c) - ½ log σ(-β s_c) - ½ log σ(-β s_r).

    Chen et al., Noise Contrastive Alignment, 2024, https://arxiv.org/abs/2402.05369
    """
    chosen, rejected = o.beta * p.chosen_score, o.beta * p.rejected_score
    return -log_sigmoid(chosen) - 0.5 * (log_sigmoid(-chosen) + log_sigmoid(-rejected))


@register_preference_loss("bco_pair")
def bco_pair(p: Pairs, o: LossOptions) -> jax.Array:
    """-log σ(β s_c) - log σ(-β s_r).

    Jung et al., Binary Classifier Optimization, 2024, https://arxiv.org/abs/2404.04656
    """
    return -log_sigmoid(o.beta * p.chosen_score) - log_sigmoid(-o.beta * p.rejected_score)


@register_preference_loss("sppo_hard")
def sppo_hard(p: Pairs, o: LossOptions) -> jax.Array:
    """(s_c - ½ / β)² + (s_r + ½ / β)².

    Wu et al., Self-Play Preference Optimization, 2024, https://arxiv.org/abs/2405.00675, eq. 4.7
    with P = 1 and 0
    """
    chosen = jnp.square(p.chosen_score - 0.5 / o.beta)
    return chosen + jnp.square(p.rejected_score + 0.5 / o.beta)


@register_preference_loss("sft", needs_reference=False, needs_lengths=True)
def sft(p: Pairs, o: LossOptions) -> jax.Array:
    """-log π_θ(y_c) / mean |y_c|: its mean is the chosen completions' loss per token."""
    del o
    return -p.chosen / p.mean_chosen_length


@register_preference_loss(
    "simpo", needs_reference=False, needs_lengths=True, reads=("simpo_gamma",)
)
def simpo(p: Pairs, o: LossOptions) -> jax.Array:
    """-log σ(β (log π(y_c) / |y_c| - log π(y_r) / |y_r|) - γ), without a reference.

    Meng et al., SimPO, 2024, https://arxiv.org/abs/2405.14734, eq. 6; the paper's β is 2 to 2.5.
    """
    margin = p.chosen / p.chosen_length - p.rejected / p.rejected_length
    return -log_sigmoid(o.beta * margin - o.simpo_gamma)


@register_preference_loss("orpo", needs_reference=False, needs_lengths=True)
def orpo(p: Pairs, o: LossOptions) -> jax.Array:
    """-log P(y_c) - β log σ(log odds(y_c) - log odds(y_r)), without a reference.

    With log P = log π(y) / |y| and odds = P / (1 - P).

    Hong et al., ORPO, 2024, https://arxiv.org/abs/2403.07691, eq. 6
    """
    chosen, rejected = p.chosen / p.chosen_length, p.rejected / p.rejected_length
    log_odds = (chosen - rejected) - (_log_complement(chosen) - _log_complement(rejected))
    return -chosen - o.beta * log_sigmoid(log_odds)


def _log_complement(x: jax.Array) -> jax.Array:
    """log(1 - eˣ) for x < 0."""
    x = jnp.minimum(x, -1e-6)  # a completion of probability 1 has infinite odds
    return jnp.log(-jnp.expm1(x))


def kto_loss(
    scores: jax.Array,
    kl: jax.Array,
    is_desirable: jax.Array,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> jax.Array:
    """KTO's loss for completions that are individually desirable or undesirable.

        λ_D (1 - σ(β (s - z))) if desirable,   λ_U (1 - σ(β (z - s))) if not

    Args:
      scores: `[N]` s, log π_θ(y) - log π_ref(y), nats.
      kl: scalar z, from `kto_reference_point`; has no gradient.
      is_desirable: `[N]` bool.
      beta: above 0.
      desirable_weight, undesirable_weight: λ_D and λ_U.

    Returns:
      `[N]`, in (0, λ).

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> kto_loss(jnp.array([0.0, 0.0]), jnp.array(0.0), jnp.array([True, False])).tolist()
      [0.5, 0.5]

    References:
      Ethayarajh et al., KTO, 2024, https://arxiv.org/abs/2402.01306, eq. 8
    """
    require_same_shape(1, scores=scores, is_desirable=is_desirable)
    z = jax.lax.stop_gradient(kl)
    good = desirable_weight * jax.nn.sigmoid(-beta * (scores - z))
    return jnp.where(is_desirable, good, undesirable_weight * jax.nn.sigmoid(beta * (scores - z)))


def kto_reference_point(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """KTO's z = max(0, mean s'), an estimate of KL(π_θ ‖ π_ref).

    Args:
      scores: `[N]` s' of prompts paired with another row's completion, nats.
      mask: `[N]` bool, true on rows that count; other entries are ignored.

    Returns:
      A scalar (>= 0), nats.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> kto_reference_point(jnp.array([1.0, 2.0, jnp.nan]), jnp.array([1, 1, 0]) > 0).item()
      1.5

    References:
      As `kto_loss`, section 4.2
    """
    require_same_shape(1, scores=scores, mask=mask)
    return jnp.maximum(masked_mean(scores, mask), 0.0)
