"""The processes that this one has started, and those that they have started: all can be ended.

A process that leaves its group and session, and whose parent ends, is given to the nearest ancestor
that has asked for orphans, and else to process 1, which keeps it running. Linux only: elsewhere
nothing is adopted, and only the groups of workers are killed.
"""

import contextlib
import ctypes
import os
import signal
from collections.abc import Collection
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_ROUNDS = 1000  # each ends one generation of what forks faster than it is found


def adopt() -> None:
    """Makes this process the parent of its descendants whose own parents end."""
    with contextlib.suppress(AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children() -> set[int]:
    """The processes whose parent is this one, those that have ended and are not waited for, too."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name, in brackets, may hold anything; the parent is the second field behind it.
            if int(stat.read_bytes().rpartition(b")")[2].split()[1]) == os.getpid():
                found.add(int(stat.parent.name))
    return found


def reap(but: Collection[int]) -> None:
    """Forgets adopted processes that have ended; stops at the first one of the given children."""
    with contextlib.suppress(ChildProcessError):
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid in but:
                return
            os.waitpid(ended.si_pid, 0)


def kill(but: Collection[int] = ()) -> None:
    """Ends all descendants but the given children and theirs; generation by generation."""
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
