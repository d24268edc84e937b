"""Rows of a generation, and the bounds of the segments that decode them."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from relax.errors import NonFiniteError
from relax.sampling.config import SamplingConfig
from relax.sampling.stops import Decode, find_stop

SHRINK = 4  # a cache shrinks when at most one in SHRINK slots is in use


@dataclasses.dataclass(eq=False)
class Row:
    """A completion in progress.

    Attributes:
      number: names its key.
      prompt_index: rows that wait with the same index share a prefill.
      prompt: tokens before the completion.
      limit: maximum tokens of the completion.
      kept: it stays in its slot when it has ended.
      tokens, logprobs: the completion so far.
      reason: why it ended: `eos`, `stop` or `length`; None: it has not.
      dropped: tokens sampled after its end, which are in the cache.
    """

    number: int
    prompt_index: int
    prompt: np.ndarray
    limit: int
    kept: bool = False
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    reason: str | None = None
    dropped: int = 0

    @property
    def last_token(self) -> int:
        return int((self.tokens or self.prompt)[-1])

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
    columns = max(row.position for row in running) + steps + 1
    if waiting:
        stop_when = slots - len(running) + max(1, len(running) // 8)
    else:
        few = slots // SHRINK
        stop_when = slots - few if len(running) > few else slots
    return Plan(steps, columns, stop_when)


def end_row(
    row: Row, before: int, ended: bool, config: SamplingConfig, decode: Decode | None
) -> None:
    """Gives a row its reason if it has ended, and drops what is behind a stop string.

    Args:
      before: number of first tokens known to contain no stop string.
      ended: whether its last token is an EOS token or the last of its limit.
    """
    eos = config.eos_token_ids
    if config.stop and decode is not None and len(row.tokens) > before:
        text = row.tokens[:-1] if row.tokens[-1] in eos else row.tokens
        cut = find_stop(text, before, config.stop, config.min_new_tokens, decode)
        if cut is not None:
            row.dropped = len(row.tokens) - cut
            del row.tokens[cut:], row.logprobs[cut:]
            row.reason = "stop"
            return
    if ended:
        row.reason = "eos" if row.tokens[-1] in eos else "length"


def check_finite(row: Row, logprobs: np.ndarray) -> None:
    """Raises an error if a row's last tokens were sampled from NaN or infinite logits."""
    wrong = np.flatnonzero(~np.isfinite(logprobs))
    if wrong.size:
        place = len(row.tokens) - len(logprobs) + wrong[0]
        raise NonFiniteError(
            f"token {place} of completion {row.number} has the log-probability "
            f"{logprobs[wrong[0]]}: the model's logits are NaN or infinite there. Look at its "
            "weights, or compute in float32."
        )
