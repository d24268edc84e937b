"""Losses over preferences: pure functions of the log-probabilities of two answers to one prompt.

With s = log π_θ(y) - log π_ref(y) of the chosen (c) and of the rejected (r) answer, Δ = s_c - s_r:

    sigmoid   -(1 - ε) log σ(βΔ) - ε log σ(-βΔ)

`LOSSES` names them all; an own one is registered from anywhere:

    LOSSES["mine"] = Loss(lambda p, o: -o.beta * p.margin)

Axes: N pairs.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

log_sigmoid = jax.nn.log_sigmoid


class Pairs(NamedTuple):
    """`[N]` float32 each: log-probabilities of whole answers (nats) and the answers' tokens.

    Attributes:
      chosen, rejected: under the policy.
      ref_chosen, ref_rejected: under the reference; zeros where a loss needs none.
      chosen_length, rejected_length: tokens, at least 1.
      mean_chosen_length: of all pairs that the loss is the mean of.
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
    """The numbers that losses read.

    Attributes:
      beta: how close to the reference the policy is held, above 0.
      label_smoothing: ε, the share of pairs that are taken to be the wrong way round, in [0, 0.5).
      simpo_gamma: the margin that SimPO asks for, γ.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5


class Loss(NamedTuple):
    """A loss, and what it reads beside the policy's log-probabilities and beta."""

    function: Callable[[Pairs, LossOptions], jax.Array]  # -> [N]
    needs_reference: bool = True
    reads: tuple[str, ...] = ()  # of `LossOptions`, beside beta


def sigmoid(p: Pairs, o: LossOptions) -> jax.Array:
    """-(1 - ε) log σ(βΔ) - ε log σ(-βΔ).

    Rafailov et al., Direct Preference Optimization, 2023, eq. 7; with ε Mitchell, A note on DPO
    with noisy preferences (cDPO), 2023. TRL 1.16 ignores ε here.
    """
    z = o.beta * p.margin
    return -(1 - o.label_smoothing) * log_sigmoid(z) - o.label_smoothing * log_sigmoid(-z)


def robust(p: Pairs, o: LossOptions) -> jax.Array:
    """[-(1 - ε) log σ(βΔ) + ε log σ(-βΔ)] / (1 - 2ε).

    Unbiased where a share ε of the pairs is flipped. Chowdhury et al., Provably robust DPO, 2024.
    """
    z, noise = o.beta * p.margin, o.label_smoothing
    return (-(1 - noise) * log_sigmoid(z) + noise * log_sigmoid(-z)) / (1 - 2 * noise)


def hinge(p: Pairs, o: LossOptions) -> jax.Array:
    """max(0, 1 - βΔ). Zhao et al., SLiC-HF, 2023; Liu et al., RSO, 2023."""
    return jax.nn.relu(1 - o.beta * p.margin)


def ipo(p: Pairs, o: LossOptions) -> jax.Array:
    """(s_c / |y_c| - s_r / |y_r| - 1 / (2β))².

    Azar et al., A General Theoretical Paradigm, 2023, eq. 17, per token as TRL and, by its account,
    the authors have it; the paper's text does not divide by lengths.
    """
    return jnp.square(p.mean_margin - 1 / (2 * o.beta))


def sigmoid_norm(p: Pairs, o: LossOptions) -> jax.Array:
    """-log σ(β (s_c / |y_c| - s_r / |y_r|)): DPO per token, as in Tülu 3, 2024."""
    return -log_sigmoid(o.beta * p.mean_margin)


def apo_zero(p: Pairs, o: LossOptions) -> jax.Array:
    """1 - σ(β s_c) + σ(β s_r): the chosen up, the rejected down.

    D'Oosterlinck et al., Anchored Preference Optimization, 2024, eq. 7.
    """
    return jax.nn.sigmoid(-o.beta * p.chosen_score) + jax.nn.sigmoid(o.beta * p.rejected_score)


def apo_down(p: Pairs, o: LossOptions) -> jax.Array:
    """σ(β s_c) + 1 - σ(βΔ): both down, the rejected more. As above, eq. 8."""
    return jax.nn.sigmoid(o.beta * p.chosen_score) + jax.nn.sigmoid(-o.beta * p.margin)


def exo_pair(p: Pairs, o: LossOptions) -> jax.Array:
    """KL of (σ(βΔ), σ(-βΔ)) from (1 - ε, ε); ε must be above 0.

    Ji et al., Towards Efficient Exact Optimization, 2024, eq. 16.
    """
    z, noise = o.beta * p.margin, o.label_smoothing
    chosen = jax.nn.sigmoid(z) * (log_sigmoid(z) - jnp.log1p(-noise))
    return chosen + jax.nn.sigmoid(-z) * (log_sigmoid(-z) - jnp.log(noise))


