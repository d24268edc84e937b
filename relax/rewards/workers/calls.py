"""A call of a reward function: builds its arguments and checks its result."""

import asyncio
import copy
import inspect
import traceback
from collections.abc import Callable
from types import SimpleNamespace

from relax.config.text import quote
from relax.rewards.protocol import BadResult, RewardInfo, check_rewards
from relax.rewards.workers.scores import CallFailed, Scores

# A batch, as it is sent: `prompts`, `completions`, `columns` and `texts` {name: values},
# `trainer_state` {name: value}, and `completion_ids` (or None), all but the state with one item a
# completion.
Batch = dict


class TrainerState(SimpleNamespace):
    """The supported part of TRL's `trainer_state`: `global_step`, `max_steps`, `epoch`, ..."""

    def __getattr__(self, name: str):
        raise AttributeError(
            f"trainer_state has no {name!r} here, it has {', '.join(sorted(vars(self)))}"
        )


def invoke(function: Callable, info: RewardInfo, batch: Batch, indices: list[int]) -> Scores:
    """Scores the completions at `indices`.

    Raises:
      CallFailed: the function raised, or did not return a list of that length.
    """
    n = len(indices)
    extras: dict[str, list] = {}
    metrics: dict[str, list[float]] = {}

    def log_extra(column: str, values: list) -> None:
        values = list(values)
        if len(values) != n:
            raise ValueError(f"log_extra({column!r}) needs {n} values, got {len(values)}")
        extras[str(column)] = [_loggable(value) for value in values]

    def log_metric(name: str, value: float) -> None:
        metrics.setdefault(str(name), []).append(float(value))

    logs = {"log_extra": log_extra, "log_metric": log_metric}
    arguments = _arguments(info, batch, indices, logs)
    try:
        result = function(**arguments)
        if inspect.isawaitable(result):
            result = asyncio.run(_wait_for(result))
        values, refused = check_rewards(result, n)
    except BadResult as error:
        raise CallFailed("shape", str(error)) from error
    except BaseException as error:  # also SystemExit: a reward function never ends the run
        raise CallFailed("raised", _describe(error)) from error
    return Scores(values, {i: ("result", why) for i, why in refused.items()}, extras, metrics)


async def _wait_for(result):
    return await result


def _arguments(info: RewardInfo, batch: Batch, indices: list[int], logs: dict) -> dict:
    """The arguments in the signature, copied, since a function may modify them."""
    lists = {"prompts": batch["prompts"], "completions": batch["completions"], **batch["columns"]}
    if batch["completion_ids"] is not None:
        lists["completion_ids"] = batch["completion_ids"]
    # Only if named: `**kwargs` of a function written for TRL gets TRL's arguments.
    lists |= {n: texts for n, texts in batch.get("texts", {}).items() if n in info.accepted}
    chosen = {
        name: copy.deepcopy([values[i] for i in indices])
        for name, values in lists.items()
        if info.takes(name)
    }
    state = TrainerState(**batch["trainer_state"])
    others = {"trainer_state": state, **logs}
    return chosen | {name: value for name, value in others.items() if info.takes(name)}


def _loggable(value):
    return (
        value if value is None or isinstance(value, str | int | float | bool) else quote(value, 200)
    )


def _describe(error: BaseException) -> str:
    """The exception and the line of the reward function that raised it."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    try:
        message = str(error)
    except Exception:  # a user's __str__
        message = ""
    message = message if len(message) <= 500 else message[:500] + "..."
    return f"raised {type(error).__name__}{': ' * bool(message)}{message}{place}"
