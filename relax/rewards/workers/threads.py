"""Functions that cannot be sent to another process: lambdas, closures, functions of a notebook.

They run in a thread of this process. A thread cannot be killed: one that hangs in Python code is
asked to stop, one that hangs in C (a regular expression) is abandoned or blocks everything, and a
function that ends the process ends the run.
"""

import ctypes
import functools
import sys
import threading
from collections.abc import Callable

from relax.errors import DataError
from relax.rewards.protocol import RewardInfo, check_plain
from relax.rewards.workers.calls import Batch, invoke
from relax.rewards.workers.scores import CallFailed, Scores, score


def reference_of(function: Callable) -> dict | None:
    """The reference by which another process finds the function, or None.

    >>> reference_of(lambda completions: []) is None
    True
    """
    if in_process(function):
        return None
    if reference := getattr(function, "reference", None):
        spec, parameters = reference
    else:
        spec, parameters = _path_of(function), {}
        if isinstance(function, functools.partial) and not function.args:
            spec, parameters = _path_of(function.func), function.keywords
    try:
        check_plain(parameters, "parameters")
    except DataError:
        return None
    return None if spec is None else {"spec": spec, "parameters": parameters}


def in_process(function: Callable) -> bool:
    """Whether a function declares that it runs in the trainer's process, as reward models do.

    It is called directly, without a time limit.
    """
    return getattr(function, "in_process", False)


def _path_of(function) -> str | None:
    name, path = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    module = sys.modules.get(name or "")
    if name in (None, "__main__") or getattr(module, "__file__", None) is None or "." in path:
        return None
    return f"{name}.{path}" if getattr(module, path, None) is function else None


def score_here(function: Callable, info: RewardInfo, batch: Batch, timeout_s: float) -> Scores:
    """Scores a batch in this process, with the same results and failures as a worker."""

    def call(indices: list[int]) -> Scores:
        if in_process(function):
            return invoke(function, info, batch, indices)
        return _in_thread(functools.partial(invoke, function, info, batch, indices), timeout_s)

    return score(call, len(batch["prompts"]))


def _in_thread(call: Callable[[], Scores], timeout_s: float) -> Scores:
    outcome: list = []

    def run():
        try:
            outcome.append(call())
        except CallFailed as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="reward", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive() and thread.ident is not None:
        # The only way to stop Python code that does not cooperate.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
        )
        raise CallFailed("hung", f"did not return within {timeout_s:g} s and was asked to stop")
    if isinstance(outcome[0], CallFailed):
        raise outcome[0]
    return outcome[0]
