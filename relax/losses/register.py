"""Registration of a loss of one's own, for any algorithm that has a `loss_type`."""

from collections.abc import Callable
from typing import Any

from relax.losses.policy import LOSS_TYPES
from relax.losses.preference import PREFERENCE_LOSSES
from relax.losses.registry import Registry
from relax.losses.token import SFT_LOSSES

LOSSES: Registry[Registry] = Registry("algorithm")
LOSSES |= {"grpo": LOSS_TYPES, "dpo": PREFERENCE_LOSSES, "sft": SFT_LOSSES}


def register_loss(
    name: str, algorithm: str = "grpo", **properties: Any
) -> Callable[[Callable], Callable]:
    """Returns a decorator that registers a function as a `loss_type`, and returns the function.

    Args:
      name: its name in the trainer of the algorithm.
      algorithm: of which the function gets the arguments:
        `grpo`: `(Tokens, PolicyOptions) -> [B, T]`, losses per token.
        `dpo`: `(Pairs, LossOptions) -> [N]`, losses per pair.
        `sft`: `[C] -> [C]`, elementwise, from log p(target) to losses per token.
      **properties: for `grpo` `aggregation`, a name in `AGGREGATIONS` or a function like those, and
        the fields of `LossType`; for `dpo` the fields of `PreferenceLoss`; for `sft` none.

    Raises:
      ValueError: there is no such algorithm.

    Example:
      >>> @register_loss("reinforce", aggregation="sequence_mean")
      ... def reinforce(tokens, options):
      ...     return -tokens.advantages * tokens.logprobs
      >>> LOSS_TYPES.pop("reinforce").objective is reinforce
      True
    """
    return LOSSES[algorithm].register(name, **properties)
