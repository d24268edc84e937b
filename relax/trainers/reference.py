"""The reference policy: what `state.frozen` says it is, and how it may follow what is trained."""

import jax
import jax.numpy as jnp

from relax.models.trainable import merge


def reference_params(frozen) -> dict:
    """All parameters of the reference: the copy under "ref", else the model without adapters."""
    return merge(frozen["ref"], frozen) if "ref" in frozen else frozen["base"]


def update_reference(frozen, params, step: jax.Array, *, alpha: float, every: int):
    """`frozen` after an update: every so many, the reference moves towards the policy.

        θ_ref ← α θ + (1 - α) θ_ref

    Args:
      step: updates done.
      alpha: the policy's share.
      every: updates between moves.
    """
    share = jnp.where(step % every == 0, alpha, 0.0)

    def mix(old, new):
        return jnp.where(share > 0, share * new + (1 - share) * old, old).astype(old.dtype)

    return frozen | {"ref": jax.tree.map(mix, frozen["ref"], params)}
