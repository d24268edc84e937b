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

from relax.data.forest import Forest, pack_forest, places
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
      batch: arrays on the host with leading axis N, as above. Where there are `branches`
        `[N, G, C]`, a completion is several branches, one after another, each of which follows the
        prompt; the array holds the number of each token's branch.
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
    branches = batch.get("branches")
    pieces = [
        [piece for g, child in enumerate(group) for piece in _pieces(child, branches, n, g)]
        for n, group in enumerate(children)
    ]
    trees = list(zip(prompts, pieces, strict=True))
    longest = max(map(len, prompts), default=0) + int(width.max(initial=0))
    shared = all(_can_share(model, longest) for model in models)
    forest = pack_forest(trees, blocks=blocks, multiple=multiple, shared=shared, laid=laid)
    T = forest.rows["input_ids"].shape[1]
    if branches is None:
        starts, ends = forest.starts.reshape(N, G), forest.ends.reshape(N, G)
        found = places(starts, np.where(ends >= 0, width, 0), T)
    else:  # the branches of a completion may lie in several rows
        T = max(T, C)
        found, ends = _places_of_branches(forest, children, branches, T)
    kept = {
        name: resized(value, T) if np.shape(value)[:3] == (N, G, C) else value
        for name, value in batch.items()
        if name not in ("prompt_ids", "branches")
    }
    rows = forest.rows if shared else {k: v for k, v in forest.rows.items() if k != "parent_ids"}
    return kept | rows | {"places": found, "ends": ends}


def _pieces(child: np.ndarray, branches: np.ndarray | None, n: int, g: int) -> list[np.ndarray]:
    """The branches of completion g of group n; the completion itself where there are none."""
    if branches is None:
        return [child]
    changes = np.flatnonzero(np.diff(branches[n, g, : len(child)])) + 1
    return np.split(child, changes)


def _places_of_branches(
    forest: Forest, children: list[list[np.ndarray]], branches: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """`places` `[N, G, width]` and `ends` `[N, G]` of completions that are several branches."""
    N, G = branches.shape[:2]
    found, ends = np.full((N, G, width), -1, np.int32), np.full((N, G), -1, np.int32)
    number = 0
    for n, g in np.ndindex(N, G):
        first = 0
        for piece in _pieces(children[n][g], branches, n, g):
            start, ends[n, g] = forest.starts[number], forest.ends[number]
            if forest.ends[number] >= 0:
                found[n, g, first : first + len(piece)] = start + np.arange(len(piece))
            number, first = number + 1, first + len(piece)
    return found, ends


def resized(values: np.ndarray, width: int) -> np.ndarray:
    """Values per token with another width, `[N, G, width]`: padding is cut, or added as zeros."""
    values = np.asarray(values)[:, :, :width]
    return np.pad(values, ((0, 0), (0, 0), (0, width - values.shape[2])))


def lay_out(
    values: np.ndarray, places: np.ndarray, shape: tuple[int, int], blocks: int, fill: float = 0
) -> np.ndarray:
    """Values of completions' tokens at their places in the rows; the reverse of `at_places`.

    Args:
      values: `[N, G, C, ...]`.
      places: `[N, G, T]`, of `pack_groups` with as many `blocks`.
      shape: B and T.
      fill: the value of all other tokens.

    Returns:
      `[B, T, ...]`.
    """
    width = min(values.shape[2], places.shape[2])
    values, places = values[:, :, :width], places[:, :, :width]
    out = np.full((blocks, shape[0] // blocks * shape[1], *values.shape[3:]), fill, values.dtype)
    block = np.arange(len(values)) // (len(values) // blocks)
    is_laid = places >= 0
    block = np.broadcast_to(block[:, None, None], places.shape)
    out[block[is_laid], places[is_laid]] = values[is_laid]
    return out.reshape(*shape, *values.shape[3:])


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
