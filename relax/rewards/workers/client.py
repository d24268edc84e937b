"""The trainer's end of a host process: starts it, exchanges messages, ends it.

A working host sends a message at least every `timeout_s` plus a second. One that is silent for
longer may have been stopped by a reward function (SIGSTOP); it gets SIGCONT, finds the time limit
exceeded, and kills the function. One that stays silent is killed, and the run ends.
"""

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterable
from typing import NoReturn

from relax.errors import ConfigError, RewardError
from relax.rewards.protocol import RewardInfo
from relax.rewards.workers import messages

LOAD_TIMEOUT_S = 120.0
CONTINUE_AFTER_S = 1.0  # silence beyond the time limit
GIVE_UP_AFTER_S = 120.0
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_CODE = (
    "import importlib, json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "importlib.import_module(sys.argv[2]).main()"
)


def clean_environment(environment: dict[str, str], keep: Iterable[str] = ()) -> dict[str, str]:
    """The environment of reward functions: without variables named like secrets, except `keep`.

    Unless set otherwise, the string hash is fixed, so that the order of a set changes no reward,
    and libraries use one thread, since training needs the cores.

    >>> sorted(clean_environment({"HOME": "/", "HF_TOKEN": "x", "A_KEY": "y"}, keep=["A_KEY"]))[:2]
    ['A_KEY', 'HOME']
    """
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    clean = {k: v for k, v in environment.items() if k in keep or not _SECRET.search(k)}
    return {"PYTHONHASHSEED": "0", **dict.fromkeys(threads, "1"), **clean}


class Host:
    """A running host.

    Args:
      setup: the first message: for reward functions `functions`, {"spec", "parameters"} of each.
      timeout_s: time limit of one call of a function.
      keep_env: variables that are passed on despite their names.
      program: the module whose `main` the process runs.
      what: what it runs, for messages.
    """

    def __init__(
        self,
        setup: dict,
        timeout_s: float,
        keep_env: Iterable[str] = (),
        *,
        program: str = "relax.rewards.workers.host",
        what: str = "reward functions",
    ):
        self._timeout_s, self._what = timeout_s, what
        process = subprocess.Popen(
            [sys.executable, "-c", _CODE, json.dumps(sys.path), program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=clean_environment(dict(os.environ), keep_env),
            start_new_session=True,  # the trainer handles Ctrl-C and ends the host
        )
        assert process.stdin is not None and process.stdout is not None
        self._process, self._requests, self._answers = process, process.stdin, process.stdout
        self.send(setup | {"timeout_s": timeout_s})

    def infos(self) -> list[RewardInfo]:
        """The properties of the loaded reward functions; raises as `loaded` does."""
        return [
            RewardInfo(**info | {key: tuple(info[key]) for key in ("required", "accepted")})
            for info in self.loaded()["functions"]
        ]

    def loaded(self) -> dict:
        """The first answer, once everything is loaded.

        Raises:
          ConfigError: something cannot be loaded.
        """
        try:
            answer = self._read(LOAD_TIMEOUT_S)
        except TimeoutError:
            self.close()
            raise ConfigError(
                f"the {self._what} are not loaded after {LOAD_TIMEOUT_S:g} s: does a "
                "module of theirs wait for something?"
            ) from None
        except RewardError as error:
            raise ConfigError(f"the {self._what} cannot be loaded: {error}") from error
        if "error" in answer:
            self.close()
            raise ConfigError(answer["error"])
        return answer

    def send(self, message) -> None:
        """Writes a message.

        Raises:
          RewardError: the host does not read it.
        """
        fd, limit_s = self._requests.fileno(), self._timeout_s + GIVE_UP_AFTER_S
        try:
            messages.write(fd, message, lambda: self._wait(fd, select.POLLOUT, limit_s))
        except BrokenPipeError:
            pass  # `receive` reports how it ended
        except TimeoutError:
            self._give_up(limit_s)

    def receive(self) -> dict:
        """Waits for the next answer and returns it.

        Raises:
          RewardError: the host has ended, or has been silent for too long.
        """
        limit_s = self._timeout_s + GIVE_UP_AFTER_S
        try:
            while "alive" in (answer := self._read(limit_s)):
                pass
        except TimeoutError:
            self._give_up(limit_s)
        return answer

    def _give_up(self, silent_s: float) -> NoReturn:
        self.close()
        raise RewardError(
            f"the process of the {self._what} has been silent for {silent_s:g} s, though a "
            f"call may take {self._timeout_s:g} s, and was killed. Has a function stopped it, "
            "or is the machine out of memory?"
        )

    def _read(self, limit_s: float) -> dict:
        fd = self._answers.fileno()
        try:
            answer = messages.read(fd, lambda: self._wait(fd, select.POLLIN, limit_s))
        except EOFError:
            answer = None
        if answer is None:
            self.close()
            code = self._process.returncode
            how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
            raise RewardError(
                f"the process of the {self._what} ended by {how}; their modules may not end "
                "it, and it needs memory to run in."
            )
        return answer

    def _wait(self, fd: int, event: int, limit_s: float) -> None:
        """Waits until a pipe is ready; raises TimeoutError."""
        poll = select.poll()
        poll.register(fd, event)
        patience_s = min(self._timeout_s + CONTINUE_AFTER_S, limit_s)
        if poll.poll(1000 * patience_s):
            return
        self._signal(signal.SIGCONT)
        if not poll.poll(1000 * (limit_s - patience_s)):
            raise TimeoutError

    def _signal(self, signum: int) -> None:
        """Sends a signal to the host and its process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signum)

    def close(self) -> None:
        """Ends the host and all processes of its functions; may be called again."""
        if self._requests.closed:
            return
        self._requests.close()  # the host notices, kills its descendants and ends
        self._answers.close()
        self._signal(signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=2)
        self._signal(signal.SIGKILL)  # and the kernel kills its worker, where supported
        self._process.wait()
