"""Continuous batching: the slots of a generation and the rows that pass through them.

1. Prompts are split into batches of similar numbers of tokens and prefilled once, when the first of
   their samples starts; every sample copies its prompt's state into its slot.
2. A compiled segment decodes all slots until enough of them have finished, or for a number of
tokens. 3. The host reads the new tokens, searches for stop strings, and gives the slots of finished
rows to
   waiting ones; when none wait and few rows are left, these move to a smaller cache.
4. The cache doubles when a row reaches its end.
5. A row that is kept stays in its slot when it has ended: it can be extended by tokens that were
   not sampled, such as the result of a tool, and goes on without being prefilled again.

A row does not depend on the rows beside it: it has its own key and its own columns.
"""

import collections
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from relax import parallel
from relax.models.cache import has_columns_alone
from relax.sampling import step
from relax.sampling.config import SamplingConfig, max_positions
from relax.sampling.distribution import Rules
from relax.sampling.rows import SHRINK, Plan, Row, check_finite, end_row, plan_segment
from relax.sampling.stops import Decode

COLUMNS = 64  # columns of the smallest cache
PROMPT = 16  # tokens of the smallest prefill
PREFILL_TOKENS = 1024  # tokens per prefill with padding, unless one prompt is longer
EXTENSION = 256  # tokens per row that are appended in one call


