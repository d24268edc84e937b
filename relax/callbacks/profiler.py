"""A trace of some updates for Perfetto and TensorBoard."""

from contextlib import ExitStack
from pathlib import Path

import jax
from rich.console import Console

from relax.callbacks.metrics import exclude_from_timing
from relax.errors import ConfigError
from relax.trainers.callback import Callback, Event


class Profiler(Callback):
    """Traces the updates from `first` to `last`, inclusive, counted from 1.

    The trace is written to `<directory>/plugins/profile/<time>/`: the `.trace.json.gz` opens at
    ui.perfetto.dev, the directory in TensorBoard with its profile plugin, which shows the updates
    as steps. It includes the rollouts between these updates, but no Python functions, which would
    exceed the limit of a million events.

    Args:
      directory: directory of the trace.
      first, last: first and last update to trace; the first update of a run also compiles.
      console: shows messages; None: no messages.
    """

    def __init__(
        self, directory: str | Path, first: int, last: int, console: Console | None = None
    ):
        if not 1 <= first <= last:
            raise ConfigError(f"updates to trace must be 1 <= first <= last, got {first}:{last}.")
        self.directory, self.first, self.last, self.console = directory, first, last, console
        self._is_on, self._update = False, ExitStack()

    def on_train_begin(self, event: Event) -> None:
        total = event.total_steps
        if total is not None and total < self.first:
            raise ConfigError(
                f"profile_steps {self.first}:{self.last} must start within the run, which has "
                f"{total} updates. Choose earlier ones."
            )
        if event.step >= self.last:
            self._say(f"no trace: updates {self.first} to {self.last} are already done")

    def on_batch_begin(self, event: Event) -> None:
        update = event.step + 1
        if not self._is_on and self.first <= update <= self.last:
            jax.block_until_ready(event.state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            with exclude_from_timing(event):
                jax.profiler.start_trace(str(self.directory), profiler_options=options)
            self._is_on = True
        if self._is_on:
            self._update.enter_context(jax.profiler.StepTraceAnnotation("train", step_num=update))

    def on_batch_end(self, event: Event) -> None:
        self._update.close()
        if self._is_on and event.step >= self.last:
            jax.block_until_ready(event.state)
            with exclude_from_timing(event):
                self.close()

    def close(self) -> None:
        self._update.close()
        if self._is_on:
            self._is_on = False
            jax.profiler.stop_trace()
            self._say(f"the trace is in '{self.directory}' (opens in Perfetto and TensorBoard)")

    def _say(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text, markup=False)
