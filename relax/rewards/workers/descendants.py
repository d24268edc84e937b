"""All descendants of this process, so that they can be ended.

If the parent of a process in its own session ends, the process is adopted by the nearest ancestor
that is a subreaper, or else by process 1, where it would keep running. Linux only: elsewhere none
is adopted, and only the process groups of workers are killed.
"""

import contextlib
import ctypes
import os
import signal
from collections.abc import Collection
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_ROUNDS = 1000  # each round ends one generation of processes that fork faster than they are found


def adopt() -> None:
    """Makes this process the parent of its orphaned descendants."""
    with contextlib.suppress(AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children() -> set[int]:
    """The child processes of this one, including ended ones that were not waited for."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name, in brackets, may contain anything; the parent is the second field after it.
            if int(stat.read_bytes().rpartition(b")")[2].split()[1]) == os.getpid():
                found.add(int(stat.parent.name))
    return found


def reap(but: Collection[int]) -> None:
    """Waits for adopted processes that have ended; stops at the first of the given children."""
    with contextlib.suppress(ChildProcessError):
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid in but:
                return
            os.waitpid(ended.si_pid, 0)


def kill(but: Collection[int] = ()) -> None:
    """Ends all descendants except the given children and theirs, generation by generation."""
    for _ in range(_ROUNDS):
        found = children() - set(but)
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pid in found:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