class Batch:
    """The slots on the device, the rows in them, and the waiting rows."""

    def __init__(
        self,
        model,
        params,
        config: SamplingConfig,
        keys: Callable[[list[int]], jax.Array],
        rows: Sequence[Row],
        decode: Decode | None,
        *,
        slots: int | None = None,
        shrinks: bool = True,
        prefilled: Mapping[int, tuple] | None = None,
    ):
        """Makes the slots; `rows` wait for them.

        Args:
          keys: a function from row numbers to their keys.
          slots: how many; None: as the configuration has them, or fewer if there are fewer rows.
          shrinks: free slots are given up when no row waits, since none will be added.
          prefilled: keys and values of prompts by their indices, as `prefilled` below.
        """
        self.model, self.params, self.config = model, params, config
        self.keys, self.decode = keys, decode
        self.room = max_positions(model.config)[0]
        self.rules = rules_of(config, model.config.vocab_size)
        self.ends = step.StopRules(
            jnp.asarray(config.eos_token_ids, jnp.int32), jnp.int32(config.min_new_tokens)
        )
        self.waiting: collections.deque[Row] = collections.deque()
        self.add(rows)
        # prompt -> (keys and values, prompts, row of these)
        self.prefilled: dict[int, tuple] = dict(prefilled or {})
        self.extended: list[tuple[Row, int]] = []  # with the first token that is not in the cache
        self.counts: collections.Counter[str] = collections.Counter()
        self.S, self.shrinks = COLUMNS, shrinks
        self.fewest = parallel.batch_shards()  # minimum number of slots
        self.slots: list[Row | None] = [None] * bucket_size(
            slots or min(config.slots, len(rows)), self.fewest
        )
        self.cache, self.state = step.empty(
            model, keys([0] * len(self.slots)), len(self.slots), self.S, self._counts_seen()
        )

    def under_way(self) -> bool:
        """Whether a row waits or is decoded; a kept row that has ended does neither."""
        return bool(self.waiting or self._running())

    def can_advance(self) -> bool:
        """Whether a row is decoded, or waits and a slot is free."""
        return bool(self._running() or (self.waiting and None in self.slots))

    def add(self, rows: Sequence[Row]) -> None:
        """Lets rows wait for slots."""
        # Prompts of similar length share a prefill; short ones, which need few columns, go first.
        self.waiting.extend(sorted(rows, key=lambda row: self._padded(row.prompt)))

    def extend(self, row: Row, ids: np.ndarray, number: int, limit: int) -> None:
        """Appends tokens to a kept row that has ended; it goes on under another number's key."""
        known = len(row.prompt) + len(row.tokens) - 1  # all but the last token are in the cache
        stale = row.dropped and not has_columns_alone(self.cache)
        self.extended.append((row, 0 if stale else known))
        row.prompt = np.concatenate([row.prompt, np.array(row.tokens, np.int32), ids])
        row.number, row.limit, row.reason, row.dropped = number, limit, None, 0
        row.tokens, row.logprobs = [], []

    def release(self, row: Row) -> None:
        """Gives a row's slot away, or its place among the waiting rows."""
        if row in self.waiting:
            self.waiting.remove(row)
        self.extended = [(one, known) for one, known in self.extended if one is not row]
        self.slots = [None if one is row else one for one in self.slots]

    def _running(self) -> list[Row]:
        return [row for row in self.slots if row is not None and row.reason is None]

    def fill(self) -> None:
        """Computes what was appended, and puts waiting rows into free slots."""
        self._extend()
        free = [place for place, row in enumerate(self.slots) if row is None]
        while self.waiting and free:
            prefilled = self._prefilled(self.waiting[0].prompt_index)
            admitted: list[tuple[int, Row, int]] = []
            while self.waiting and free:
                found = self.prefilled.get(self.waiting[0].prompt_index)
                if found is None or found[0] is not prefilled[0]:
                    break
                admitted.append((free.pop(0), self.waiting.popleft(), found[2]))
            self._admit(prefilled, admitted)
        still = {row.prompt_index for row in self.waiting}
        self.prefilled = {i: found for i, found in self.prefilled.items() if i in still}
        if not self.waiting:
            self._shrink()

    def advance(self) -> list[tuple[Row, list[int]]]:
        """Decodes one segment; returns the rows in progress with their new tokens."""
        running = self._running()
        plan = plan_segment(
            running,
            slots=len(self.slots),
            waiting=bool(self.waiting) or any(row.kept for row in running),
            most=self.config.segment,
        )
        if plan.columns > self.S:
            self._resize(range(len(self.slots)), bucket_size(plan.columns, COLUMNS))
        return self._take(self._decode(plan))

    def _decode(self, plan: Plan) -> step.Segment:
        """Runs a segment on the device and copies its tokens to the host."""
        free = np.array([row is None or row.reason is not None for row in self.slots])
        self.cache, self.state, segment = step.run_segment(
            self.model,
            self.params,
            self.cache,
            self.state,
            free,
            self.rules,
            self.ends,
            np.int32(plan.steps),
            np.int32(plan.stop_when),
            top_k=self.config.top_k,
            coupled=self.config.coupled,
            N=self.config.segment,
        )
        return jax.device_get(segment)

    def _take(self, segment: step.Segment) -> list[tuple[Row, list[int]]]:
        """Adds a segment's tokens to their rows, and frees the slots of finished rows."""
        taken = []
        for place, row in enumerate(self.slots):
            if row is None or row.reason is not None:
                continue
            count, before = int(segment.drawn[place]), len(row.tokens)
            row.tokens += segment.tokens[:count, place].tolist()
            logprobs = np.asarray(segment.logprobs[:count, place])
            check_finite(row, logprobs)
            row.logprobs += logprobs.tolist()
            self.counts["sampled"] += count
            end_row(row, before, bool(segment.ended[place]), self.config, self.decode)
            if row.reason is not None and not row.kept:
                self.slots[place] = None
            taken.append((row, row.tokens[before:]))
        return taken

    def _padded(self, prompt: np.ndarray) -> int:
        return min(bucket_size(len(prompt) - 1, PROMPT, halves=True), self.room)

    def _counts_seen(self) -> bool:
        return self.config.repetition_penalty != 1.0

    def _prefilled(self, prompt_index: int) -> tuple:
        """The prefill of a prompt, together with as many following waiting prompts as fit."""
        if prompt_index in self.prefilled:
            return self.prefilled[prompt_index]
        prompts = dict.fromkeys(row.prompt_index for row in self.waiting)
        by_index = {row.prompt_index: row.prompt for row in self.waiting}
        P = self._padded(by_index[prompt_index])
        missing = [i for i in prompts if i not in self.prefilled]
        chosen = [i for i in missing if self._padded(by_index[i]) == P]
        fitting = max(1, PREFILL_TOKENS // P)
        chosen = chosen[: 1 << (fitting.bit_length() - 1)]  # as C is one
        C, V = bucket_size(len(chosen), 1), self.model.config.vocab_size
        ids = np.full((C, P), V, np.int32)
        for source, i in enumerate(chosen):
            ids[source, : len(by_index[i]) - 1] = by_index[i][:-1]
        real = ids < V
        self.counts["prefilled"] += int(real.sum())
        filled = step.prefill(self.model, self.params, np.where(real, ids, 0), real.sum(axis=1))
        for source, i in enumerate(chosen):
            self.prefilled[i] = (filled, ids, source)
        return self.prefilled[prompt_index]

    def _extend(self) -> None:
        """Computes the tokens appended to rows, in parts, and lets the rows go on."""
        extended, self.extended = self.extended, []
        if not extended:
            return
        longest = max(len(row.prompt) for row, _ in extended)
        if longest > self.S:
            self._resize(range(len(self.slots)), bucket_size(longest, COLUMNS))
        parts = [(self.slots.index(row), row.prompt[first:-1], first) for row, first in extended]
        parts = [part for part in parts if len(part[1])]
        while parts:
            parts.sort(key=lambda part: -len(part[1]))
            T = min(bucket_size(len(parts[0][1]), PROMPT), EXTENSION)
            now = parts[: max(1, PREFILL_TOKENS // T)]
            self._append([(place, ids[:T], first) for place, ids, first in now], T)
            left = [(place, ids[T:], first + T) for place, ids, first in now if len(ids) > T]
            parts = left + parts[len(now) :]
        self._go_on([row for row, _ in extended])

    def _append(self, parts: list[tuple[int, np.ndarray, int]], T: int) -> None:
        """Appends at most T tokens to some slots: (slot, tokens, position of the first)."""
        B = len(self.slots)
        everywhere = parallel.layout() is not None
        C = B if everywhere else bucket_size(len(parts), 1)
        ids, lengths, starts = np.zeros((C, T), np.int32), *np.zeros((2, C), np.int32)
        places = np.full((C,), B, np.int32)
        for i, (place, new, first) in enumerate(parts):
            i = place if everywhere else i
            ids[i, : len(new)], lengths[i], starts[i], places[i] = new, len(new), first, place
        self.counts["appended"] += int(lengths.sum())
        self.cache = step.extend(
            self.model,
            self.params,
            self.cache,
            None if everywhere else places,
            ids,
            starts,
            lengths,
            (starts == 0) & (lengths > 0),
        )

    def _go_on(self, rows: list[Row]) -> None:
        C, B, V = bucket_size(len(rows), 1), len(self.slots), self.model.config.vocab_size
        tokens, positions, drawn, limits = np.zeros((4, C), np.int32)
        places, numbers = np.full((C,), B, np.int32), [rows[0].number] * C
        for i, row in enumerate(rows):
            places[i], numbers[i] = self.slots.index(row), row.number
            tokens[i], positions[i], limits[i] = row.prompt[-1], row.position, row.limit
        seen = None
        if self._counts_seen():
            longest = max(len(row.prompt) for row in rows)
            seen = np.full((C, bucket_size(longest, COLUMNS)), V, np.int32)
            for i, row in enumerate(rows):
                seen[i, : len(row.prompt)] = row.prompt
        ended, keys = np.zeros((C,), bool), self.keys(numbers)
        values = step.Slots._make([tokens, positions, drawn, limits, ended, keys, None])
        self.state = step.go_on(self.state, places, values, seen)

    def _admit(self, prefilled: tuple, admitted: list[tuple[int, Row, int]]) -> None:
        filled, ids, _ = prefilled
        if ids.shape[1] > self.S:
            self._resize(range(len(self.slots)), bucket_size(ids.shape[1], COLUMNS))
        B, count = len(self.slots), len(admitted)
        places, sources, tokens, positions, drawn, limits = np.zeros((6, B), np.int32)
        numbers = [0] * B
        for i, (place, row, source) in enumerate(admitted):
            self.slots[place] = row
            places[i], sources[i], numbers[i] = place, source, row.number
            tokens[i], positions[i] = row.last_token, row.position
            drawn[i], limits[i] = len(row.tokens), row.limit
        ended, keys = np.zeros((B,), bool), self.keys(numbers)
        # Numpy arrays: the compiled program moves them to the device.
        rows = step.Slots._make([tokens, positions, drawn, limits, ended, keys, None])
        self.cache, self.state = step.admit(
            self.cache,
            self.state,
            filled,
            ids if self._counts_seen() else None,
            np.int32(count),
            places,
            sources,
            rows,
        )

    def _shrink(self) -> None:
        """Moves the rows in progress to a smaller cache if there are few."""
        if not self.shrinks:
            return
        running = [place for place, row in enumerate(self.slots) if row is not None]
        B = bucket_size(len(running), self.fewest)
        if B * SHRINK <= len(self.slots):
            free = [place for place, row in enumerate(self.slots) if row is None]
            self._resize((running + free)[:B], self.S)

    def _resize(self, places: Sequence[int], S: int) -> None:
        index = np.array(places, np.int32)
        self.cache, self.state = step.resize(self.cache, self.state, index, S)
        self.slots, self.S = [self.slots[place] for place in places], S


def rules_of(config: SamplingConfig, V: int) -> Rules:
    """The changes of the logits that a configuration asks for."""

    def unless(off, value):
        return None if value == off else np.float32(value)

    bias = None
    if config.logit_bias:
        bias = np.zeros((V,), np.float32)
        bias[list(config.logit_bias)] = list(config.logit_bias.values())
    bans = config.eos_token_ids and config.min_new_tokens
    return Rules(
        logit_bias=bias,
        repetition_penalty=unless(1.0, config.repetition_penalty),
        eos_token_ids=np.array(config.eos_token_ids, np.int32) if bans else None,
        temperature=unless(0.0, config.temperature),
        top_p=unless(1.0, config.top_p),
        min_p=unless(0.0, config.min_p),
    )


def bucket_size(n: int, smallest: int, *, halves: bool = False) -> int:
    """Rounds n up to `smallest` times a power of two, or with `halves` 1.5 times that.

    >>> [bucket_size(n, 16, halves=True) for n in (0, 16, 17, 25, 33)]
    [16, 16, 24, 32, 48]
    """
    size = smallest
    while size < n:
        if halves and size * 3 // 2 >= n:
            return size * 3 // 2
        size *= 2
    return size
