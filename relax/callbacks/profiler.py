"""A trace of some updates: what the device and the host did in them, and for how long."""

from pathlib import Path

import jax
from rich.console import Console

from relax.errors import ConfigError
from relax.trainers.callback import Callback, Event


class Profiler(Callback):
    """Traces the updates from `first` to `last`, both of them included, counted from 1.

    The trace lies in `<directory>/plugins/profile/<time>/`: the `.trace.json.gz` opens at
    ui.perfetto.dev, the directory in TensorBoard with its profile plugin. Of an algorithm that
    rolls out, rollouts between these updates are in it.

    Args:
      directory: of the trace.
      first, last: updates; the first one that a run makes has to compile.
      console: where it says what it does; None: nowhere.
    """

    def __init__(
        self, directory: str | Path, first: int, last: int, console: Console | None = None
    ):
        if not 1 <= first <= last:
            raise ConfigError(f"updates to trace must be 1 <= first <= last, got {first}:{last}.")
        self.directory, self.first, self.last, self.console = directory, first, last, console
        self._is_on = False

    def on_train_begin(self, event: Event) -> None:
        total = event.total_steps
        if total is not None and total < self.first:
            raise ConfigError(
                f"profile_steps {self.first}:{self.last} must begin within the run, which has "
                f"{total} updates. Name earlier ones."
            )
        if event.step >= self.last:
            self._say(f"nothing is traced: updates {self.first} to {self.last} are done")

    def on_batch_begin(self, event: Event) -> None:
        if not self._is_on and self.first <= event.step + 1 <= self.last:
            jax.block_until_ready(event.state)
            jax.profiler.start_trace(str(self.directory))
            self._is_on = True

    def on_batch_end(self, event: Event) -> None:
        if self._is_on and event.step >= self.last:
            jax.block_until_ready(event.state)
            self.close()

    def close(self) -> None:
        if self._is_on:
            self._is_on = False
            jax.profiler.stop_trace()
            self._say(f"the trace is in '{self.directory}' (opens in Perfetto and TensorBoard)")

    def _say(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text, markup=False)
