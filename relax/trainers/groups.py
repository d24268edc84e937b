"""Batches of prompts with their completions, laid out as a packed forest before the update.

A loader or a rollout gives padded arrays on the host: `prompt_ids` `[N, L]`, `prompt_lengths`
`[N]`, `completion_ids` `[N, G, C]` and `completion_lengths` `[N, G]`. The model computes rows of
real tokens, see `relax.data.forest`.

Axes: N groups, G completions of a group, L tokens of a prompt, C tokens of a completion, B rows,
T tokens of a row.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from relax.data.forest import pack_forest, places
from relax.losses import IGNORED
from relax.models.transformer import Transformer


def pack_groups(
    batch: Mapping,
    models: Sequence[Transformer],
    blocks: int,
    *,
    slots: int = 0,
    multiple: int = 1,
    laid: Sequence[bool] | np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Replaces the `prompt_ids` of a batch by the rows of its packed forest.

    Args:
      batch: arrays on the host with leading axis N, as above.
      models: those that compute it. Where one's rotary positions depend on the length of a
        document, and one is long enough, or its attention kernel has no parents, each completion
        repeats its prompt.
      blocks: micro-batches times devices that share a batch; divides N.
      slots: tokens to add behind each completion that is shorter than C (>= 0), for states that
        have seen the whole of it.
      multiple: the length of rows is a multiple of it (>= 1).
      laid: see `pack_forest`.

    Returns:
      The batch's other arrays, those per token `[N, G, T]`, so that B and T alone decide on all
      shapes; the rows `[B, T]` by the names in `relax.data.forest.ROWS`, without
      `parent_ids` where prompts are repeated; `places` `[N, G, T]` of the completions' tokens, -1
      behind their ends; and `ends` `[N, G]`, the place of each one's last token.

    Raises:
      ValueError: `blocks` does not divide N.
    """
    ids, lengths = batch["completion_ids"], batch["completion_lengths"]
    N, G, C = ids.shape
    if N % blocks:
        raise ValueError(
            "gradient_accumulation_steps times the devices that share a batch must divide its "
            f"rows, got {blocks} and {N} rows. Use a batch size that is a multiple of {blocks}."
        )
    prompts = [row[:n] for row, n in zip(batch["prompt_ids"], batch["prompt_lengths"], strict=True)]
    width = np.where(lengths > 0, np.minimum(lengths + slots, C), 0)
    real = np.where(np.arange(C) < lengths[..., None], ids, 0)  # padding may hold anything
    children = [[real[n, g, : width[n, g]] for g in range(G)] for n in range(N)]
    trees = list(zip(prompts, children, strict=True))
    longest = max(map(len, prompts), default=0) + int(width.max(initial=0))
    shared = all(_can_share(model, longest) for model in models)
    forest = pack_forest(trees, blocks=blocks, multiple=multiple, shared=shared, laid=laid)
    starts, ends = forest.starts.reshape(N, G), forest.ends.reshape(N, G)
    T = forest.rows["input_ids"].shape[1]
    found = places(starts, np.where(ends >= 0, width, 0), T)
    kept = {
        name: resized(value, T) if np.shape(value)[:3] == (N, G, C) else value
        for name, value in batch.items()
        if name != "prompt_ids"
    }
    rows = forest.rows if shared else {k: v for k, v in forest.rows.items() if k != "parent_ids"}
    return kept | rows | {"places": found, "ends": ends}


def resized(values: np.ndarray, width: int) -> np.ndarray:
    """Values per token with another width, `[N, G, width]`: padding is cut, or added as zeros."""
    values = np.asarray(values)[:, :, :width]
    return np.pad(values, ((0, 0), (0, 0), (0, width - values.shape[2])))


def _can_share(model: Transformer, longest: int) -> bool:
    """Whether completions of up to `longest` tokens, prompt included, can share a prompt."""
    scalings = [layer.rope.scaling for layer in model.config.layers if layer.rope is not None]
    turns_by_length = any(
        scaling is not None
        and scaling.depends_on_length
        and longest > scaling.original_max_position_embeddings
        for scaling in scalings
    )
    return not turns_by_length and model.attn_implementation != "splash"


def completion_targets(batch) -> jax.Array:
    """The tokens of completions that a state predicts, `[B, T]`; `IGNORED` elsewhere."""
    return jnp.where(batch["previous"] >= 0, batch["input_ids"], IGNORED)


def predicted_lengths(batch) -> jax.Array:
    """Number of each completion's tokens that are predicted, `[N, G]`.

    These are all, except the first one where the prompt is empty.
    """
    lengths, is_empty = batch["completion_lengths"], batch["prompt_lengths"][:, None] == 0
    return jnp.where(is_empty & (lengths > 0), lengths - 1, lengths)


def num_tokens(batch) -> jax.Array:
    """Number of tokens in a batch without padding; a prompt counts once per completion."""
    lengths, prompts = batch["completion_lengths"], batch["prompt_lengths"][:, None]
    return jnp.where(lengths > 0, prompts + lengths, 0).sum().astype(jnp.int32)
