"""The losses that a `loss_type` of DPO names, see `relax.losses.preference`.

With s = log π_θ(y) - log π_ref(y) of the chosen (c) and the rejected (r) completion, Δ = s_c - s_r
and |y| tokens. Each is a function of `Pairs` and `LossOptions` to losses `[N]`.

Axes: N pairs.
"""

import jax
import jax.numpy as jnp

from relax.losses.preference import PREFERENCE_LOSSES, LossOptions, Pairs

log_sigmoid = jax.nn.log_sigmoid


@PREFERENCE_LOSSES.register("sigmoid", reads=("label_smoothing",), any_divergence=True)
def sigmoid(p: Pairs, o: LossOptions) -> jax.Array:
    """-(1 - ε) log σ(βΔ) - ε log σ(-βΔ).

    Rafailov et al., Direct Preference Optimization, 2023, https://arxiv.org/abs/2305.18290, eq. 7;
    with ε: Mitchell, A note on DPO with noisy preferences and relationship to IPO (cDPO), 2023,
    https://ericmitchell.ai/cdpo.pdf. TRL 1.16 ignores ε here.
    """
    return _smoothed(o.beta * p.margin, o.label_smoothing)


@PREFERENCE_LOSSES.register("robust", reads=("label_smoothing",), any_divergence=True)
def robust(p: Pairs, o: LossOptions) -> jax.Array:
    """[-(1 - ε) log σ(βΔ) + ε log σ(-βΔ)] / (1 - 2ε), unbiased if a fraction ε is flipped.

    Chowdhury et al., Provably Robust DPO, 2024, https://arxiv.org/abs/2403.00409, section 3.2
    """
    z, noise = o.beta * p.margin, o.label_smoothing
    return (-(1 - noise) * log_sigmoid(z) + noise * log_sigmoid(-z)) / (1 - 2 * noise)


@PREFERENCE_LOSSES.register("hinge", any_divergence=True)
def hinge(p: Pairs, o: LossOptions) -> jax.Array:
    """max(0, 1 - βΔ).

    Zhao et al., SLiC-HF, 2023, https://arxiv.org/abs/2305.10425; Liu et al., Statistical Rejection
    Sampling Improves Preference Optimization (RSO), 2023, https://arxiv.org/abs/2309.06657, eq. 11
    """
    return jax.nn.relu(1 - o.beta * p.margin)


@PREFERENCE_LOSSES.register("ipo", needs_lengths=True, any_divergence=True)
def ipo(p: Pairs, o: LossOptions) -> jax.Array:
    """(s_c / |y_c| - s_r / |y_r| - 1 / (2β))².

    Azar et al., A General Theoretical Paradigm to Understand Learning from Human Preferences, 2023,
    https://arxiv.org/abs/2310.12036, eq. 17; per token as in TRL and, by its account, the authors'
    code; the paper's text does not divide by lengths.
    """
    return jnp.square(p.mean_margin - 1 / (2 * o.beta))


@PREFERENCE_LOSSES.register("sigmoid_norm", needs_lengths=True, any_divergence=True)
def sigmoid_norm(p: Pairs, o: LossOptions) -> jax.Array:
    """-log σ(β (s_c / |y_c| - s_r / |y_r|)), DPO per token.

    Lambert et al., Tülu 3, 2024, https://arxiv.org/abs/2411.15124, eq. 6
    """
    return -log_sigmoid(o.beta * p.mean_margin)


@PREFERENCE_LOSSES.register("apo_zero")
def apo_zero(p: Pairs, o: LossOptions) -> jax.Array:
    """1 - σ(β s_c) + σ(β s_r): raises the chosen one, lowers the rejected one.

    D'Oosterlinck et al., Anchored Preference Optimization, 2024, https://arxiv.org/abs/2408.06266,
    eq. 7
    """
    return jax.nn.sigmoid(-o.beta * p.chosen_score) + jax.nn.sigmoid(o.beta * p.rejected_score)


@PREFERENCE_LOSSES.register("apo_down")
def apo_down(p: Pairs, o: LossOptions) -> jax.Array:
    """σ(β s_c) + 1 - σ(βΔ): lowers both, the rejected one more. As `apo_zero`, eq. 8."""
    return jax.nn.sigmoid(o.beta * p.chosen_score) + jax.nn.sigmoid(-o.beta * p.margin)


@PREFERENCE_LOSSES.register("exo_pair", reads=("label_smoothing",), any_divergence=True)
def exo_pair(p: Pairs, o: LossOptions) -> jax.Array:
    """KL of (σ(βΔ), σ(-βΔ)) from (1 - ε, ε); ε must be above 0.

    Ji et al., Towards Efficient Exact Optimization of Language Model Alignment, 2024,
    https://arxiv.org/abs/2402.00856, eq. 16
    """
    z, noise = o.beta * p.margin, o.label_smoothing
    chosen = jax.nn.sigmoid(z) * (log_sigmoid(z) - jnp.log1p(-noise))
    return chosen + jax.nn.sigmoid(-z) * (log_sigmoid(-z) - jnp.log(noise))


