"""An entropy bonus that is adapted to hold the entropy up."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class EntropyControl(NamedTuple):
    """How the coefficient of the entropy bonus is adapted.

    After every update it rises by `delta` if the entropy was at or below `target`, and falls by
    `delta` if not; the bonus is applied in an update only if the entropy was at or below `target`
    in the one before.

    He et al., Skywork Open Reasoner 1 Technical Report, 2025, https://arxiv.org/abs/2505.22312,
    section 4.4; as TRL's `use_adaptive_entropy`

    Attributes:
      target: nats per token, above 0.
      delta: above 0.
      lowest, highest: bounds of the coefficient, at least 0.
    """

    target: float = 0.2
    delta: float = 0.005
    lowest: float = 0.0
    highest: float = 1.0

    def start(self, coef: float) -> dict[str, jax.Array]:
        """The part of `TrainState.control` before the first update, which has no bonus."""
        return {"entropy_coef": jnp.float32(coef), "entropy": jnp.float32(jnp.inf)}

    def applied(self, control: dict[str, jax.Array]) -> jax.Array:
        """The coefficient of the next update."""
        return jnp.where(control["entropy"] <= self.target, control["entropy_coef"], 0.0)

    def adapted(self, control: dict[str, jax.Array], entropy: jax.Array) -> dict[str, jax.Array]:
        """The control after an update, whose mean entropy was `entropy`, nats per token."""
        step = jnp.where(entropy <= self.target, self.delta, -self.delta)
        coef = jnp.clip(control["entropy_coef"] + step, self.lowest, self.highest)
        return control | {"entropy_coef": coef, "entropy": entropy}
