"""The status file of a run: a small JSON file that is always complete and current."""

import json
import math
import os
import re
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from relax.config.text import nan_to_null
from relax.files import atomic_write, json_object

VERSION = 1
MOST_WARNINGS = 20
_SECRET = re.compile(r"(?<=://)[^/\s@\"]+(?=@)|\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,})\b")
ENDED = ("finished", "stopped", "failed")  # final phases


class TrainingStatusWriter:
    """Writes the status file of a run.

    Its fields are those passed to `update`, and `version`, `pid`, `host`, `started_at`,
    `updated_at` (UTC, ISO 8601) and `warnings`, the last twenty. A run sets `phase` (`starting`,
    `compiling`, `training`, `evaluating`, `finishing`, then `finished`, `stopped` or `failed`),
    `algorithm`, `step`, `total_steps`, `epoch`, `loss`, `learning_rate`, `tokens_per_second`,
    `time_left_s`, `last_checkpoint`, `last_preview`, `metrics` (the last line of metrics.jsonl),
    `evaluation` (the last one), `results` (metrics measured once), `compilations` (batch shapes
    compiled so far), `seconds` by phase, and `error` if it failed. Unknown values are null.

    The file is replaced by a rename, so that a reader never sees a partial file. If it cannot be
    written, the run continues, and `problem` holds the reason.

    Args:
      path: the file; its directory is created.
      every_s: minimum seconds between writes that are not forced.

    Example:
      >>> import tempfile
      >>> writer = TrainingStatusWriter(tempfile.mkdtemp() + "/training_status.json")
      >>> writer.update(phase="training", step=3)
      >>> read_status(writer.path)["step"]
      3
    """

    def __init__(self, path: str | Path, every_s: float = 1.0):
        self.path, self.every_s = Path(path), every_s
        self.problem: str | None = None
        self.fields: dict[str, Any] = {}
        self.begin()

    def begin(self, **fields: Any) -> None:
        """Resets the fields for a new run."""
        self.fields = {
            "version": VERSION,
            "phase": "starting",
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started_at": _now(),
            "warnings": [],
        } | fields
        self._written_s = -math.inf

    def update(self, force: bool = False, **fields: Any) -> None:
        """Sets fields, and writes the file if it is due or the phase has changed."""
        force = force or fields.get("phase", self.fields["phase"]) != self.fields["phase"]
        self.fields |= fields
        if force or time.monotonic() - self._written_s >= self.every_s:
            self.write()

    def warn(self, text: str) -> None:
        """Adds a warning with the current step."""
        warning = {"step": self.fields.get("step"), "text": text}
        self.fields["warnings"] = [*self.fields["warnings"], warning][-MOST_WARNINGS:]
        self.write()

    def write(self) -> None:
        """Writes the file now."""
        self._written_s = time.monotonic()
        fields = nan_to_null(self.fields | {"updated_at": _now()})
        text = without_secrets(json.dumps(fields, indent=1, default=str))
        try:
            atomic_write(self.path, f"{text}\n".encode(), sync=False)
            self.problem = None
        except OSError as error:  # a full disk ends the run at its next checkpoint
            self.problem = str(error)


def read_status(path: str | Path) -> dict[str, Any] | None:
    """The fields of a status file; None if it is missing or unreadable."""
    try:
        return json_object(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def is_alive(status: dict[str, Any]) -> bool | None:
    """Whether the process that wrote a status still runs; None if it is on another machine."""
    if status.get("host") != socket.gethostname():
        return None
    try:
        os.kill(int(status["pid"]), 0)
    except PermissionError:
        return True
    except (OSError, KeyError, TypeError, ValueError, OverflowError):
        return False
    return True


def without_secrets(text: str) -> str:
    """Replaces passwords in URLs and access tokens in a text.

    >>> without_secrets("https://me:pass@host/rows.jsonl hf_abcdefghijklmnopqrst")
    'https://***@host/rows.jsonl ***'
    """
    return _SECRET.sub("***", text)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
