"""The process between the trainer and the reward functions: it loads them, forks a worker, and
kills and replaces the worker that hangs.

It starts no thread and has none of the trainer's memory, so forking it is quick and safe, and what
the functions' modules import is imported once. The trainer sends a batch and reads the scores when
it wants them: time limits and retries are kept here, even while the trainer computes.
"""

import functools
import os
import sys
import time
import warnings

from relax.errors import ConfigError
from relax.rewards.loading import load_reward
from relax.rewards.protocol import describe
from relax.rewards.workers import messages
from relax.rewards.workers.scores import score
from relax.rewards.workers.worker import Functions, ParentGone, Printed, Worker


def main() -> None:
    """Serves one trainer over standard input and output until the trainer's end closes."""
    inbox, outbox = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # modules may print while they load
    # Python 3.12 and later warn of forks beside threads, such as those of numpy's BLAS.
    warnings.filterwarnings("ignore", "(?s).*fork", DeprecationWarning)
    setup = messages.read(inbox)
    if setup is None:
        return
    try:
        functions = [_load(**reference) for reference in setup["functions"]]
    except ConfigError as error:
        messages.write(outbox, messages.encode({"error": str(error)}))
        return
    messages.write(outbox, messages.encode({"functions": [vars(info) for _, info in functions]}))
    _Host(functions, setup["timeout_s"], inbox, outbox).serve()


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

    def serve(self) -> None:
        try:
            while (batch := messages.read(self.inbox)) is not None:
                messages.write(self.outbox, messages.encode(self.answer(batch)))
        except (ParentGone, BrokenPipeError, EOFError):
            sys.exit(1)
        finally:
            if self.worker:
                self.worker.kill()

    def answer(self, batch: dict) -> dict:
        start = time.monotonic()
        self.batch = messages.encode(batch)
        if self.worker and self.worker.pid:
            self.worker.send(self.batch)
        scores = [
            vars(score(functools.partial(self.call, i), len(batch["prompts"])))
            for i in range(len(self.functions))
        ]
        seconds = time.monotonic() - start
        return {"scores": scores, "seconds": seconds, "printed": self.printed.take()}

    def call(self, function: int, indices: list[int]):
        if self.worker is None or not self.worker.pid:
            private = (self.inbox, self.outbox)
            self.worker = Worker(self.functions, self.batch, self.printed, private)
        return self.worker.ask(function, indices, self.timeout_s, self.inbox)
