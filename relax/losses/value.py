"""The loss of a critic, and how well it explains what came.

Axes: B completions, T tokens of a completion.
"""

import jax
import jax.numpy as jnp


def value_losses(
    values: jax.Array,
    old_values: jax.Array,
    returns: jax.Array,
    mask: jax.Array,
    *,
    clip: float | None = 0.2,
) -> tuple[jax.Array, jax.Array]:
    """The squared error of each value, and of the value held near that of the rollout.

        l = ½ max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²)

    A value that has already gone ε towards its return, or past that, is pushed no further.

    Args:
      values, old_values, returns: `[B, T]`; what stands in masked places is not read.
      mask: `[B, T]` bool.
      clip: ε; None: the plain squared error.

    Returns:
      The losses `[B, T]`, 0 where masked, and bool `[B, T]`, true where the second term is larger.

    Schulman et al., Proximal Policy Optimization Algorithms, 2017, as its authors' code has it;
    Huang et al., The 37 Implementation Details of PPO, 2022, detail 9.

    >>> losses, clipped = value_losses(*(jnp.array([[x]]) for x in (1.0, 0.5, 1.0, True)))
    >>> round(losses.item(), 3), clipped.item()
    (0.045, True)
    """
    # Masked before the difference: 0 · NaN in the gradient would be NaN.
    values, old_values, returns = (jnp.where(mask, x, 0.0) for x in (values, old_values, returns))
    errors = jnp.square(values - returns)
    if clip is None:
        return errors / 2, jnp.zeros_like(mask)
    near = jnp.clip(values, old_values - clip, old_values + clip)
    held = jnp.square(near - returns)
    return jnp.maximum(errors, held) / 2, held > errors
