"""Losses, advantages and KL estimators as pure functions of arrays.

Each can be called on its own:

    from relax.losses import group_advantages, policy_loss

    advantages = group_advantages(rewards).reshape(-1)        # [P, G] -> [B]
    loss, weight, ratio = policy_loss(logprobs, old_logprobs, advantages, mask)

Named choices are in registries, to which you can add your own: `register_loss`,
`register_preference_loss`, `register_advantage`, `register_kl_estimator`.
"""

from relax.losses.advantages import (
    ADVANTAGES,
    batch_advantages,
    centred_advantages,
    gae,
    group_advantages,
    nan_std,
    register_advantage,
    rloo_advantages,
)
from relax.losses.chunks import IGNORED
from relax.losses.cross_entropy import (
    TokenSums,
    linear_cross_entropy,
    next_token_targets,
    target_hits,
)
from relax.losses.dpo import (
    PREFERENCE_LOSSES,
    LossOptions,
    Pairs,
    PreferenceLoss,
    dpo_loss,
    kto_loss,
    kto_reference_point,
    register_preference_loss,
)
from relax.losses.kl import KL_ESTIMATORS, kl_estimate, register_kl_estimator
from relax.losses.logprobs import TokenLogprobs, linear_logprobs, token_logits
from relax.losses.masked import masked_mean, masked_sum, masked_whiten
from relax.losses.policy import (
    AGGREGATIONS,
    LOSS_TYPES,
    RATIOS,
    Clip,
    LossType,
    PolicyLoss,
    clip_fractions,
    log_ratios,
    policy_loss,
    register_loss,
)
from relax.losses.registry import Registry
from relax.losses.reward import bradley_terry_loss, centering_loss
from relax.losses.value import ValueLosses, value_losses

__all__ = [
    "ADVANTAGES",
    "AGGREGATIONS",
    "IGNORED",
    "KL_ESTIMATORS",
    "LOSS_TYPES",
    "PREFERENCE_LOSSES",
    "RATIOS",
    "Clip",
    "LossOptions",
    "LossType",
    "Pairs",
    "PolicyLoss",
    "PreferenceLoss",
    "Registry",
    "TokenLogprobs",
    "TokenSums",
    "ValueLosses",
    "batch_advantages",
    "bradley_terry_loss",
    "centering_loss",
    "centred_advantages",
    "clip_fractions",
    "dpo_loss",
    "gae",
    "group_advantages",
    "kl_estimate",
    "kto_loss",
    "kto_reference_point",
    "linear_cross_entropy",
    "linear_logprobs",
    "log_ratios",
    "masked_mean",
    "masked_sum",
    "masked_whiten",
    "nan_std",
    "next_token_targets",
    "policy_loss",
    "register_advantage",
    "register_kl_estimator",
    "register_loss",
    "register_preference_loss",
    "rloo_advantages",
    "target_hits",
    "token_logits",
    "value_losses",
]
