"""The trainer's end of a host process: started, spoken to, ended.

A host that works says so at least every `timeout_s` and a second. One that is silent for longer may
have been stopped by a reward function (SIGSTOP), and is told to go on: it then finds the time limit
passed, and kills the function. One that stays silent is killed, and the run ends.
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
CONTINUE_AFTER_S = 1.0  # of silence past the time limit
GIVE_UP_AFTER_S = 120.0
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from relax.rewards.workers.host import main; main()"
)


def clean_environment(environment: dict[str, str], keep: Iterable[str] = ()) -> dict[str, str]:
    """The variables that reward functions see: none that is named like a secret, but for `keep`.

    Strings hash alike in every process, so that the order of a set changes no reward, and
    libraries compute with one thread, as training needs the cores, where nothing else is set.

    >>> sorted(clean_environment({"HOME": "/", "HF_TOKEN": "x", "A_KEY": "y"}, keep=["A_KEY"]))[:2]
    ['A_KEY', 'HOME']
    """
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    clean = {k: v for k, v in environment.items() if k in keep or not _SECRET.search(k)}
    return {"PYTHONHASHSEED": "0", **dict.fromkeys(threads, "1"), **clean}


class Host:
    """A running host.

    Args:
      references: of the functions, {"spec", "parameters"} each.
      timeout_s: of one call of one function.
      keep_env: variables that are passed on in spite of their names.
    """

    def __init__(self, references: list[dict], timeout_s: float, keep_env: Iterable[str] = ()):
        self._timeout_s = timeout_s
        process = subprocess.Popen(
            [sys.executable, "-c", _CODE, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=clean_environment(dict(os.environ), keep_env),
            start_new_session=True,  # Ctrl-C is for the trainer, which ends this one when done
        )
        assert process.stdin is not None and process.stdout is not None
        self._process, self._requests, self._answers = process, process.stdin, process.stdout
        self.send({"functions": references, "timeout_s": timeout_s})

    def infos(self) -> list[RewardInfo]:
        """What the host has loaded.

        Raises:
          ConfigError: a function cannot be loaded.
        """
        try:
            answer = self._read(LOAD_TIMEOUT_S)
        except TimeoutError:
            self.close()
            raise ConfigError(
                f"the reward functions are not loaded after {LOAD_TIMEOUT_S:g} s: does a "
                "module of theirs wait for something?"
            ) from None
        except RewardError as error:
            raise ConfigError(f"the reward functions cannot be loaded: {error}") from error
        if "error" in answer:
            self.close()
            raise ConfigError(answer["error"])
        return [
            RewardInfo(**info | {key: tuple(info[key]) for key in ("required", "accepted")})
            for info in answer["functions"]
        ]

    def send(self, message) -> None:
        """Writes a message.

        Raises:
          RewardError: the host does not read it.
        """
        fd, limit_s = self._requests.fileno(), self._timeout_s + GIVE_UP_AFTER_S
        try:
            messages.write(fd, message, lambda: self._wait(fd, select.POLLOUT, limit_s))
        except BrokenPipeError:
            pass  # `receive` says how it ended
        except TimeoutError:
            self._give_up(limit_s)

    def receive(self) -> dict:
        """The next answer; waits for it.

        Raises:
          RewardError: the host is no more, or has been silent for too long.
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
            f"the process of the reward functions has been silent for {silent_s:g} s, though a "
            f"call may take {self._timeout_s:g} s, and was killed. Has a function stopped it, "
            "or does the machine have no memory left?"
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
                f"the process of the reward functions ended by {how}; their modules may not end "
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
        """To the host and what it has started in its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signum)

    def close(self) -> None:
        """Ends the host and all that its functions have started; may be called again."""
        if self._requests.closed:
            return
        self._requests.close()  # the host notices, kills its descendants and leaves
        self._answers.close()
        self._signal(signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=2)
        self._signal(signal.SIGKILL)  # and the kernel its worker, where it can
        self._process.wait()
