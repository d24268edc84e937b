"""The forward pass of a loss: what every algorithm asks of the model."""

import jax

from relax.models.groups import group_hidden_states
from relax.models.transformer import Transformer


def hidden_states(
    model: Transformer, params, batch, *, rng: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Hidden states of a batch, for a loss that goes on with `model.output_matrix(params)`.

    Args:
      params: all of them: `merge(params, frozen)` of `relax.models.trainable`. The frozen base
        alone, `frozen["base"]`, is the model without its adapters.
      batch: `input_ids` `[B, T]` and, optionally, `positions` and `segment_ids`.
      rng: of the adapters' dropout; None: no dropout.

    Returns:
      `[B, T, D]`, and the routers' load-balancing loss, to be added to the loss
      `config.router_aux_loss_coef` times and logged as `aux_loss`; None without experts.
    """
    dropout = rng is not None and model.lora is not None and model.lora.dropout > 0
    return model.apply(
        {"params": params},
        batch["input_ids"],
        batch.get("positions"),
        batch.get("segment_ids"),
        rngs={"dropout": rng} if dropout else None,
        method="hidden_states_and_aux_loss",
    )


def completion_states(
    model: Transformer, params, batch, rng: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """The states before each token of groups of completions, `[P, G, C, D]`.

    Args:
      params, rng: as for `hidden_states`, as is the second result.
      batch: the arguments of `group_hidden_states` by name.
    """
    dropout = rng is not None and model.lora is not None and model.lora.dropout > 0
    names = ("prompt_ids", "prompt_lengths", "completion_ids", "completion_lengths")
    return model.apply(
        {"params": params},
        *(batch[name] for name in names),
        rngs={"dropout": rng} if dropout else None,
        method=group_hidden_states,
    )
