"""The trainer's end of the process in which agents run."""

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

from relax.errors import ConfigError
from relax.rewards.workers import messages
from relax.rewards.workers.client import clean_environment

LOAD_TIMEOUT_S = 120.0
GRACE_S = 5.0  # for the process to report that a time limit has passed
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from relax.rewards.agent_process import main; main()"
)


class AgentResult(NamedTuple):
    """What an agent did.

    Attributes:
      reward, messages: what it returned; None: nothing.
      error: why it failed; None: it did not.
    """

    reward: float | None = None
    messages: list[dict] | None = None
    error: str | None = None


class AgentRunner:
    """Runs an agent, a function of a client and a row, in a process that can be killed.

    Args:
      spec: `package.module:function` or `path/to/file.py:function`, asynchronous or not.
      timeout_s: time limit of one call.

    Raises:
      ConfigError: there is no such function.
    """

    def __init__(self, spec: str, timeout_s: float = 600.0):
        self.spec, self.timeout_s = spec, timeout_s
        self.info = SimpleNamespace(kind="agent")
        self._process: subprocess.Popen | None = None
        self._start()

    def run(self, jobs: Sequence[tuple[dict, dict]], at_once: int) -> list[AgentResult]:
        """Runs a call per job, `(client, row)`; results are in the order of the jobs.

        Args:
          at_once: calls that run at the same time.
        """
        results: list[AgentResult | None] = [None] * len(jobs)
        waiting = list(range(len(jobs)))[::-1]
        running: dict[int, float] = {}  # until when
        while waiting or running:
            if self._process is None:
                self._start()
            while waiting and len(running) < at_once:
                number = waiting.pop()
                client, row = jobs[number]
                running[number] = time.monotonic() + self.timeout_s + GRACE_S
                job = {"id": number, "client": client, "row": row, "timeout_s": self.timeout_s}
                self._send(json.dumps(job, default=str).encode())
            answer = self._receive(min(running.values()))
            if answer is None:  # it hangs or has ended: whatever runs in it is lost
                how = "its process hung or ended, and was started anew"
                results = [
                    AgentResult(error=how) if i in running else r for i, r in enumerate(results)
                ]
                running.clear()
                self.close()
            elif answer["id"] in running:
                del running[answer["id"]]
                done = answer.get("result") or {"error": answer["error"]}
                results[answer["id"]] = AgentResult(**done)
                if answer.get("timeout"):
                    self._has_stuck = True
        if self._has_stuck:  # a plain function goes on in its thread
            self.close()
        return [result or AgentResult(error="it was not run") for result in results]

    def close(self) -> None:
        """Ends the process and its descendants; may be called again."""
        if self._process is None:
            return
        process, self._process = self._process, None
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()

    def _start(self) -> None:
        self._has_stuck = False
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=clean_environment(dict(os.environ)),
            start_new_session=True,  # the trainer handles Ctrl-C and ends the process
        )
        self._answers: queue.SimpleQueue[dict | None] = queue.SimpleQueue()
        stdout = self._process.stdout
        assert stdout is not None
        reader = threading.Thread(target=_read, args=(stdout.fileno(), self._answers), daemon=True)
        self._send(json.dumps({"agent": self.spec}).encode())
        reader.start()
        answer = self._receive(time.monotonic() + LOAD_TIMEOUT_S)
        if answer is None or "error" in answer:
            self.close()
            why = f"it was not loaded within {LOAD_TIMEOUT_S:g} s, or its process ended"
            raise ConfigError(f"agent {self.spec!r}: {why}." if answer is None else answer["error"])

    def _send(self, data: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        fd = self._process.stdin.fileno()

        def wait() -> None:
            if not select.select([], [fd], [], GRACE_S)[1]:
                raise BrokenPipeError  # `_receive` notices

        with contextlib.suppress(BrokenPipeError):
            messages.write(fd, messages.frame(data), wait)

    def _receive(self, until_s: float) -> dict | None:
        try:
            return self._answers.get(timeout=max(0.0, until_s - time.monotonic()))
        except queue.Empty:
            return None


def _read(fd: int, answers: queue.SimpleQueue) -> None:
    """Puts messages into a queue, and None at the end."""
    with contextlib.suppress(OSError, EOFError, ValueError):
        while (answer := messages.read(fd)) is not None:
            answers.put(answer)
    answers.put(None)
