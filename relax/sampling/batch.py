"""Continuous batching: the slots of a generation and the rows that pass through them.

1. Prompts are split into batches of similar numbers of tokens and prefilled once, when the first of
   their samples starts; every sample copies its prompt's keys and values into its slot.
2. A compiled segment decodes all slots until enough of them have finished, or for a number of
tokens. 3. The host reads the new tokens, searches for stop strings, and gives the slots of finished
rows to
   waiting ones; when none wait and few rows are left, these move to a smaller cache.
4. The cache doubles when a row reaches its end.

A row does not depend on the rows beside it: it has its own key and its own columns.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from relax import parallel
from relax.errors import NonFiniteError
from relax.sampling import step
from relax.sampling.config import SamplingConfig, max_positions
from relax.sampling.distribution import Rules
from relax.sampling.stops import Decode, find_stop

COLUMNS = 64  # columns of the smallest cache
PROMPT = 16  # tokens of the smallest prefill
PREFILL_TOKENS = 1024  # tokens per prefill with padding, unless one prompt is longer
SHRINK = 4  # a cache shrinks when at most one in SHRINK slots is in use


@dataclasses.dataclass
class Row:
    """A completion in progress."""

    number: int
    prompt_index: int
    prompt: np.ndarray
    limit: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    reason: str | None = None

    @property
    def position(self) -> int:
        """Position of the next token to decode: the last sampled one, or the prompt's last."""
        return len(self.prompt) - 1 + len(self.tokens)


class Plan(NamedTuple):
    """The bounds of a segment."""

    steps: int  # maximum tokens per row
    columns: int  # columns of the cache that the rows need
    stop_when: int  # number of finished or free slots at which it ends early


