"""Progress display: a bar and lines on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

from relax.config.text import format_seconds
from relax.parallel.cpu import release_freed_memory
from relax.trainers.callback import Callback, Event
from relax.trainers.rl_trainer import RLTrainer

# Displayed metrics and their formats, the most important first; metrics.jsonl has all of them.
_TEXTS = {
    "loss": "loss {:.4f}",
    "reward": "reward {:.3f}",
    "skipped_steps": "{} skipped",
    "eval_loss": "evaluation loss {:.4f}",
    "eval_reward": "evaluation reward {:.4f}",
    "eval_pass@1": "pass@1 {:.3f}",
    "accuracy": "accuracy {:.3f}",
    "rewards/accuracies": "accuracy {:.3f}",
    "mean_token_accuracy": "accuracy {:.3f}",
    "eval_accuracy": "accuracy {:.3f}",
    "eval_rewards/accuracies": "accuracy {:.3f}",
    "eval_mean_token_accuracy": "accuracy {:.3f}",
    "margin": "margin {:.3f}",
    "rewards/margins": "margin {:.3f}",
    "eval_rewards/margins": "margin {:.3f}",
    "kl": "kl {:.4f}",
    "objective/kl": "kl {:.3f}",
    "completions/mean_length": "length {:.1f}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "grad norm {:.3f}",
    "tokens_per_second": "{:,.0f} tokens/s",
}
_IN_BAR = ("loss", "reward", "tokens_per_second")
_BAR_WIDTH = 10
_ROLLOUT = "rollout"
_SAY_EVERY_S, _SAY_FROM_S = 5.0, 2.0
_CACHE_DIR = "jax_compilation_cache_dir"


class TimeLeft:
    """Estimates the time left from past updates, without compilation, evaluation and saving."""

    def __init__(self):
        self._spent_s, self._updates = 0.0, 0
        self._since_s: float | None = None

    def start(self) -> None:
        self._since_s = time.monotonic()

    def pause(self) -> None:
        if self._since_s is not None:
            self._spent_s += time.monotonic() - self._since_s
            self._since_s = None

    def count(self) -> None:
        """Counts an update whose time was measured."""
        self._updates += 1

    def seconds(self, updates: int | None) -> float | None:
        """Estimated seconds for `updates` more updates; None if unknown so far."""
        if updates is None or not self._updates:
            return None
        running_s = 0.0 if self._since_s is None else time.monotonic() - self._since_s
        return (self._spent_s + running_s) / self._updates * updates


class Progress(Callback):
    """Shows step, loss, reward, time left, current activity, and a line per logging window.

    On a terminal a bar stays below the lines; lines show only the metrics that fit the terminal's
    width. The method `show` is a listener of `MetricsLog`.

    Args:
      console: shows the progress; None: standard output.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._shapes: set = set()
        self._compiling: tuple[str, float] | None = None
        self._step = 0
        self._total: int | None = None
        self._values: list[str] = []
        self._activity, self._since_s = "", time.monotonic()
        self._left = TimeLeft()

    def on_train_begin(self, event: Event) -> None:
        self._step, self._total, self._left = event.step, event.total_steps, TimeLeft()
        if self.console.is_terminal:
            self._bar = Bar(
                _Cell(self._where),
                BarColumn(bar_width=_BAR_WIDTH),
                _Cell(self._status),
                console=self.console,
            )
            self._task = self._bar.add_task("", total=event.total_steps, completed=event.step)
            self._bar.start()
        if isinstance(event.trainer, RLTrainer):
            self._begin("sampling the first completions, which compiles the sampler")
            self._say_plainly(f"{self._activity} ...")

    def close(self) -> None:
        self._begin("")
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_batch_begin(self, event: Event) -> None:
        self.announce(event.batch)
        if self._compiling is None:
            self._begin("")

    def announce(self, batch) -> None:
        """Announces that the train step will be compiled for a batch (or shapes), if it is new."""
        shape = str(jax.tree.map(np.shape, batch))
        if shape in self._shapes:
            return
        self._shapes.add(shape)
        fields = getattr(batch, "tokens", batch)  # PPO's `Experience` has `tokens`
        is_rows = isinstance(fields, Mapping) and "input_ids" in fields
        sizes = [np.shape(leaf)[:2] for leaf in jax.tree.leaves(batch)]
        rows = " x ".join(map(str, fields["input_ids"].shape if is_rows else max(sizes, key=len)))
        self._compiling = (rows, time.monotonic())
        self._left.pause()
        self._begin(f"compiling the train step for {rows}")
        cache = getattr(jax.config, _CACHE_DIR)
        if cache and len(self._shapes) == 1:
            self._print(f"compiled programs are kept in '{cache}' for the next run")
        self._print(f"compiling the train step for batches of {rows} ...")

    def on_batch_end(self, event: Event) -> None:
        self._step = event.step
        if self._compiling:
            rows, start_s = self._compiling
            jax.block_until_ready(event.metrics)
            seconds, count = time.monotonic() - start_s, len(self._shapes)
            which = f", batch shape {count} of this run" if count > 1 else ""
            self._print(f"compiled for {rows} and made one step in {seconds:.1f} s{which}")
            self._compiling = None
            release_freed_memory()  # compiling took much of it
            if count == 1:  # the first rollout includes compilation
                self._left = TimeLeft()
            self._left.start()
        else:
            self._left.count()
        if self._bar is not None:
            self._bar.update(self._task, completed=event.step)
        self._await_next(event)

    def on_validation_begin(self, event: Event) -> None:
        self._left.pause()
        self._begin("evaluating")
        if event.epoch is not None:
            self._say_plainly(f"evaluating after step {event.step} ...")

    def on_validation_end(self, event: Event) -> None:
        self._left.start()
        self._await_next(event)

    def on_save(self, event: Event) -> None:
        self._left.start()
        self._await_next(event)

    def on_train_end(self, event: Event) -> None:
        self._begin("")

    def state_dict(self) -> dict:
        # No state, but this is called right before a checkpoint is written.
        self._left.pause()
        self._begin("saving")
        return {}

    def show(self, record: dict) -> None:
        """Shows one record of `MetricsLog`."""
        # A run on pairs has two accuracies; show the one of pairs.
        pairs = any(name.endswith("rewards/accuracies") for name in record)
        shown = {
            name: text.format(record[name])
            for name, text in _TEXTS.items()
            if name in record
            and not (name == "skipped_steps" and record[name] == 0)
            and not (pairs and name.endswith("token_accuracy"))
        }
        if not any(name.startswith("eval_") for name in record):
            self._values = [shown[name] for name in _IN_BAR if name in shown]
        total = f"/{self._total}" if self._total else ""
        where = [f"step {record['step']}{total}"]
        where += [f"epoch {record['epoch']:.2f}"] if "epoch" in record else []
        parts = [*where, *shown.values()]
        room = self.console.width if self.console.is_terminal else None
        self._print("  ".join(fitting(parts, room)))

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def _say_plainly(self, text: str) -> None:
        """Prints a line where there is no progress bar to show it."""
        if self._bar is None:
            self._print(text)

    def _begin(self, activity: str) -> None:
        self._activity, self._since_s = activity, time.monotonic()

    def _await_next(self, event: Event) -> None:
        """Sets the activity after an update: the next rollout once all updates of one are done."""
        trainer = event.trainer
        is_due = isinstance(trainer, RLTrainer) and event.step % trainer.updates_per_item == 0
        self._begin(_ROLLOUT if is_due else "")

    def _where(self) -> str:
        return f"step {self._step}/{self._total}" if self._total else f"step {self._step}"

    def _time_left(self) -> str:
        seconds = self._left.seconds(self._total and self._total - self._step)
        return "" if seconds is None else f"{format_seconds(seconds)} left"

    def _status(self) -> str:
        """The last metrics that fit, the activity if it has lasted a second, and the time left."""
        # The clock is read once: the text of the time left has the width that the others leave it.
        left = self._time_left()
        room = max(self.console.width - len(self._where()) - _BAR_WIDTH - len(left) - 4, 0)
        seconds = time.monotonic() - self._since_s
        if not self._activity or seconds < 1:
            parts = fitting(self._values, room)
        else:
            activity = f"{self._activity} ({seconds:.0f} s)"[:room]
            parts = [*fitting(self._values, room - len(activity) - 2), activity]
        return "  ".join(filter(None, [*parts, left]))


