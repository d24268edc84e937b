"""A forked child process that runs reward functions and may be killed at any moment."""

import contextlib
import ctypes
import functools
import io
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable

from relax.rewards.workers import messages
from relax.rewards.workers.calls import invoke
from relax.rewards.workers.scores import CallFailed, Scores, scores_of

MAX_ANSWER_BYTES = 64 << 20
MAX_PRINTED_BYTES = 16 << 10  # kept output of functions, per batch
_PR_SET_PDEATHSIG = 1

Functions = list[tuple[Callable, object]]  # functions with their RewardInfo
Work = Callable[[int, int], None]


class ParentGone(Exception):
    """The process that waits for answers has ended."""


class Printed:
    """The beginning of the output of functions, and its total size."""

    def __init__(self):
        self.kept, self.bytes = b"", 0

    def add(self, data: bytes) -> None:
        self.bytes += len(data)
        self.kept += data[: MAX_PRINTED_BYTES - len(self.kept)]

    def take(self) -> str:
        text, more = self.kept.decode(errors="replace"), self.bytes - len(self.kept)
        self.kept, self.bytes = b"", 0
        return text + (f"\n[... {more} more bytes]\n" if more else "")


class Worker:
    """The parent's handle of a worker: forks it, sends calls, reads its output, kills it.

    Args:
      work: the main function of the worker, of the descriptors of its requests and answers.
      printed: receives the output of the functions.
      private: file descriptors that the worker must close, since their readers wait for the end
        of this process.
    """

    def __init__(self, work: Work, printed: Printed, private: tuple[int, ...]):
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        self._output, output = os.pipe()
        self._printed = printed
        self._has_batch = False
        parent = os.getpid()
        libc = ctypes.CDLL(None)
        self.pid = os.fork()
        if not self.pid:
            own_ends = (self._requests, self._answers, self._output)
            _become_worker(work, (requests, answers, output), own_ends + private, parent, libc)
        for fd in (requests, answers, output):
            os.close(fd)

    def forget_batch(self) -> None:
        """Ensures that the next call sends its batch."""
        self._has_batch = False

    @property
    def descriptors(self) -> tuple[int, int, int]:
        """The parent's ends of the pipes: requests, answers, output."""
        return self._requests, self._answers, self._output

    def ask(
        self, function: int, indices: list[int], batch: bytes, timeout_s: float, parent: int
    ) -> Scores:
        """Calls a function.

        Args:
          batch: frame of the batch that `indices` refer to.
          parent: file descriptor that closes when the waiting process ends.

        Raises:
          CallFailed: the function raised, or it hung or died and the worker has ended.
          ParentGone: the waiting process and the worker have ended.
        """
        deadline_s = time.monotonic() + timeout_s
        try:
            # Reading will show whether the worker has died.
            with contextlib.suppress(BrokenPipeError):
                wait = functools.partial(self._wait_to_write, deadline_s, timeout_s)
                if not self._has_batch:
                    messages.write(self._requests, batch, wait)
                    self._has_batch = True
                question = {"function": function, "indices": indices}
                messages.write(self._requests, question, wait)
            answer = self._read_answer(deadline_s, timeout_s, parent)
        except (CallFailed, ParentGone):
            self.kill()
            raise
        if "failed" in answer:
            raise CallFailed(*answer["failed"])
        return scores_of(answer)

    def _wait_to_write(self, deadline_s: float, timeout_s: float) -> None:
        left_s = max(0.0, deadline_s - time.monotonic())
        if not select.select([], [self._requests], [], left_s)[1]:
            raise _hung(timeout_s)

    def _read_answer(self, deadline_s: float, timeout_s: float, parent: int) -> dict:
        poll = select.poll()
        poll.register(self._answers, select.POLLIN)
        poll.register(self._output, select.POLLIN)
        poll.register(parent, 0)  # only the end of the pipe
        data = bytearray()
        while (left_s := deadline_s - time.monotonic()) > 0:
            for fd, _ in poll.poll(left_s * 1000 + 1):
                if fd == parent:
                    raise ParentGone
                part = os.read(fd, 1 << 16)
                if fd == self._output:
                    self._printed.add(part)
                    if not part:
                        poll.unregister(fd)
                    continue
                data += part
                if not part:
                    raise CallFailed("died", self._end())
                if (messages.frame_size(data) or 0) > MAX_ANSWER_BYTES:
                    raise CallFailed("result", f"answers with more than {MAX_ANSWER_BYTES} bytes")
                if (answer := messages.decode(data)) is not None:
                    self._read_output()
                    return answer
        raise _hung(timeout_s)

    def _read_output(self) -> None:
        """Reads the output up to the answer; not more, since a thread may print forever."""
        for _ in range(16):
            if not select.select([self._output], [], [], 0)[0]:
                return
            self._printed.add(os.read(self._output, 1 << 16))

    def _end(self) -> str:
        code = os.waitstatus_to_exitcode(self.kill())
        if code < 0:
            return f"ended its process by signal {signal.Signals(-code).name}"
        return f"ended its process with exit code {code}"

    def kill(self) -> int:
        """Ends the worker and its process group; returns its wait status, 0 if it had ended."""
        if not self.pid:
            return 0
        # In this order: before `setsid` a worker has no process group of its own.
        for kill in (os.kill, os.killpg):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self._read_output()
        for fd in (self._requests, self._answers, self._output):
            os.close(fd)
        self.pid = 0
        return status


def _hung(timeout_s: float) -> CallFailed:
    return CallFailed("hung", f"did not return within {timeout_s:g} s and was killed")


def _become_worker(work: Work, pipes: tuple, private: tuple, parent: int, libc) -> None:
    """The main function of the child; it never returns."""
    try:
        requests, answers, output = pipes
        os.setsid()
        _die_with(parent, libc)
        _be_first_to_go()
        for fd in private:
            os.close(fd)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(line_buffering=True)  # so that a kill loses no whole line
        work(requests, answers)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(70)


def _die_with(parent: int, libc) -> None:
    with contextlib.suppress(AttributeError):  # Linux only
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _be_first_to_go() -> None:
    """Asks the kernel to kill this process, not the training, if memory runs out."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def run_functions(functions: Functions, requests: int, answers: int) -> None:
    """The main function of a worker that scores batches."""
    batch: dict = {}
    while (message := messages.read(requests)) is not None:
        if "prompts" in message:
            batch = message
            continue
        function, info = functions[message["function"]]
        try:
            answer = vars(invoke(function, info, batch, message["indices"]))
        except CallFailed as error:
            answer = {"failed": [error.kind, error.reason]}
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        messages.write(answers, answer)
