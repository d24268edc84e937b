"""The process between the trainer and the reward functions: loads them, forks a worker, and
replaces a worker that hangs.

It has no threads and none of the trainer's memory, so forking is quick and safe, and modules are
imported once. The trainer sends a batch and reads the scores later; time limits and retries are
handled here, even while the trainer computes.
"""

import functools
import os
import sys
import time
import warnings
from collections.abc import Callable

from relax.errors import ConfigError
from relax.rewards.loading import load_reward
from relax.rewards.protocol import describe
from relax.rewards.workers import descendants, messages
from relax.rewards.workers.scores import score
from relax.rewards.workers.worker import (
    Functions,
    ParentGone,
    Printed,
    Worker,
    run_functions,
)

ALIVE = {"alive": True}
_SAY_EVERY_S = 1.0  # sent between two calls: the host is alive


def main() -> None:
    """Runs reward functions for one trainer until the trainer's end closes."""

    def begin(setup: dict, inbox: int, outbox: int):
        functions = [_load(**reference) for reference in setup["functions"]]
        host = _Host(functions, setup["timeout_s"], inbox, outbox)
        return {"functions": [vars(info) for _, info in functions]}, host.serve

    serve_trainer(begin)


def serve_trainer(begin: Callable[[dict, int, int], tuple[dict, Callable[[], None]]]) -> None:
    """The frame of a host: messages over standard input and output, and the end of descendants.

    Args:
      begin: given the first message and the descriptors of input and output, returns the first
        answer and the function that serves the rest; a ConfigError is sent to the trainer.
    """
    inbox, outbox = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # modules may print while they load
    # Python 3.12 and later warn of forks while threads exist, such as those of numpy's BLAS.
    warnings.filterwarnings("ignore", "(?s).*fork", DeprecationWarning)
    descendants.adopt()
    try:
        setup = messages.read(inbox)
        if setup is None:
            return
        try:
            answer, serve = begin(setup, inbox, outbox)
        except ConfigError as error:
            messages.write(outbox, {"error": str(error)})
            return
        messages.write(outbox, answer)
        serve()
    except (ParentGone, BrokenPipeError, EOFError):
        sys.exit(1)
    finally:
        descendants.kill()


def _load(spec: str, parameters: dict):
    function = load_reward(spec, parameters)
    return function, describe(function)


class _Host:
    def __init__(self, functions: Functions, timeout_s: float, inbox: int, outbox: int):
        self.functions, self.timeout_s = functions, timeout_s
        self.inbox, self.outbox = inbox, outbox
        self.printed = Printed()
        self.worker: Worker | None = None
        self.batch = b""
        self.own = descendants.children()  # processes started by the modules are kept
        self.said_s = time.monotonic()

    def serve(self) -> None:
        try:
            while (batch := messages.read(self.inbox)) is not None:
                messages.write(self.outbox, self.answer(batch))
        finally:
            if self.worker is not None:
                self.worker.kill()

    def answer(self, batch: dict) -> dict:
        start_s = self.said_s = time.monotonic()
        self.batch = messages.encode(batch)
        if self.worker is not None:
            self.worker.forget_batch()
        scores = [
            vars(score(functools.partial(self.call, i), len(batch["prompts"])))
            for i in range(len(self.functions))
        ]
        descendants.reap(but=self.own | ({self.worker.pid} if self.worker else set()))
        seconds = time.monotonic() - start_s
        return {"scores": scores, "seconds": seconds, "printed": self.printed.take()}

    def call(self, function: int, indices: list[int]):
        """Calls a function in the worker, which is replaced if it has ended."""
        if time.monotonic() - self.said_s > _SAY_EVERY_S:
            messages.write(self.outbox, ALIVE)
            self.said_s = time.monotonic()
        if self.worker is None or not self.worker.pid:
            private = (self.inbox, self.outbox)
            work = functools.partial(run_functions, self.functions)
            self.worker = Worker(work, self.printed, private)
        try:
            return self.worker.ask(function, indices, self.batch, self.timeout_s, self.inbox)
        finally:
            if not self.worker.pid:  # processes that it started in other sessions
                descendants.kill(but=self.own)
