"""Standard output that may go away: a run goes on when its pipe breaks or its terminal closes."""

import contextlib
import os
import sys
from typing import Any

from rich.console import Console


def standard_console() -> Console:
    """A console on standard output that outlives it."""
    file: Any = StandardOutput()  # not an `IO[str]` by name: it hands on what it does not define
    return Console(file=file, highlight=False, soft_wrap=True)


class StandardOutput:
    """A file for a console: `sys.stdout`, and nothing once that can no longer be written to.

    It looks `sys.stdout` up at every call, as others may replace it.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(_stdout(), name)

    def write(self, text: str) -> int:
        try:
            return _stdout().write(text)
        except OSError as error:
            _discard(error)
            return len(text)

    def flush(self) -> None:
        try:
            _stdout().flush()
        except OSError as error:
            _discard(error)


def _stdout():
    """The stream itself, where a progress bar of rich stands before it."""
    return getattr(sys.stdout, "rich_proxied_file", sys.stdout)


def _discard(error: OSError) -> None:
    """Sends what is still to be written nowhere, the buffer included, which is flushed at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, _stdout().fileno())
    os.close(null)
    with contextlib.suppress(OSError):
        line = f"standard output is gone ({error.strerror}): the run goes on without it"
        print(line, file=sys.stderr, flush=True)
