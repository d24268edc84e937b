"""Drafts: completions that an earlier policy sampled, verified by one packed forward pass.

Every token is a function of its distribution and of random numbers, those of its row's key and its
place: y_t = f(p_t, u_t), where f(p, u) follows p for uniform u (`selection.draw_coupled`). A draft
is a row's completion x under an earlier policy q, sampled with the same key: x_t = f(q_t, u_t).

1. One forward pass of the policy over the prompt and the draft gives p_t for every place, and with
   the row's key y_t = f(p_t, u_t).
2. The draft is accepted up to its first token that differs from y_t, which takes its place.
3. The row goes on from there by decoding, with the keys and values of the pass.

So a row's completion is the one that it has without its draft, y_t = f(p_t, u_t) for every t, up to
the rounding of sums in programs of other shapes; its distribution is the policy's, whatever q was.
A draft saves time and decides nothing.

Rejection by min(1, p / q) would need all of q at the rejected place, which is a row of the
vocabulary per token. It cannot do with q of the drafted token alone: a rule that gives y with
probability K(y | x, q(x)) must have Σ_x q(x) K(y | x, q(x)) = p(y) for every q, so that q K is
affine in q; being at least 0 and 1 in sum, K is then constant in x, and no draft helps. The rows of
an earlier policy can only be had from the random numbers.

Two completions of one key are as much alike as their distributions. Rows of other keys stay
independent of both.

Axes: B packed rows, T tokens of a row, M = B * T tokens, N rows of the generation, C of them that
go on, P columns of these.
"""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from relax import parallel
from relax.data.forest import Tokens, pack_forest
from relax.errors import ConfigError
from relax.losses.logprobs import token_logits
from relax.models.transformer import Transformer
from relax.sampling.batch import PROMPT, bucket_size, rules_of
from relax.sampling.config import SamplingConfig
from relax.sampling.distribution import Rules, sample_token
from relax.sampling.rows import Row, check_finite, end_row
from relax.sampling.stops import Decode

PASS_TOKENS = 4096  # tokens of one pass, unless one prompt and its drafts are longer
CHUNK = 256  # tokens whose logits are in memory at once

Prefilled = dict[int, tuple]  # as `Batch.prefilled`


class Verified(NamedTuple):
    """The keys and values of rows that have not ended, and the number of accepted tokens."""

    prefilled: Prefilled
    accepted: int


def check_drafts(
    drafts: Sequence[Tokens], rows: int, model: Transformer, config: SamplingConfig
) -> None:
    """Raises ConfigError if rows cannot have these drafts."""
    layout = parallel.layout()
    problems = [
        (
            len(drafts) != rows,
            f"drafts must be one for each of the {rows} rows, got {len(drafts)}.",
        ),
        (
            not config.coupled or config.temperature == 0,
            "drafts are verified with the random numbers that they were sampled with: set coupled "
            "and a temperature.",
        ),
        (
            config.repetition_penalty != 1,
            "a packed pass over drafts has no repetition_penalty, got "
            f"{config.repetition_penalty}: set it to 1.",
        ),
        (
            any(layer.mixer != "attention" for layer in model.config.layers),
            "drafts need a model whose layers are all attention, since others keep no state of "
            "the place where a draft is rejected.",
        ),
        (
            layout is not None and layout.mesh.size > 1,
            "drafts are verified on one device, got a mesh of several.",
        ),
    ]
    for broken, message in problems:
        if broken:
            raise ConfigError(message)


def verify_drafts(
    model: Transformer,
    params,
    rows: Sequence[Row],
    drafts: Sequence[Tokens],
    keys: Callable[[list[int]], jax.Array],
    config: SamplingConfig,
    decode: Decode | None,
) -> Verified:
    """Gives rows the tokens that their drafts and one token behind them are worth.

    Rows that have ended have a reason; the others get a `prompt_index` of their own.

    Args:
      drafts: tokens of each row that were sampled with its key; none for a row without a draft.
    """
    groups: dict[int, list[Row]] = {}
    for row in rows:
        if len(drafts[row.number]):
            groups.setdefault(row.prompt_index, []).append(row)
    prefilled: Prefilled = {}
    accepted, waiting = 0, collections.deque(groups.values())
    while waiting:
        some = [waiting.popleft()]
        size = _size(some[0], drafts)
        while waiting and size + _size(waiting[0], drafts) <= PASS_TOKENS:
            some.append(waiting.popleft())
            size += _size(some[-1], drafts)
        found, count = _Pass(model, params, some, drafts, config).run(keys, decode)
        prefilled |= found
        accepted += count
    return Verified(prefilled, accepted)


def _size(group: list[Row], drafts) -> int:
    return len(group[0].prompt) + sum(len(drafts[row.number]) for row in group)


