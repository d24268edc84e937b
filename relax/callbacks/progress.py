"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere."""

import time

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from relax.parallel.cpu import release_freed_memory
from relax.trainers.callback import Callback, Event

# How a metric is shown, in this order; those that are not here are in metrics.jsonl alone.
_TEXTS = {
    "loss": "loss {:.4f}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "grad norm {:.3f}",
    "accuracy": "accuracy {:.3f}",
    "rewards/accuracies": "accuracy {:.3f}",
    "mean_token_accuracy": "accuracy {:.3f}",
    "margin": "margin {:.3f}",
    "rewards/margins": "margin {:.3f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "skipped_steps": "{} skipped",
    "reward": "reward {:.3f}",
    "kl": "kl {:.4f}",
    "objective/kl": "kl {:.3f}",
    "completions/mean_length": "length {:.1f}",
    "eval_loss": "evaluation loss {:.4f}",
    "eval_reward": "evaluation reward {:.4f}",
    "eval_pass@1": "pass@1 {:.3f}",
    "eval_accuracy": "accuracy {:.3f}",
    "eval_rewards/accuracies": "accuracy {:.3f}",
    "eval_mean_token_accuracy": "accuracy {:.3f}",
    "eval_rewards/margins": "margin {:.3f}",
}


class Progress(Callback):
    """Step, epoch, loss, learning rate, tokens per second, time left; and a line when compiling.

    Args:
      console: where to; None: a console on standard output.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self._bar: Bar | None = None
        self._task = None
        self._shapes: set = set()
        self._compiling: tuple[str, float] | None = None
        self._total: int | None = None

    def on_train_begin(self, event: Event) -> None:
        self._total = event.total_steps
        if not self.console.is_terminal:
            return
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            TextColumn("{task.fields[values]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self.console,
        )
        self._task = self._bar.add_task(
            self._where(event), total=event.total_steps, completed=event.step, values=""
        )
        self._bar.start()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_batch_begin(self, event: Event) -> None:
        self.announce(event.batch)

    def announce(self, batch) -> None:
        """Says that the step is about to be compiled for a batch (or its shapes), if it is new."""
        shape = str(jax.tree.map(np.shape, batch))
        if shape in self._shapes:
            return
        self._shapes.add(shape)
        sizes = {np.shape(leaf)[:2] for leaf in jax.tree.leaves(batch)}
        rows = " x ".join(map(str, max(sizes, key=len)))
        self._compiling = (rows, time.monotonic())
        self.console.print(f"compiling the train step for batches of {rows} ...")

    def on_batch_end(self, event: Event) -> None:
        if self._compiling:
            rows, start_s = self._compiling
            jax.block_until_ready(event.metrics)
            seconds = time.monotonic() - start_s
            self.console.print(f"compiled for {rows}, and one step taken, in {seconds:.1f} s")
            self._compiling = None
            release_freed_memory()  # compiling took much of it
        if self._bar is not None:
            self._bar.update(self._task, completed=event.step, description=self._where(event))

    def show(self, record: dict) -> None:
        """Takes a record of `MetricsLog`, as one of its listeners."""
        # There are two kinds of accuracy then, and of pairs is what such a run is for.
        pairs = any(name.endswith("rewards/accuracies") for name in record)
        shown = [
            text.format(record[name])
            for name, text in _TEXTS.items()
            if name in record
            and not (name == "skipped_steps" and record[name] == 0)
            and not (pairs and name.endswith("token_accuracy"))
        ]
        if self._bar is not None and not any(name.startswith("eval_") for name in record):
            # A line of 80 characters has no room for more; the file has the rest.
            left_out = ("grad norm", "accuracy", "margin", "length")
            kept = [text for text in shown if not text.startswith(left_out)]
            self._bar.update(self._task, values="  ".join(kept))
            return
        total = f"/{self._total}" if self._total else ""
        where = [f"step {record['step']}{total}"]
        where += [f"epoch {record['epoch']:.2f}"] if "epoch" in record else []
        self.console.print("  ".join(where + shown))

    def _where(self, event: Event) -> str:
        total = f"/{event.total_steps}" if event.total_steps else ""
        return f"step {event.step}{total}  epoch {event.epochs_done:.2f}"
