"""What training changes, all of it, in one immutable value."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from relax import parallel
from relax.models.trainable import merge, partition
from relax.optimizers import optimizers as optimizers


@flax.struct.dataclass
class TrainState:
    """Everything that an update reads and changes.

    Attributes:
      step: int32 scalar, updates done; one that was skipped because its gradient was not finite
        counts, so that keys and data move on.
      params: what is trained.
      opt_state: the optimizer's state.
      rng: the root key; it never changes.
      frozen: weights that the loss reads and nothing updates; empty by default.
      control: numbers that an algorithm steers itself by, such as a KL coefficient that follows
        what is measured; empty by default.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    rng: jax.Array
    frozen: Any = flax.struct.field(default_factory=dict)
    control: Any = flax.struct.field(default_factory=dict)

    @classmethod
    def create(cls, *, params, optimizer, rng, frozen=None) -> "TrainState":
        """The state before the first update.

        The state takes `params` and `frozen` over: the first update reuses their memory, and the
        caller's arrays are gone after it. The key is copied.
        """
        rng = jax.random.wrap_key_data(
            jnp.array(jax.random.key_data(rng), copy=True), impl=jax.random.key_impl(rng)
        )
        params = parallel.shard(params)
        state = cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=parallel.init_sharded(optimizer.init, params),
            rng=rng,
            frozen=frozen if frozen is not None else {},
        )
        return parallel.shard(state)

    @property
    def eval_params(self):
        """What to evaluate and save: `params`, or the average a schedule-free optimizer keeps."""
        return optimizers.eval_params(self.opt_state, self.params)


def copy_tree(tree):
    """A tree of fresh arrays with the same values; None stays None."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def initial_state(
    model,
    optimizer,
    key: jax.Array,
    params=None,
    freeze: str | None = None,
    reference: bool = False,
):
    """The state before the first update of a `relax.models.Transformer`.

    Args:
      optimizer: an optax transformation, for what is trained.
      others: those of `initial_weights`.
    """
    trained, frozen = initial_weights(model, key, params, freeze, reference)
    return TrainState.create(params=trained, optimizer=optimizer, rng=key, frozen=frozen)


def fresh_params(model, key: jax.Array) -> dict:
    """Parameters that the key makes, each created with its final sharding."""
    ids = jnp.zeros((1, 8), jnp.int32)
    return parallel.init_sharded(jax.jit(model.init), key, ids)["params"]


def initial_weights(
    model, key: jax.Array, params=None, freeze: str | None = None, reference: bool = False
) -> tuple[dict, dict]:
    """What is trained of a `relax.models.Transformer`, and what is frozen.

    Args:
      key: makes what is to be made.
      params: all parameters, taken over; None: fresh ones.
      freeze: see `relax.models.trainable.partition`.
      reference: hold a copy of what is trained, as it is now, in `frozen["ref"]`. With adapters
        there is none: the reference is the model without them.
    """
    params = parallel.shard(fresh_params(model, key) if params is None else params)
    trained, frozen = partition(model, params, key, freeze)
    if reference and model.lora is None:
        frozen = frozen | {"ref": copy_tree(trained)}
    return trained, frozen


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
