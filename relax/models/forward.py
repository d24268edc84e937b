"""Forward passes for losses, used by every algorithm.

Each takes all parameters (`merge(params, frozen)` of `relax.models.trainable`; the frozen base
alone, `frozen["base"]`, is the model without its adapters) and returns hidden states, for a loss
that continues with `model.output_matrix(params)`, and the routers' load-balancing loss: added to
the loss `config.router_aux_loss_coef` times and logged as `aux_loss`; None without experts. `rng`
is the key of the adapters' dropout; None: no dropout.

Sequences that share their beginnings, such as the completions of a prompt, are rows of a packed
forest (`relax.data.forest`). Values of its tokens, `[B, T]`, are gathered per completion by
`at_places`.

Axes: B rows, T tokens of a row, C tokens of a completion, D model.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from relax import parallel
from relax.models.transformer import Transformer

States = tuple[jax.Array, jax.Array | None]  # hidden states and the load-balancing loss


def hidden_states(
    model: Transformer, params, batch: Mapping, *, rng: jax.Array | None = None
) -> States:
    """Hidden states of rows, `[B, T, D]`.

    Args:
      batch: `input_ids` `[B, T]` and, optionally, `positions`, `segment_ids` and `parent_ids`.
    """
    names = ("positions", "segment_ids", "parent_ids")
    inputs = (batch["input_ids"], *(batch.get(name) for name in names))
    dropout = rng is not None and model.lora is not None and model.lora.dropout > 0
    rngs: Any = {"dropout": rng} if dropout else None
    states: Any = model.apply(
        {"params": params}, *inputs, rngs=rngs, method="hidden_states_and_aux_loss"
    )
    return states


def predicting_states(
    model: Transformer, params, batch: Mapping, *, rng: jax.Array | None = None
) -> States:
    """Hidden states *before* each token of a packed forest, which predict it: `[B, T, D]`.

    Args:
      batch: the rows of a `relax.data.forest.Forest`. Where `previous` is -1 the state is that of
        some other token.

    Raises:
      ValueError: the batch is not packed.
    """
    if "previous" not in batch:
        raise ValueError(
            "a batch of groups must be packed before its update, got one with "
            f"{', '.join(batch)}. Pass it through `trainer.pack(batch)`, as `train` does."
        )
    hidden, aux_loss = hidden_states(model, params, batch, rng=rng)

    def before(hidden, previous):
        return jnp.take_along_axis(hidden, jnp.maximum(previous, 0)[:, :, None], axis=1)

    run = parallel.per_device(before, (("batch",), ("batch",)), ("batch",), auto=True)
    return run(hidden, batch["previous"]), aux_loss


def at_places(values: jax.Array, places: jax.Array) -> jax.Array:
    """Gathers values of tokens by their places in the rows of a device: 0 where a place is -1.

    Args:
      values: `[B, T, ...]`.
      places: `[N, ...]` int, each in the B / devices * T tokens of the device that has row n.

    Returns:
      `places`' shape, then the rest of that of `values`.
    """

    def gather(values, places):
        flat = values.reshape(-1, *values.shape[2:])
        found = flat[jnp.maximum(places, 0)]
        exists = (places >= 0).reshape(*places.shape, *(1,) * (values.ndim - 2))
        return jnp.where(exists, found, 0)

    run = parallel.per_device(gather, (("batch",), ("batch",)), ("batch",), auto=True)
    return run(values, places)
