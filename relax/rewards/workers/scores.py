"""One bad completion must not cost the batch: which one is it, and what of the others?"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

# `raised`: an exception. `hung`: no answer in time. `died`: the process ended. `result`: not a
# list of finite numbers and None, one for each completion.
Kind = Literal["raised", "hung", "died", "result"]

MAX_LOST = 3  # completions of a batch that may each cost a time limit or a process


class CallFailed(Exception):
    """A call of a reward function came to nothing."""

    def __init__(self, kind: Kind, reason: str):
        super().__init__(reason)
        self.kind, self.reason = kind, reason


@dataclass
class Scores:
    """What a function said of some completions.

    Attributes:
      values: one for each; None where not applicable or failed.
      failures: (kind, reason) by position, for those that have no result.
      extras: columns that it logged, a value for each completion.
      metrics: numbers that it logged.
    """

    values: list[float | None]
    failures: dict[int, tuple[Kind, str]] = field(default_factory=dict)
    extras: dict[str, list] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)


def scores_of(message: dict) -> Scores:
    """The scores that were sent as `vars(scores)`; JSON has no numbers as keys."""
    failures = {int(i): tuple(why) for i, why in message["failures"].items()}
    return Scores(**message | {"failures": failures})


def score(call: Callable[[list[int]], Scores], n: int) -> Scores:
    """Scores n completions; those that make the call fail are found and left out.

    A failed call is followed by one for each completion alone, and by one for all that went well
    alone: functions that compare the completions of a batch see a batch again, as what they say of
    single completions is something else. Where that call fails, all have failed. After three
    completions that hang or kill the process, the untried count as failed.

    Args:
      call: scores the completions at some positions, or raises CallFailed.
      n: completions.
    """
    everything = list(range(n))
    try:
        return call(everything)
    except CallFailed as error:
        first = error
    if first.kind == "result" or n == 1:
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
        reason = f"{error.reason}, with {len(good)} completions together though with none alone"
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
