"""Losses, advantages and KL estimators as pure functions of arrays.

Each can be called on its own:

    from relax.losses import group_advantages, policy_loss

    advantages = group_advantages(rewards).reshape(-1)        # [P, G] -> [B]
    loss, weight, ratio = policy_loss(logprobs, old_logprobs, advantages, mask)

Named choices are in registries, to which you can add your own: `register_loss`,
`register_advantage`, `register_kl_estimator`. A function in a file needs no registration: its name
is `path/to/file.py:name`.
"""

from relax.losses import dpo as dpo  # these two register the losses
from relax.losses import objectives as objectives
from relax.losses.advantages import (
    ADVANTAGES,
    batch_advantages,
    centred_advantages,
    gdpo_advantages,
    gpg_advantages,
    group_advantages,
    maxrl_advantages,
    nan_std,
    pass_at_k_advantages,
    register_advantage,
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    rloo_advantages,
)
from relax.losses.aggregation import AGGREGATIONS
from relax.losses.chunks import IGNORED
from relax.losses.correction import CORRECTIONS, sampler_weights
from relax.losses.cross_entropy import (
    GroupSums,
    TokenSums,
    linear_cross_entropy,
    next_token_targets,
    target_hits,
)
from relax.losses.distillation import (
    DivergenceSums,
    TeacherStates,
    TopLogprobs,
    linear_divergence,
    top_logprobs,
)
from relax.losses.gae import gae
from relax.losses.keep import high_entropy, near_policy
from relax.losses.kl import KL_ESTIMATORS, kl_estimate, register_kl_estimator
from relax.losses.kto import kto_loss, kto_reference_point
from relax.losses.logprobs import TokenLogprobs, linear_collision, linear_logprobs, token_logits
from relax.losses.masked import masked_mean, masked_sum, masked_whiten
from relax.losses.policy import (
    LOSS_TYPES,
    LossType,
    PolicyLoss,
    PolicyOptions,
    Tokens,
    clip_fractions,
    policy_loss,
)
from relax.losses.preference import (
    DIVERGENCES,
    PREFERENCE_LOSSES,
    LossOptions,
    Pairs,
    PreferenceLoss,
    dpo_loss,
    ld_weights,
    wpo_weights,
)
from relax.losses.ratios import RATIOS, Clip, log_ratios
from relax.losses.register import register_loss
from relax.losses.registry import Registry
from relax.losses.reward import bradley_terry_loss, centering_loss
from relax.losses.token import SFT_LOSSES
from relax.losses.value import ValueLosses, value_losses

__all__ = [
    "ADVANTAGES",
    "AGGREGATIONS",
    "CORRECTIONS",
    "DIVERGENCES",
    "IGNORED",
    "KL_ESTIMATORS",
    "LOSS_TYPES",
    "PREFERENCE_LOSSES",
    "RATIOS",
    "SFT_LOSSES",
    "Clip",
    "DivergenceSums",
    "LossOptions",
    "LossType",
    "Pairs",
    "PolicyLoss",
    "PolicyOptions",
    "PreferenceLoss",
    "Registry",
    "TeacherStates",
    "TokenLogprobs",
    "GroupSums",
    "TokenSums",
    "TopLogprobs",
    "Tokens",
    "ValueLosses",
    "batch_advantages",
    "bradley_terry_loss",
    "centering_loss",
    "centred_advantages",
    "clip_fractions",
    "dpo_loss",
    "gae",
    "gdpo_advantages",
    "gpg_advantages",
    "group_advantages",
    "high_entropy",
    "kl_estimate",
    "kto_loss",
    "kto_reference_point",
    "ld_weights",
    "linear_collision",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_logprobs",
    "log_ratios",
    "masked_mean",
    "masked_sum",
    "masked_whiten",
    "maxrl_advantages",
    "nan_std",
    "near_policy",
    "next_token_targets",
    "pass_at_k_advantages",
    "policy_loss",
    "register_advantage",
    "register_kl_estimator",
    "register_loss",
    "reinforce_plus_plus_advantages",
    "reinforce_plus_plus_baseline_advantages",
    "rloo_advantages",
    "sampler_weights",
    "target_hits",
    "token_logits",
    "top_logprobs",
    "value_losses",
    "wpo_weights",
]
