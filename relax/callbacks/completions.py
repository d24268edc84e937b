"""Logging of rollouts: completions and rewards in JSON-lines files and a table."""

import json
import math
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from relax.config.text import nan_to_null, shorten
from relax.files import atomic_write
from relax.monitor.run_files import logged_columns
from relax.rewards import RewardRunner
from relax.trainers.callback import Callback, Event

_SHORT = 300  # maximum characters per cell


class Completions(Callback):
    """Writes the completions of a rollout to `step_<update>.jsonl`, and shows some of them.

    A line holds prompt, completion, finish reason, number of tokens, each reward, their weighted
    sum, the advantage and the columns logged by reward functions with `log_extra`. The file is
    named after the rollout's first update.

    Args:
      directory: directory of the files.
      every: write the rollouts whose updates include a multiple of this number.
      console: shows the table.
      shown: number of rows in the table; 0: no table.
    """

    def __init__(self, directory: Path, every: int, console: Console, shown: int = 0):
        self.directory, self.every = Path(directory), every
        self.console, self.shown = console, shown

    def on_batch_end(self, event: Event) -> None:
        updates = event.trainer.updates_per_item
        # The first batch of an item has the records; its updates are this one and the next.
        if not event.records or (event.step + updates - 1) // self.every == (
            (event.step - 1) // self.every
        ):
            return
        lines = (json.dumps(nan_to_null(record), ensure_ascii=False) for record in event.records)
        path = self.directory / f"step_{event.step:06d}.jsonl"
        atomic_write(
            path, "".join(f"{line}\n" for line in lines).encode(errors="replace"), sync=False
        )
        if self.shown:
            self.console.print(table(event.records[: self.shown], f"step {event.step}"))


class RewardCounters(Callback):
    """Saves and restores a reward runner's counts of failures with checkpoints."""

    def __init__(self, rewards: RewardRunner):
        self.rewards = rewards

    def state_dict(self) -> dict:
        return self.rewards.tally.state()

    def load_state_dict(self, state: dict) -> None:
        self.rewards.tally.restore(state)


def table(records: list[dict], title: str) -> Table:
    """A table of completions with a column per reward function and per logged column."""
    out = Table(title=title, show_lines=False, expand=False)
    out.add_column("Prompt", max_width=40, overflow="fold")
    out.add_column("Completion", max_width=60, overflow="fold")
    names, logged = list(records[0]["rewards"]), logged_columns(records)
    for name in names:
        out.add_column(Text(name), justify="right")
    for name in logged:
        out.add_column(Text(name), max_width=40, overflow="fold")
    out.add_column("Advantage", justify="right")
    for record in records:
        rewards = [record["rewards"][name] for name in names]
        # Texts of the model and the user must not be parsed as markup.
        out.add_row(
            Text(shorten(_text(record["prompt"]), _SHORT)),
            Text(shorten(record["completion"], _SHORT)),
            *map(_number, rewards),
            *(Text(shorten(_value(record.get(name)), _SHORT)) for name in logged),
            _number(record.get("advantage")),
        )
    return out


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.2f}"


def _value(value) -> str:
    """Formats a logged value for a cell."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _text(prompt) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))