def nca_pair(p: Pairs, o: LossOptions) -> jax.Array:
    """-log σ(β s_c) - ½ log σ(-β s_c) - ½ log σ(-β s_r).

    Chen et al., Noise Contrastive Alignment, 2024.
    """
    chosen, rejected = o.beta * p.chosen_score, o.beta * p.rejected_score
    return -log_sigmoid(chosen) - 0.5 * (log_sigmoid(-chosen) + log_sigmoid(-rejected))


def bco_pair(p: Pairs, o: LossOptions) -> jax.Array:
    """-log σ(β s_c) - log σ(-β s_r). Jung et al., Binary Classifier Optimization, 2024."""
    return -log_sigmoid(o.beta * p.chosen_score) - log_sigmoid(-o.beta * p.rejected_score)


def sppo_hard(p: Pairs, o: LossOptions) -> jax.Array:
    """(s_c - ½ / β)² + (s_r + ½ / β)².

    Wu et al., Self-Play Preference Optimization, 2024, eq. 4.7 with P = 1 and 0.
    """
    chosen = jnp.square(p.chosen_score - 0.5 / o.beta)
    return chosen + jnp.square(p.rejected_score + 0.5 / o.beta)


def sft(p: Pairs, o: LossOptions) -> jax.Array:
    """-log π_θ(y_c) / mean |y_c|, whose mean is the chosen answers' loss per token."""
    return -p.chosen / p.mean_chosen_length


def simpo(p: Pairs, o: LossOptions) -> jax.Array:
    """-log σ(β (log π(y_c) / |y_c| - log π(y_r) / |y_r|) - γ), without a reference.

    Meng et al., SimPO, 2024, eq. 6; the paper's β is 2 to 2.5.
    """
    margin = p.chosen / p.chosen_length - p.rejected / p.rejected_length
    return -log_sigmoid(o.beta * margin - o.simpo_gamma)


def orpo(p: Pairs, o: LossOptions) -> jax.Array:
    """-log P(y_c) - β log σ(log odds(y_c) - log odds(y_r)), without a reference.

    With log P = log π(y) / |y| and odds = P / (1 - P). Hong et al., ORPO, 2024, eq. 6.
    """
    chosen, rejected = p.chosen / p.chosen_length, p.rejected / p.rejected_length
    log_odds = (chosen - rejected) - (_log_complement(chosen) - _log_complement(rejected))
    return -chosen - o.beta * log_sigmoid(log_odds)


def _log_complement(x: jax.Array) -> jax.Array:
    """log(1 - eˣ) for x < 0."""
    x = jnp.minimum(x, -1e-6)  # an answer of probability 1 has infinite odds
    return jnp.log(-jnp.expm1(x))


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(sigmoid, reads=("label_smoothing",)),
    "robust": Loss(robust, reads=("label_smoothing",)),
    "hinge": Loss(hinge),
    "ipo": Loss(ipo),
    "sigmoid_norm": Loss(sigmoid_norm),
    "apo_zero": Loss(apo_zero),
    "apo_down": Loss(apo_down),
    "exo_pair": Loss(exo_pair, reads=("label_smoothing",)),
    "nca_pair": Loss(nca_pair),
    "bco_pair": Loss(bco_pair),
    "sppo_hard": Loss(sppo_hard),
    "sft": Loss(sft, needs_reference=False),
    "simpo": Loss(simpo, needs_reference=False, reads=("simpo_gamma",)),
    "orpo": Loss(orpo, needs_reference=False),
}


def kto_loss(
    scores: jax.Array,
    kl: jax.Array,
    is_desirable: jax.Array,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> jax.Array:
    """λ_D (1 - σ(β (s - z))) of good answers, λ_U (1 - σ(β (z - s))) of bad ones.

    Ethayarajh et al., KTO, 2024, eq. 8.

    Args:
      scores: `[N]` s, log π_θ(y) - log π_ref(y) of answers that are good or bad by themselves.
      kl: scalar z, what `kto_reference_point` gives.
      is_desirable: `[N]` bool.

    Returns:
      `[N]`.
    """
    z = jax.lax.stop_gradient(kl)
    good = desirable_weight * jax.nn.sigmoid(-beta * (scores - z))
    return jnp.where(is_desirable, good, undesirable_weight * jax.nn.sigmoid(beta * (scores - z)))


def kto_reference_point(scores: jax.Array, is_real: jax.Array) -> jax.Array:
    """z = max(0, mean s') of answers to other prompts: an estimate of KL(π_θ ‖ π_ref) from below.

    Args:
      scores: `[N]` s' of prompts paired with another row's answer.
      is_real: `[N]` bool: which of them count.
    """
    total = jnp.where(is_real, scores, 0.0).sum()
    return jnp.maximum(total / jnp.maximum(is_real.sum(), 1), 0.0)