class _Pass:
    """One packed forward pass over some prompts and the drafts of their rows."""

    def __init__(self, model, params, groups: list[list[Row]], drafts, config: SamplingConfig):
        self.model, self.params, self.config = model, params, config
        self.rows = [row for group in groups for row in group]
        self.drafts = [self._within(row, drafts[row.number]) for row in self.rows]
        lengths = iter(self.drafts)
        trees = [(group[0].prompt, [next(lengths) for _ in group]) for group in groups]
        self.shared = model.attn_implementation != "splash"  # which has no parents
        self.forest = pack_forest(trees, shared=self.shared)

    def _within(self, row: Row, draft: Tokens) -> np.ndarray:
        """A draft up to its first EOS token, and the row's limit."""
        ids = np.asarray(draft, np.int32)[: row.limit]
        ends = np.flatnonzero(np.isin(ids, self.config.eos_token_ids))
        return ids[: ends[0] + 1] if len(ends) else ids

    def run(self, keys, decode: Decode | None) -> tuple[Prefilled, int]:
        rows, starts = self.forest.rows, self.forest.starts
        shape = rows["input_ids"].shape
        number, place = np.zeros((2, shape[0] * shape[1]), np.int32)
        for i, (start, draft) in enumerate(zip(starts, self.drafts, strict=True)):
            number[start : start + len(draft)] = i
            place[start : start + len(draft)] = np.arange(len(draft))
        # The number of keys is a multiple of 16, so that few shapes are compiled for.
        numbers = [row.number for row in self.rows]
        numbers += numbers[:1] * (-len(numbers) % 16)
        states, tokens, logprobs = verify(
            self.model,
            self.params,
            {name: value for name, value in rows.items() if self.shared or name != "parent_ids"},
            keys(numbers),
            number,
            place,
            rules_of(self.config, self.model.config.vocab_size),
            np.int32(self.config.min_new_tokens),
            top_k=self.config.top_k,
        )
        tokens, logprobs = jax.device_get((tokens, logprobs))
        accepted = 0
        for row, start, draft in zip(self.rows, starts, self.drafts, strict=True):
            own = slice(start, start + len(draft))
            accepted += self._accept(row, draft, tokens[own], logprobs[own], decode)
        left = [i for i, row in enumerate(self.rows) if row.reason is None]
        return (self._prefilled(states, left) if left else {}), accepted

    def _accept(self, row: Row, draft, tokens, logprobs, decode: Decode | None) -> int:
        """Gives a row the accepted tokens of its draft, whose number it returns, and one more."""
        count = int((tokens == draft).cumprod().sum())
        row.tokens = tokens[: count + 1].tolist()
        row.logprobs = logprobs[: count + 1].tolist()
        check_finite(row, np.asarray(row.logprobs))
        ended = row.tokens[-1] in self.config.eos_token_ids or len(row.tokens) == row.limit
        end_row(row, 0, ended, self.config, decode)
        return min(count, len(row.tokens))

    def _prefilled(self, states, left: list[int]) -> Prefilled:
        """Keys and values of the rows `left`, each of all tokens but its last."""
        T = self.forest.rows["input_ids"].shape[1]
        P = bucket_size(max(self.rows[i].position for i in left), PROMPT, halves=True)
        places = np.zeros((bucket_size(len(left), 1), P), np.int32)
        found: Prefilled = {}
        for source, i in enumerate(left):
            row, start = self.rows[i], int(self.forest.starts[i])
            last = start // T * T + int(self.forest.rows["previous"].reshape(-1)[start])
            root = len(row.prompt)
            places[source, :root] = np.arange(last + 1 - root, last + 1)
            places[source, root : row.position] = start + np.arange(row.position - root)
            row.prompt_index = -1 - row.number
        gathered = gather_columns(states, places)
        for source, i in enumerate(left):
            found[self.rows[i].prompt_index] = (gathered, places, source)
        return found


@functools.partial(jax.jit, static_argnames=("model", "top_k"))
def verify(
    model: Transformer,
    params,
    forest: dict[str, jax.Array],
    keys: jax.Array,
    number: jax.Array,
    place: jax.Array,
    rules: Rules,
    min_new_tokens: jax.Array,
    *,
    top_k: int,
):
    """Samples the token of every place of packed drafts, given those before it in its draft.

    Args:
      forest: arrays `[B, T]`, see `relax.data.forest`.
      keys: `[N]`, of the rows.
      number: `[M]` int, the row that a token belongs to.
      place: `[M]` int, its place in the draft.
      rules, min_new_tokens, top_k: sampling options.

    Returns:
      The keys and values of all tokens, as `prefill_packed` gives them; `[M]` tokens and
      log-probabilities, which mean nothing outside of drafts.
    """
    names = ("input_ids", "positions", "segment_ids", "parent_ids")
    inputs = [forest.get(name) for name in names]
    found: Any = model.apply({"params": params}, *inputs, method="prefill_packed")
    hidden, states = found
    previous = jnp.maximum(forest["previous"], 0)[:, :, None]
    before = jnp.take_along_axis(hidden, previous, axis=1).reshape(-1, hidden.shape[-1])
    matrix, softcap = model.output_matrix(params), model.config.final_logit_softcapping

    def chunk(part):
        before, number, place = part
        return sample_token(
            token_logits(before, matrix, softcap=softcap),
            jax.vmap(jax.random.fold_in)(keys[number], place),
            rules,
            top_k=top_k,
            too_short=place < min_new_tokens,
            coupled=True,
        )

    def split(x):
        x = jnp.pad(x, ((0, -len(x) % CHUNK), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(-1, CHUNK, *x.shape[1:])

    tokens, logprobs = jax.lax.map(chunk, jax.tree.map(split, (before, number, place)))
    M = len(before)
    return states, tokens.reshape(-1)[:M], logprobs.reshape(-1)[:M]


@jax.jit
def gather_columns(states, places: jax.Array):
    """Keys and values `[C, K, P, H]` of tokens `places` `[C, P]` of packed rows."""

    def gather(x):
        B, K, T, H = x.shape
        return x.swapaxes(1, 2).reshape(B * T, K, H)[places].swapaxes(1, 2)

    return jax.tree.map(gather, states)
