"""Writes the report page of a run at every save."""

import time
from collections.abc import Callable
from pathlib import Path

from relax.monitor import write_report
from relax.trainers.callback import Callback, Event

_SHARE = 0.05  # maximum share of the run's time for writing pages


class Report(Callback):
    """Writes `report.html` at every save.

    If that would take more than a twentieth of the time since the last page, as with a save after
    every update, the page is written later. An error while writing does not end the run: `say` is
    called once with the reason.

    Args:
      directory: the run's directory.
      say: called with an error, as a sentence.
    """

    def __init__(self, directory: str | Path, say: Callable[[str], None]):
        self.directory, self.say = Path(directory), say
        self._cost_s, self._written_s = 0.0, time.monotonic()
        self._said = self._due = False

    def on_save(self, event: Event) -> None:
        self._due = True
        self._write_in_time()

    def on_batch_end(self, event: Event) -> None:
        self._write_in_time()

    def _write_in_time(self) -> None:
        if self._due and self._cost_s <= _SHARE * (time.monotonic() - self._written_s):
            self.write()

    def write(self) -> Path | None:
        """Writes the page now; returns None on failure."""
        start_s, self._due = time.monotonic(), False
        try:
            return write_report(self.directory)
        except Exception as error:
            if not self._said:
                self._said = True
                self.say(f"the report cannot be written: {type(error).__name__}: {error}")
            return None
        finally:
            self._written_s = time.monotonic()
            self._cost_s = self._written_s - start_s
