"""The trainer's end of a host process: started, spoken to, ended."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable

from relax.errors import ConfigError, RewardError
from relax.rewards.protocol import RewardInfo
from relax.rewards.workers import messages

LOAD_TIMEOUT_S = 120.0
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


class HostProcess:
    """A running host.

    Args:
      references: of the functions, {"spec", "parameters"} each.
      timeout_s: of one call of one function.
      keep_env: variables that are passed on in spite of their names.
    """

    def __init__(self, references: list[dict], timeout_s: float, keep_env: Iterable[str] = ()):
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=clean_environment(dict(os.environ), keep_env),
            start_new_session=True,  # Ctrl-C is for the trainer, which ends this one when done
        )
        self.send({"functions": references, "timeout_s": timeout_s})

    def infos(self) -> list[RewardInfo]:
        """What the host has loaded.

        Raises:
          ConfigError: a function cannot be loaded.
        """
        deadline = time.monotonic() + LOAD_TIMEOUT_S
        fd = self._process.stdout.fileno()
        while not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            if time.monotonic() >= deadline:
                self.close()
                raise ConfigError(
                    f"the reward functions are not loaded after {LOAD_TIMEOUT_S:g} s: does a "
                    "module of theirs wait for something?"
                )
        try:
            answer = self.receive()
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
        try:
            messages.write(self._process.stdin.fileno(), messages.encode(message))
        except BrokenPipeError:
            pass  # `receive` says how it ended

    def receive(self) -> dict:
        """The next answer; waits for it.

        Raises:
          RewardError: the host is no more.
        """
        try:
            answer = messages.read(self._process.stdout.fileno())
        except EOFError:
            answer = None
        if answer is None:
            code = self._process.wait()
            how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
            self.close()
            raise RewardError(
                f"the process of the reward functions ended by {how}; their modules may not end "
                "it, and it needs memory to run in."
            )
        return answer

    def close(self) -> None:
        """Ends the host and its worker; may be called again."""
        self._process.stdin.close()  # the host notices, kills its worker and leaves
        self._process.stdout.close()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()  # and the kernel its worker, where it can
            self._process.wait()
