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

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from relax import parallel
from relax.models.transformer import Transformer

States = tuple[jax.Array, jax.Array | None]  # hidden states and the load-balancing loss


NEFTUNE = np.uint32(2**31 + 1)  # of the update's key: noise on embeddings


def hidden_states(
    model: Transformer,
    params,
    batch: Mapping,
    *,
    rng: jax.Array | None = None,
    neftune_noise_alpha: float | None = None,
) -> States:
    """Hidden states of rows, `[B, T, D]`.

    Args:
      batch: `input_ids` `[B, T]` and, optionally, `positions`, `segment_ids` and `parent_ids`.
      neftune_noise_alpha: α of `neftune_noise`; None, or no `rng`: no noise.
    """
    names = ("positions", "segment_ids", "parent_ids")
    inputs = (batch["input_ids"], *(batch.get(name) for name in names))
    dropout = rng is not None and model.lora is not None and model.lora.dropout > 0
    rngs: Any = {"dropout": rng} if dropout else None
    if neftune_noise_alpha and rng is not None:
        key, shape = jax.random.fold_in(rng, NEFTUNE), (*inputs[0].shape, model.config.hidden_size)
        noise = neftune_noise(key, shape, batch.get("segment_ids"), neftune_noise_alpha)
        inputs = (*inputs, noise)
    states: Any = model.apply(
        {"params": params}, *inputs, rngs=rngs, method="hidden_states_and_aux_loss"
    )
    return states


def neftune_noise(
    key: jax.Array, shape: tuple[int, int, int], segment_ids: jax.Array | None, alpha: float
) -> jax.Array:
    """NEFTune's noise on embeddings, uniform in ±α / sqrt(L D).

    L is the number of tokens of the document that a token belongs to, whatever shares its row.

    Args:
      key: for the noise.
      shape: (B, T, D).
      segment_ids: `[B, T]`, as for `Transformer.hidden_states`; None: L = T.
      alpha: α, above 0; the paper's is 5 to 15.

    Returns:
      `[B, T, D]` float32.

    References:
      Jain et al., NEFTune: Noisy Embeddings Improve Instruction Finetuning, 2023,
      https://arxiv.org/abs/2310.05914, algorithm 1
    """
    B, T, D = shape
    lengths = jnp.full((B, T), T)
    if segment_ids is not None:
        ends = jnp.sort(segment_ids, axis=1)
        first, last = (
            jax.vmap(functools.partial(jnp.searchsorted, side=side))(ends, segment_ids)
            for side in ("left", "right")
        )
        lengths = last - first
    bound = alpha / jnp.sqrt(lengths * D)
    return jax.random.uniform(key, shape, minval=-1.0) * bound[:, :, None]


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
