"""Requests side by side: rows that come and go, each with its own settings, seed and end.

    requests = Requests(model, params, eos_token_ids, decode, slots=8)
    row = requests.submit(Request(prompt, key, max_new_tokens=100))
    while row.reason is None:
        requests.advance()

The number of slots is fixed, so a row's tokens depend on its request alone, whatever is decoded
beside it. With `fixed` the cache is of one size too, and so is every bit of the log-probabilities.
With `prefix_caching` a prompt that begins with the tokens of a slot that is free again, as the next
turn of a chat does, is computed from there on. One thread at a time may use the object.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from relax import parallel
from relax.errors import ConfigError, NonFiniteError
from relax.models.cache import has_columns_alone
from relax.sampling import step
from relax.sampling.batch import COLUMNS, EXTENSION, PROMPT, bucket_size
from relax.sampling.config import checked_prompts, max_positions
from relax.sampling.generate import weights_for
from relax.sampling.parked import Parked
from relax.sampling.request_step import Chosen, Sampled, Settings, run_requests
from relax.sampling.stops import Decode, find_stop

PREFILLED = 4  # prompts whose prefill is kept, for several completions of one prompt
AGE = 4  # times the slots: requests after which a sequence in a free slot keeps no columns


@dataclasses.dataclass(frozen=True)
class Request:
    """A completion to sample.

    Attributes:
      prompt: token ids, at least one.
      key: its random key; token t is sampled with fold_in(key, t).
      max_new_tokens: maximum tokens of the completion (>= 1).
      temperature: 0: greedy.
      top_p: total probability of the most likely tokens that are sampled from, in (0, 1].
      stop: texts that end the completion.
      alternatives: record the most likely tokens beside each sampled one.
      name: any text, for the one who asks.
    """

    prompt: Sequence[int]
    key: jax.Array
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    alternatives: bool = False
    name: str = ""


@dataclasses.dataclass(eq=False)
class RequestRow:
    """A request in progress and its tokens so far; `Chosen` gives the fields' meaning.

    Attributes:
      reused: first tokens of the prompt that were in the cache already.
      reason: `eos`, `stop`, `length` or `cancelled`; None: not finished.
    """

    request: Request
    prompt: np.ndarray
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    sampled_logprobs: list[float] = dataclasses.field(default_factory=list)
    top_tokens: list[list[int]] = dataclasses.field(default_factory=list)
    top_logprobs: list[list[float]] = dataclasses.field(default_factory=list)
    reused: int = 0
    reason: str | None = None

    @property
    def position(self) -> int:
        return len(self.prompt) - 1 + len(self.tokens)

    def cut(self, length: int) -> None:
        """Drops the tokens behind the first `length`."""
        for name in Chosen._fields:
            del getattr(self, name)[length:]


class Requests:
    """Slots on the device, the rows in them, and waiting rows.

    Args:
      model, params: as `load_pretrained` gives them.
      eos_token_ids: tokens that end a completion, as its last token.
      decode: turns ids into the text that is searched for stop strings.
      slots: rows decoded at the same time (>= 1).
      max_length: tokens of a prompt and its completion together; None: the model's positions.
      fixed: hold a cache of `max_length` columns from the start; else it grows with the rows in
        progress, and the last bits of log-probabilities may depend on it.
      prefix_caching: continue what free slots hold. The last bits of log-probabilities then depend
        on what was asked before. Without effect on a mesh.
      segment: tokens per row between two looks at waiting and cancelled rows (>= 1).

    Raises:
      ConfigError: `max_length` is above the model's positions.

    Attributes:
      prefilled_tokens: tokens of prompts that were computed, for metrics.
    """

    def __init__(
        self,
        model,
        params,
        eos_token_ids: Sequence[int],
        decode: Decode,
        *,
        slots: int = 8,
        max_length: int | None = None,
        fixed: bool = False,
        prefix_caching: bool = False,
        segment: int = 8,
    ):
        room, why = max_positions(model.config)
        if max_length is not None and max_length > room:
            raise ConfigError(
                f"max_length={max_length} (--max_model_len, or --agent_max_length) is above the "
                f"{room} positions {why}: give {room} at most, or leave it out."
            )
        if max_length is not None and max_length < room:
            room, why = max_length, "allowed here"
        self.model, self.room, self.why = model, room, why
        self.eos, self.decode, self.segment = tuple(eos_token_ids), decode, segment
        self.ends = step.StopRules(jnp.asarray(self.eos, jnp.int32), jnp.int32(0))
        self.waiting: collections.deque[RequestRow] = collections.deque()
        self.slots: list[RequestRow | None] = [None] * slots
        self.fixed = bucket_size(room, COLUMNS) if fixed else None
        self.S = self.fixed or COLUMNS
        self.prefix_caching = prefix_caching and parallel.layout() is None
        self.prefilled_tokens = 0
        self.set_params(params)

    def set_params(self, params) -> None:
        """Replaces the parameters; no request may be in progress."""
        self.params = weights_for(self.model, params)
        self.prefilled: collections.OrderedDict[bytes, tuple] = collections.OrderedDict()
        self._clear()

    @property
    def running(self) -> list[RequestRow]:
        return [row for row in self.slots if row is not None]

    @property
    def under_way(self) -> bool:
        return bool(self.waiting or self.running)

    def submit(self, request: Request) -> RequestRow:
        """Adds a request, which starts when a slot is free.

        Raises:
          ConfigError: the prompt is invalid, or does not fit with its completion.
        """
        (prompt,) = checked_prompts([request.prompt], self.model.config)
        self.check_length(len(prompt), request.max_new_tokens)
        row = RequestRow(request, prompt)
        self.waiting.append(row)
        return row

    def check_length(self, prompt: int, new: int) -> None:
        """Raises ConfigError if a prompt and a completion of these lengths do not fit."""
        if prompt + new > self.room:
            raise ConfigError(
                f"a prompt of {prompt} tokens and {new} new ones do not fit the {self.room} "
                f"positions {self.why}. Shorten the prompt or lower the maximum of new tokens."
            )

    def cancel(self, row: RequestRow) -> None:
        """Ends a row; its slot is free at the next call of `advance`."""
        if row.reason is None:
            row.reason = "cancelled"

    def reset(self) -> None:
        """Cancels all rows and makes new slots, after an error of the device too."""
        for row in (*self.waiting, *self.running):
            self.cancel(row)
        self._free_cancelled()
        self._clear()

    def advance(self) -> list[tuple[RequestRow, int]]:
        """Starts waiting rows, decodes one segment; returns rows and the numbers of new tokens.

        Raises:
          NonFiniteError: the model's logits are NaN or infinite.
        """
        self._free_cancelled()
        self._fill()
        running = self.running
        if not running:
            return []
        steps = min(self.segment, max(r.request.max_new_tokens - len(r.tokens) for r in running))
        self._make_room(max(row.position for row in running) + steps)
        # With rows waiting a segment ends with the first row that does.
        free = len(self.slots) - len(running)
        stop_when = free + 1 if self.waiting else len(self.slots)
        return self._take(self._decode(steps, stop_when))

    def _clear(self) -> None:
        """Makes new slots."""
        self.S, shape = self.fixed or COLUMNS, (len(self.slots),)
        keys = jnp.broadcast_to(jax.random.key(0), shape)
        self.cache, self.state = step.empty(self.model, keys, len(self.slots), self.S, False)
        self.parked = Parked(cuts=has_columns_alone(self.cache))

    def _free_cancelled(self) -> None:
        self.waiting = collections.deque(row for row in self.waiting if row.reason is None)
        for place, row in enumerate(self.slots):
            if row is not None and row.reason is not None:
                self._free(place, row)

    def _free(self, place: int, row: RequestRow) -> None:
        """Frees the slot of a row that has ended; its tokens but the last one stay in the cache."""
        self.slots[place] = None
        if self.prefix_caching and (self.parked.cuts or row.reason != "stop"):
            tokens = np.array(row.tokens, np.int32)
            self.parked.park(place, np.concatenate([row.prompt, tokens])[:-1], len(row.prompt))

    def _fill(self) -> None:
        """Puts waiting rows into free slots, in the order of their arrival."""
        if self.fixed is None and not self.running and self.S > COLUMNS:
            self._shrink()  # the long rows have gone
        while self.waiting and None in self.slots:
            self._admit(self.waiting.popleft())

    def _shrink(self) -> None:
        longest = self.parked.longest(AGE * len(self.slots))
        columns = bucket_size(longest + 1, COLUMNS)  # and one that free slots write again and again
        if not longest:
            self._clear()
        elif columns < self.S:
            held = [len(self.parked.ids.get(place, ())) for place in range(len(self.slots))]
            self.state = self.state._replace(positions=jnp.array(held, jnp.int32))
            self._resize(columns)

    def _admit(self, row: RequestRow) -> None:
        found = None
        if row.prompt.tobytes() not in self.prefilled:
            found = self.parked.match(row.prompt)
        if found is not None:
            place, row.reused = found
            self._continue(place, row)
        else:
            free = [place for place, one in enumerate(self.slots) if one is None]
            place = self.parked.place(free)
            self._begin(place, row)
        self.parked.drop(place)
        self.slots[place] = row

    def _continue(self, place: int, row: RequestRow) -> None:
        """Computes the tokens of a prompt that its slot does not hold yet."""
        self._make_room(len(row.prompt))
        places, last = np.array([place], np.int32), len(row.prompt) - 1
        for first in range(row.reused, last, EXTENSION):
            new = row.prompt[first : min(first + EXTENSION, last)]
            ids = np.zeros((1, bucket_size(len(new), PROMPT)), np.int32)
            ids[0, : len(new)] = new
            starts, lengths = np.array([[first], [len(new)]], np.int32)
            fresh = np.zeros((1,), bool)
            self.cache = step.extend(
                self.model, self.params, self.cache, places, ids, starts, lengths, fresh
            )
        self.prefilled_tokens += last - row.reused
        self.state = step.go_on(self.state, places, _slots_of(row, 1), None)

    def _begin(self, place: int, row: RequestRow) -> None:
        prefilled = self._prefill(row.prompt)
        self._make_room(min(bucket_size(len(row.prompt) - 1, PROMPT, halves=True), self.room))
        B = len(self.slots)
        places, sources = np.full((B,), place, np.int32), np.zeros((B,), np.int32)
        self.cache, self.state = step.admit(
            self.cache, self.state, prefilled, None, np.int32(1), places, sources, _slots_of(row, B)
        )

    def _prefill(self, prompt: np.ndarray) -> tuple:
        """The prefill of all but the last token of a prompt, alone in its batch."""
        key = prompt.tobytes()
        if key not in self.prefilled:
            P = min(bucket_size(len(prompt) - 1, PROMPT, halves=True), self.room)
            ids = np.zeros((1, P), np.int32)
            ids[0, : len(prompt) - 1] = prompt[:-1]
            length = np.array([len(prompt) - 1])
            self.prefilled[key] = step.prefill(self.model, self.params, ids, length)
            self.prefilled_tokens += len(prompt) - 1
            while len(self.prefilled) > PREFILLED:
                self.prefilled.popitem(last=False)
        self.prefilled.move_to_end(key)
        return self.prefilled[key]

    def _make_room(self, columns: int) -> None:
        if columns > self.S:
            self._resize(bucket_size(columns, COLUMNS))

    def _resize(self, S: int) -> None:
        index, self.S = np.arange(len(self.slots), dtype=np.int32), S
        self.cache, self.state = step.resize(self.cache, self.state, index, S)

    def _decode(self, steps: int, stop_when: int) -> Sampled:
        asked = [None if row is None else row.request for row in self.slots]
        # Numpy arrays: the compiled program moves them to the device.
        settings = Settings._make(
            [
                np.array([0.0 if r is None else r.temperature for r in asked], np.float32),
                np.array([1.0 if r is None else r.top_p for r in asked], np.float32),
                np.array([r is not None and r.alternatives for r in asked], bool),
            ]
        )
        self.cache, self.state, sampled = run_requests(
            self.model,
            self.params,
            self.cache,
            self.state,
            np.array([r is None for r in asked]),
            settings,
            self.ends,
            np.int32(steps),
            np.int32(stop_when),
            N=self.segment,
        )
        return jax.device_get(sampled)

    def _take(self, sampled: Sampled) -> list[tuple[RequestRow, int]]:
        """Adds a segment's tokens to their rows, and frees the slots of finished rows."""
        taken = []
        for place, row in enumerate(self.slots):
            if row is None:
                continue
            count, before = int(sampled.drawn[place]), len(row.tokens)
            for name, values in sampled.chosen._asdict().items():
                if row.request.alternatives or not name.startswith("top_"):
                    getattr(row, name).extend(values[:count, place].tolist())
            self._end(row, before, bool(sampled.ended[place]))
            if row.reason is not None:
                self._free(place, row)
            taken.append((row, len(row.tokens) - before))
        return taken

    def _end(self, row: RequestRow, before: int, ended: bool) -> None:
        wrong = [x for x in row.logprobs[before:] if not math.isfinite(x)]
        if wrong:
            raise NonFiniteError(
                f"a token has the log-probability {wrong[0]}: the model's logits are NaN or "
                "infinite. Look at its weights, or compute in float32."
            )
        if row.request.stop and len(row.tokens) > before:
            text = row.tokens[:-1] if row.tokens[-1] in self.eos else row.tokens
            cut = find_stop(text, before, row.request.stop, 0, self.decode)
            if cut is not None:
                row.cut(cut)
                row.reason = "stop"
                return
        if ended:
            row.reason = "eos" if row.tokens[-1] in self.eos else "length"


def _slots_of(row: RequestRow, B: int) -> step.Slots:
    """The first state of a row, B times."""
    start = (row.prompt[-1], row.position, 0, row.request.max_new_tokens)
    tokens, positions, drawn, limits = (np.full((B,), x, np.int32) for x in start)
    keys = jnp.broadcast_to(row.request.key, (B,))
    ended = np.zeros((B,), bool)
    return step.Slots._make([tokens, positions, drawn, limits, ended, keys, None])
