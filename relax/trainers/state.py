"""The training state: everything that training changes, in one immutable value."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from relax import parallel
from relax.models.lora import is_adapter
from relax.models.trainable import merge, partition, split
from relax.optimizers import optimizers as optimizers


@flax.struct.dataclass
class TrainState:
    """Everything that an update reads and changes.

    Attributes:
      step: int32 scalar, updates done. An update skipped for a non-finite gradient counts too, so
        that keys and data advance.
      params: the trained parameters.
      opt_state: the optimizer's state.
      rng: the root key; it never changes.
      frozen: weights that the loss reads and nothing updates; empty by default.
      control: numbers that an algorithm adapts while it runs, such as an adaptive KL coefficient;
        empty by default.
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

        Takes ownership of `params` and `frozen`: the first update reuses their memory, which
        deletes the caller's arrays. The key is copied.
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
        """Parameters to evaluate and save: `params`, or a schedule-free optimizer's average."""
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
      optimizer: an optax transformation for the trained parameters.
      model, key, params, freeze, reference: as for `initial_weights`.
    """
    trained, frozen = initial_weights(model, key, params, freeze, reference)
    return TrainState.create(params=trained, optimizer=optimizer, rng=key, frozen=frozen)


def fresh_params(model, key: jax.Array) -> dict:
    """Randomly initialised parameters, each created with its final sharding."""
    ids = jnp.zeros((1, 8), jnp.int32)
    return parallel.init_sharded(jax.jit(model.init), key, ids)["params"]


def initial_weights(
    model, key: jax.Array, params=None, freeze: str | None = None, reference: bool = False
) -> tuple[dict, dict]:
    """The trained and the frozen parameters of a `relax.models.Transformer`.

    Args:
      key: initialises fresh parameters and adapters.
      params: all parameters, whose memory the result takes over; None: fresh ones.
      freeze: see `relax.models.trainable.partition`.
      reference: keep a copy of the initial trained parameters in `frozen["ref"]`. With adapters the
        reference is the model without them, and the copy is of what is trained beside them.
    """
    params = parallel.shard(fresh_params(model, key) if params is None else params)
    trained, frozen = partition(model, params, key, freeze)
    if reference and model.lora is None:
        frozen = frozen | {"ref": copy_tree(trained)}
    elif reference and model.lora.modules_to_save:  # which the base does not have
        saved, _ = split(trained, lambda path: not is_adapter(path))
        frozen = frozen | {"ref": copy_tree(saved)}
    return trained, frozen


def reference_params(frozen) -> dict:
    """All parameters of the reference: the copy under "ref", else the model without adapters."""
    return merge(frozen["ref"], frozen) if "ref" in frozen else frozen["base"]


def update_reference(frozen, params, step: jax.Array, *, alpha: float, every: int):
    """Moves the reference towards the policy every `every` updates; returns the new `frozen`.

        θ_ref ← α θ + (1 - α) θ_ref

    Args:
      step: updates done.
      alpha: weight of the policy.
      every: updates between moves.
    """
    share = jnp.where(step % every == 0, alpha, 0.0)

    def mix(old, new):
        return jnp.where(share > 0, share * new + (1 - share) * old, old).astype(old.dtype)

    return frozen | {"ref": jax.tree.map(mix, frozen["ref"], params)}
