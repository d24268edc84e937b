"""Forward passes for losses, used by every algorithm.

Each takes all parameters (`merge(params, frozen)` of `relax.models.trainable`; the frozen base
alone, `frozen["base"]`, is the model without its adapters) and returns hidden states, for a loss
that continues with `model.output_matrix(params)`, and the routers' load-balancing loss: added to
the loss `config.router_aux_loss_coef` times and logged as `aux_loss`; None without experts. `rng`
is the key of the adapters' dropout; None: no dropout.

Axes: B batch, T tokens of a row, P prompts, L tokens of a prompt, G completions of a prompt,
C tokens of a completion, D model.
"""

from collections.abc import Callable, Mapping

import jax

from relax.models.groups import group_hidden_states, group_outputs
from relax.models.transformer import Transformer

States = tuple[jax.Array, jax.Array | None]  # hidden states and the load-balancing loss
GROUP = ("prompt_ids", "prompt_lengths", "completion_ids", "completion_lengths")


def hidden_states(
    model: Transformer, params, batch: Mapping, *, rng: jax.Array | None = None
) -> States:
    """Hidden states of rows, `[B, T, D]`.

    Args:
      batch: `input_ids` `[B, T]` and, optionally, `positions` and `segment_ids`.
    """
    inputs = (batch["input_ids"], batch.get("positions"), batch.get("segment_ids"))
    return _apply(model, params, inputs, rng, "hidden_states_and_aux_loss")


def completion_states(
    model: Transformer, params, batch: Mapping, rng: jax.Array | None = None
) -> States:
    """Hidden states *before* each completion token, which predict it: `[P, G, C, D]`.

    Args:
      batch: `prompt_ids` `[P, L]`, `prompt_lengths` `[P]`, `completion_ids` `[P, G, C]` and
        `completion_lengths` `[P, G]`.
    """
    return _apply(model, params, tuple(batch[name] for name in GROUP), rng, group_hidden_states)


def completion_outputs(
    model: Transformer, params, batch: Mapping, rng: jax.Array | None = None
) -> States:
    """The states *at* each token of groups of completions, `[P, G, C, D]`: they have seen it.

    Args:
      batch: as for `completion_states`.
    """
    inputs = tuple(batch[name] for name in GROUP)
    _, outputs, aux_loss = _apply(model, params, inputs, rng, group_outputs)
    return outputs, aux_loss


def _apply(model: Transformer, params, inputs: tuple, rng, method: str | Callable):
    dropout = rng is not None and model.lora is not None and model.lora.dropout > 0
    rngs = {"dropout": rng} if dropout else None
    return model.apply({"params": params}, *inputs, rngs=rngs, method=method)
