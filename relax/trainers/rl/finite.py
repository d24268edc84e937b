"""Checks for NaN and infinity before a rollout is trained on.

A NaN is easily missed: every comparison with it is false, a mask hides it, and a loss over no
  tokens
is 0. So a rollout's log-probabilities and values are checked on the host, and the error names the
tensor or the completion.

Axes: P prompts, G completions of a group, C tokens of a completion.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np

from relax.errors import NonFiniteError
from relax.trainers.rl.rollout import Rollout


def check_finite(what: str, values: np.ndarray, rollout: Rollout, weights) -> None:
    """Checks a rollout's per-token values for NaN and infinity.

    Args:
      what: name of the values in messages, such as "the sampler's log-probability".
      values: `[P, G, C]`.
      rollout: the completions; values outside its mask are not checked.
      weights: the parameters that `values` were computed with.

    Raises:
      NonFiniteError: values and weights are not finite: no later rollout would be better.

    Warns:
      Values are not finite, but the weights are. The loss will be NaN, so its update is skipped and
      counted; `NonFiniteGuard` ends the run after a few in a row.
    """
    bad = ~np.isfinite(values) & rollout.mask
    if not bad.any():
        return
    p, g, c = np.argwhere(bad)[0]
    prompt = str(rollout.rows[p].get("prompt", ""))[:200]
    where = (
        f"{what} is {values[p, g, c]} at token {c} of completion {g} to the prompt {prompt!r}, and "
        f"not finite in {int(bad.any(axis=2).sum())} of {bad.shape[0] * bad.shape[1]} completions"
    )
    if tensors := non_finite_tensors(weights):
        more = f" and {len(tensors) - 3} more" if len(tensors) > 3 else ""
        raise NonFiniteError(
            f"{where}: weights hold NaN or infinity: {', '.join(tensors[:3])}{more}. Nothing was "
            "trained on it. Start from finite weights: another checkpoint or model directory."
        )
    warnings.warn(
        f"{where}, although all weights are finite: logits overflowed. The update will be skipped; "
        "lower the learning rate or use --dtype float32.",
        stacklevel=3,
    )


def non_finite_tensors(weights) -> list[str]:
    """Names of the tensors that hold NaN or infinity, such as `layers_0/mlp/up_proj/kernel`.

    Example:
      >>> non_finite_tensors({"norm": {"scale": jnp.array([1.0, jnp.nan])}, "bias": jnp.ones(2)})
      ['norm/scale']
    """
    flags = jax.device_get(jax.tree.map(_is_finite, weights))
    leaves, _ = jax.tree_util.tree_flatten_with_path(flags)
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, finite in leaves
        if not finite
    ]


@jax.jit
def _is_finite(leaf):
    return jnp.isfinite(leaf).all()