@PREFERENCE_LOSSES.register("nca_pair")
def nca_pair(p: Pairs, o: LossOptions) -> jax.Array:
    """-log σ(β s_c) - ½ log σ(-β s_c) - ½ log σ(-β s_r).

    Chen et al., Noise Contrastive Alignment, 2024, https://arxiv.org/abs/2402.05369
    """
    chosen, rejected = o.beta * p.chosen_score, o.beta * p.rejected_score
    return -log_sigmoid(chosen) - 0.5 * (log_sigmoid(-chosen) + log_sigmoid(-rejected))


@PREFERENCE_LOSSES.register("bco_pair")
def bco_pair(p: Pairs, o: LossOptions) -> jax.Array:
    """-log σ(β s_c) - log σ(-β s_r).

    Jung et al., Binary Classifier Optimization, 2024, https://arxiv.org/abs/2404.04656
    """
    return -log_sigmoid(o.beta * p.chosen_score) - log_sigmoid(-o.beta * p.rejected_score)


@PREFERENCE_LOSSES.register("sppo_hard")
def sppo_hard(p: Pairs, o: LossOptions) -> jax.Array:
    """(s_c - ½ / β)² + (s_r + ½ / β)².

    Wu et al., Self-Play Preference Optimization, 2024, https://arxiv.org/abs/2405.00675, eq. 4.7
    with P = 1 and 0
    """
    chosen = jnp.square(p.chosen_score - 0.5 / o.beta)
    return chosen + jnp.square(p.rejected_score + 0.5 / o.beta)


@PREFERENCE_LOSSES.register("discopop", reads=("discopop_tau",), any_divergence=True)
def discopop(p: Pairs, o: LossOptions) -> jax.Array:
    """-(1 - m) log σ(βΔ) + m e^(-βΔ),  m = σ(βΔ / τ): exponential for pairs in the right order.

    Lu et al., Discovering Preference Optimization Algorithms with and for Large Language Models,
    2024, https://arxiv.org/abs/2406.08414, eq. 5
    """
    z = o.beta * p.margin
    # As one exponential: for z of -100 the factors are 0 and infinity.
    exponential = jnp.exp(log_sigmoid(z / o.discopop_tau) - z)
    return -jax.nn.sigmoid(-z / o.discopop_tau) * log_sigmoid(z) + exponential


@PREFERENCE_LOSSES.register("aot", reads=("label_smoothing",), compares_pairs=True)
def aot(p: Pairs, o: LossOptions) -> jax.Array:
    """As `sigmoid`, with Δ the difference of the i-th smallest log-ratios of policy and reference.

    With log π(y_c) - log π(y_r) of the policy and of the reference, each sorted over the pairs of
    the micro-batch: the policy's distribution of margins is to dominate the reference's.

    Melnyk et al., Distributional Preference Alignment of LLMs via Optimal Transport, 2024,
    https://arxiv.org/abs/2406.05882
    """
    delta = _quantile_margin(p.chosen - p.rejected, p.ref_chosen - p.ref_rejected, p.mask)
    return _smoothed(o.beta * delta, o.label_smoothing)


@PREFERENCE_LOSSES.register("aot_unpaired", reads=("label_smoothing",), compares_pairs=True)
def aot_unpaired(p: Pairs, o: LossOptions) -> jax.Array:
    """As `aot`, with Δ the difference of the i-th smallest s_c and s_r: the prompts may differ."""
    delta = _quantile_margin(p.chosen_score, p.rejected_score, p.mask)
    return _smoothed(o.beta * delta, o.label_smoothing)


@PREFERENCE_LOSSES.register("sft", needs_reference=False, needs_lengths=True)
def sft(p: Pairs, o: LossOptions) -> jax.Array:
    """-log π_θ(y_c) / mean |y_c|: its mean is the chosen completions' loss per token."""
    del o
    return -p.chosen / p.mean_chosen_length


@PREFERENCE_LOSSES.register(
    "simpo", needs_reference=False, needs_lengths=True, reads=("simpo_gamma",)
)
def simpo(p: Pairs, o: LossOptions) -> jax.Array:
    """-log σ(β (log π(y_c) / |y_c| - log π(y_r) / |y_r|) - γ), without a reference.

    Meng et al., SimPO, 2024, https://arxiv.org/abs/2405.14734, eq. 6; the paper's β is 2 to 2.5.
    """
    margin = p.chosen / p.chosen_length - p.rejected / p.rejected_length
    return -log_sigmoid(o.beta * margin - o.simpo_gamma)


@PREFERENCE_LOSSES.register("orpo", needs_reference=False, needs_lengths=True)
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


def _smoothed(z: jax.Array, noise: float) -> jax.Array:
    """-(1 - ε) log σ(z) - ε log σ(-z)."""
    return -(1 - noise) * log_sigmoid(z) - noise * log_sigmoid(-z)


def _quantile_margin(x: jax.Array, y: jax.Array, mask: jax.Array | None) -> jax.Array:
    """`[N]`: each x minus the y of the same rank, 0 where masked."""
    mask = jnp.ones(x.shape, bool) if mask is None else mask
    order = jnp.argsort(jnp.where(mask, x, jnp.inf))  # masked ones come last, in both
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.size))
    partner = jnp.sort(jnp.where(mask, y, jnp.inf))[rank]
    # Masked before the difference: infinity would be NaN in the gradient.
    return jnp.where(mask, x, 0.0) - jnp.where(mask, partner, 0.0)