class _Cell(ProgressColumn):
    """A column of the bar whose text is computed at every refresh."""

    def __init__(self, text):
        super().__init__(Column(no_wrap=True))
        self._text = text

    def render(self, task) -> Text:
        return Text(self._text())


def fitting(parts: Iterable[str], room: int | None) -> list[str]:
    """The parts that fit on a line of `room` characters, with two spaces between; None: all.

    >>> fitting(["step 1", "loss 0.5", "a long one", "b"], 20)
    ['step 1', 'loss 0.5', 'b']
    """
    kept: list[str] = []
    for part in parts:
        if room is None or len("  ".join([*kept, part])) <= room:
            kept.append(part)
    return kept


@contextlib.contextmanager
def working(console: Console, text: str) -> Iterator[Callable[[str], None]]:
    """Context that shows an activity: on a terminal with its seconds, elsewhere as lines.

    Args:
      console: shows the activity.
      text: the activity, such as "loading the model".

    Yields:
      A function that reports progress; not on a terminal it prints a line every 5 s at most.
    """
    start_s = said_s = time.monotonic()
    if not console.is_terminal:
        console.print(f"{text} ...", markup=False, soft_wrap=True)

        def report(how_far: str) -> None:
            nonlocal said_s
            if time.monotonic() - said_s >= _SAY_EVERY_S:
                said_s = time.monotonic()
                console.print(f"  {how_far}", markup=False, soft_wrap=True)

        yield report
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False))
    with Bar(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task(text, total=None)
        yield lambda how_far: bar.update(task, description=f"{text}: {how_far}")
    if time.monotonic() - start_s >= _SAY_FROM_S:
        seconds = format_seconds(time.monotonic() - start_s)
        console.print(f"{text}: {seconds}", markup=False, soft_wrap=True)
