"""Standard output that may fail: a run continues if its pipe breaks or its terminal closes."""

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
    """A file for a console that writes to `sys.stdout`, and discards output once that fails.

    It looks up `sys.stdout` at every call, since other code may replace it.
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
    """The underlying stream, even while a progress bar of rich wraps it."""
    return getattr(sys.stdout, "rich_proxied_file", sys.stdout)


def _discard(error: OSError) -> None:
    """Redirects the stream to the null device, including its buffer, which is flushed at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, _stdout().fileno())
    os.close(null)
    with contextlib.suppress(OSError):
        line = f"standard output is gone ({error.strerror}): the run continues without it"
        print(line, file=sys.stderr, flush=True)