def plan_segment(running: Sequence[Row], *, slots: int, waiting: bool, most: int) -> Plan:
    """Plans a segment of at most `most` tokens for the rows in progress.

    If rows are waiting, it ends as soon as a few more slots are free, which they then get.
    Otherwise it ends when all have finished, or when the rest fits a smaller cache.
    """
    steps = min(most, max(row.limit - len(row.tokens) for row in running))
    columns = max(row.position for row in running) + steps
    if waiting:
        stop_when = slots - len(running) + max(1, len(running) // 8)
    else:
        few = slots // SHRINK
        stop_when = slots - few if len(running) > few else slots
    return Plan(steps, columns, stop_when)


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
    ):
        """keys: a function from row numbers to their keys."""
        self.model, self.params, self.config = model, params, config
        self.keys, self.decode = keys, decode
        self.room = max_positions(model.config)[0]
        self.rules = _rules(config, model.config.vocab_size)
        self.ends = step.StopRules(
            jnp.asarray(config.eos_token_ids, jnp.int32), jnp.int32(config.min_new_tokens)
        )
        # Prompts of similar length share a prefill; short ones, which need few columns, go first.
        self.waiting = collections.deque(sorted(rows, key=lambda row: self._padded(row.prompt)))
        self.prefilled: dict[int, tuple] = {}  # prompt -> (keys and values, prompts, row of these)
        self.S = COLUMNS
        self.fewest = parallel.batch_shards()  # minimum number of slots
        slots = _bucket(min(config.slots, len(rows)), self.fewest)
        self.slots: list[Row | None] = [None] * slots
        self.cache, self.state = step.empty(
            model, keys([0] * len(self.slots)), len(self.slots), self.S, self._counts_seen()
        )

    def under_way(self) -> bool:
        return bool(self.waiting) or any(self.slots)

    def fill(self) -> None:
        """Puts waiting rows into free slots, one prefill after another."""
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
        running = [row for row in self.slots if row is not None]
        plan = plan_segment(
            running, slots=len(self.slots), waiting=bool(self.waiting), most=self.config.segment
        )
        if plan.columns > self.S:
            self._resize(range(len(self.slots)), _bucket(plan.columns, COLUMNS))
        return self._take(self._decode(plan))

    def _decode(self, plan: Plan) -> step.Segment:
        """Runs a segment on the device and copies its tokens to the host."""
        free = np.array([row is None for row in self.slots])
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
            N=self.config.segment,
        )
        return jax.device_get(segment)

    def _take(self, segment: step.Segment) -> list[tuple[Row, list[int]]]:
        """Adds a segment's tokens to their rows, and frees the slots of finished rows."""
        taken = []
        for place, row in enumerate(self.slots):
            if row is None:
                continue
            count, before = int(segment.drawn[place]), len(row.tokens)
            row.tokens += segment.tokens[:count, place].tolist()
            logprobs = np.asarray(segment.logprobs[:count, place])
            _check_finite(row, logprobs)
            row.logprobs += logprobs.tolist()
            self._end(row, before, bool(segment.ended[place]))
            if row.reason is not None:
                self.slots[place] = None
            taken.append((row, row.tokens[before:]))
        return taken

    def _end(self, row: Row, before: int, ended: bool) -> None:
        config, eos = self.config, self.config.eos_token_ids
        if config.stop and self.decode is not None and len(row.tokens) > before:
            text = row.tokens[:-1] if row.tokens[-1] in eos else row.tokens
            cut = find_stop(text, before, config.stop, config.min_new_tokens, self.decode)
            if cut is not None:
                del row.tokens[cut:], row.logprobs[cut:]
                row.reason = "stop"
                return
        if ended:
            row.reason = "eos" if row.tokens[-1] in eos else "length"

    def _padded(self, prompt: np.ndarray) -> int:
        return min(_bucket(len(prompt) - 1, PROMPT, halves=True), self.room)

    def _counts_seen(self) -> bool:
        return self.config.repetition_penalty != 1.0

    def _prefilled(self, prompt_index: int) -> tuple:
        """The prefill of a prompt, together with as many following waiting prompts as fit."""
        if prompt_index in self.prefilled:
            return self.prefilled[prompt_index]
        prompts = dict.fromkeys(row.prompt_index for row in self.waiting)
        by_index = {row.prompt_index: row.prompt for row in self.waiting}
        P = self._padded(by_index[prompt_index])
        chosen = [i for i in prompts if self._padded(by_index[i]) == P]
        chosen = chosen[: max(1, PREFILL_TOKENS // P)]
        C, V = _bucket(len(chosen), 1), self.model.config.vocab_size
        ids = np.full((C, P), V, np.int32)
        for source, i in enumerate(chosen):
            ids[source, : len(by_index[i]) - 1] = by_index[i][:-1]
        filled = step.prefill(self.model, self.params, np.where(ids == V, 0, ids))
        for source, i in enumerate(chosen):
            self.prefilled[i] = (filled, ids, source)
        return self.prefilled[prompt_index]

    def _admit(self, prefilled: tuple, admitted: list[tuple[int, Row, int]]) -> None:
        filled, ids, _ = prefilled
        if ids.shape[1] > self.S:
            self._resize(range(len(self.slots)), _bucket(ids.shape[1], COLUMNS))
        B, count = len(self.slots), len(admitted)
        places, sources, tokens, positions, limits = np.zeros((5, B), np.int32)
        numbers = [0] * B
        for i, (place, row, source) in enumerate(admitted):
            self.slots[place] = row
            places[i], sources[i], numbers[i] = place, source, row.number
            tokens[i], positions[i], limits[i] = row.prompt[-1], row.position, row.limit
        zeros = np.zeros((B,), np.int32)
        ended, keys = np.zeros((B,), bool), self.keys(numbers)
        # Numpy arrays: the compiled program moves them to the device.
        rows = step.Slots._make([tokens, positions, zeros, limits, ended, keys, None])
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
        running = [place for place, row in enumerate(self.slots) if row is not None]
        B = _bucket(len(running), self.fewest)
        if B * SHRINK <= len(self.slots):
            free = [place for place, row in enumerate(self.slots) if row is None]
            self._resize((running + free)[:B], self.S)

    def _resize(self, places: Sequence[int], S: int) -> None:
        index = np.array(places, np.int32)
        self.cache, self.state = step.resize(self.cache, self.state, index, S)
        self.slots, self.S = [self.slots[place] for place in places], S


def _check_finite(row: Row, logprobs: np.ndarray) -> None:
    """Raises an error if a row's last tokens were sampled from NaN or infinite logits."""
    wrong = np.flatnonzero(~np.isfinite(logprobs))
    if wrong.size:
        place = len(row.tokens) - len(logprobs) + wrong[0]
        raise NonFiniteError(
            f"token {place} of completion {row.number} has the log-probability "
            f"{logprobs[wrong[0]]}: the model's logits are NaN or infinite there. Look at its "
            "weights, or compute in float32."
        )


def _rules(config: SamplingConfig, V: int) -> Rules:
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


def _bucket(n: int, smallest: int, *, halves: bool = False) -> int:
    """Rounds n up to `smallest` times a power of two, or with `halves` 1.5 times that.

    >>> [_bucket(n, 16, halves=True) for n in (0, 16, 17, 25, 33)]
    [16, 16, 24, 32, 48]
    """
    size = smallest
    while size < n:
        if halves and size * 3 // 2 >= n:
            return size * 3 // 2
        size *= 2
    return size
