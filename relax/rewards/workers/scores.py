"""Scores a batch in spite of single completions that make a reward function fail."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

# `raised`: an exception. `hung`: no answer in time. `died`: the process ended. `shape`: not a list
# with one item for each completion. `result`: an item that is neither a finite number nor None.
Kind = Literal["raised", "hung", "died", "shape", "result"]

MAX_LOST = 3  # maximum number of completions per batch that may cost a time limit or a process


class CallFailed(Exception):
    """A call of a reward function failed."""

    def __init__(self, kind: Kind, reason: str):
        super().__init__(reason)
        self.kind, self.reason = kind, reason


@dataclass
class Scores:
    """A function's result for some completions.

    Attributes:
      values: one per completion; None where not applicable or failed.
      failures: (kind, reason) by position, for completions without a result.
      extras: logged columns, with a value per completion.
      metrics: logged numbers.
    """

    values: list[float | None]
    failures: dict[int, tuple[Kind, str]] = field(default_factory=dict)
    extras: dict[str, list] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)


def scores_of(message: dict) -> Scores:
    """Restores scores sent as `vars(scores)`, since keys in JSON are strings."""
    failures = {int(i): tuple(why) for i, why in message["failures"].items()}
    return Scores(**message | {"failures": failures})


def score(call: Callable[[list[int]], Scores], n: int) -> Scores:
    """Scores n completions; finds those that make the call fail and omits them.

    After a failed call each completion is tried alone, then all that succeeded are scored together
    again, since functions that compare the completions of a batch need a batch. If that call fails,
    all have failed. After three completions that hang or kill the process, the rest count as
    failed.

    Args:
      call: scores the completions at some positions, or raises CallFailed.
      n: completions.
    """
    everything = list(range(n))
    try:
        return call(everything)
    except CallFailed as error:
        first = error
    if first.kind in ("shape", "result") or n == 1:
        return _failed(dict.fromkeys(everything, (first.kind, first.reason)), n)
    failures: dict[int, tuple[Kind, str]] = {}
    lost = 0
    for i in everything:
        if lost == MAX_LOST:
            reason = f"not tried alone, as {lost} others hang or end the process: {first.reason}"
            failures[i] = (first.kind, reason)
            continue
        try:
            call([i])
        except CallFailed as error:
            failures[i] = (error.kind, error.reason)
            lost += error.kind in ("hung", "died")
    good = [i for i in everything if i not in failures]
    if not good:
        return _failed(failures, n)
    try:
        rest = call(good)
    except CallFailed as error:
        reason = f"{error.reason}, with {len(good)} completions together, but with none alone"
        return _failed(failures | dict.fromkeys(good, (error.kind, reason)), n)
    return _spread(rest, good, failures, n)


def _failed(failures: dict[int, tuple[Kind, str]], n: int) -> Scores:
    return Scores([None] * n, failures)


def _spread(rest: Scores, good: list[int], failures: dict, n: int) -> Scores:
    def placed(values: list) -> list:
        by_position = dict(zip(good, values, strict=True))
        return [by_position.get(i) for i in range(n)]

    return Scores(
        placed(rest.values),
        failures | {good[i]: failure for i, failure in rest.failures.items()},
        {name: placed(values) for name, values in rest.extras.items()},
        rest.metrics,
    )
