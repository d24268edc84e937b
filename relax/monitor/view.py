"""Live view of a run: one screen with its status and recent metrics."""

import math
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from relax.config.text import format_number, format_seconds, strip_control
from relax.monitor.status import ENDED, is_alive, read_status
from relax.monitor.tail import Tail, sparkline

_COLOURS = {"finished": "green", "failed": "red", "stopped": "yellow", "killed": "red"}
# Displayed metrics and their titles.
SHOWN = {
    "loss": "loss",
    "eval_loss": "evaluation loss",
    "reward": "reward",
    "eval_reward": "evaluation reward",
    "eval_pass@1": "pass@1",
    "rewards/accuracies": "pair accuracy",
    "eval_rewards/accuracies": "evaluation pair accuracy",
    "mean_token_accuracy": "token accuracy",
    "kl": "KL",
    "entropy": "entropy",
    "completions/mean_length": "completion length",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens/s",
    "skipped_steps": "skipped updates",
}


def watch(directory: str | Path, console: Console, *, once: bool, interval_s: float = 1.0) -> str:
    """Shows a run until it ends, and returns its last phase.

    Args:
      directory: the run's output_dir; waits for a run that has not started.
      console: shows the view.
      once: show the current state and return.
      interval_s: seconds between refreshes.
    """
    directory = Path(directory)
    tail = Tail(directory / "metrics.jsonl")
    if once:
        status = read_status(directory / "status.json")
        console.print(view(directory.name, status, tail.read()))
        return phase_of(status)
    with Live(console=console, refresh_per_second=4, transient=False) as live:
        while True:
            status = read_status(directory / "status.json")
            live.update(view(directory.name, status, tail.read()))
            phase = phase_of(status)
            if phase in (*ENDED, "killed"):
                return phase
            time.sleep(interval_s)


def phase_of(status: dict[str, Any] | None) -> str:
    """The phase of a run; `killed` if its process is gone before the run ended."""
    if status is None:
        return "not begun"
    phase = str(status.get("phase"))
    return "killed" if phase not in ENDED and is_alive(status) is False else phase


def view(name: str, status: dict[str, Any] | None, series: dict[str, list[float]]) -> Panel:
    """One screen about a run. Its texts are not parsed as markup."""
    phase = phase_of(status)
    colour = _COLOURS.get(phase, "cyan")
    title = Text.assemble((name, "bold"), "  ", (phase, f"bold {colour}"))
    if status is None:
        waiting = Text("waiting for status.json: the run has not started, or is elsewhere")
        return Panel(waiting, title=title, title_align="left", border_style=colour)
    parts: list[Any] = [_progress(status), Text(), _numbers(series)]
    for record in [status.get("last_preview")]:
        if isinstance(record, dict):
            parts += [Text(), _preview(record)]
    for warning in (status.get("warnings") or [])[-3:]:
        said = warning.get("text") if isinstance(warning, dict) else warning
        parts.append(Text(f"! {strip_control(str(said))}", "yellow"))
    if status.get("error"):
        parts.append(Text(strip_control(str(status["error"])), "red"))
    return Panel(Group(*parts), title=title, title_align="left", border_style=colour)


def _progress(status: dict[str, Any]) -> Table:
    step, total = status.get("step") or 0, status.get("total_steps")
    words = [f"step {step:,}" + (f" of {total:,}" if total else "")]
    if status.get("epoch") is not None:
        words.append(f"epoch {status['epoch']:.2f}")
    goes_on = phase_of(status) not in (*ENDED, "killed")
    if status.get("time_left_s") and goes_on:
        words.append(f"{format_seconds(status['time_left_s'])} left")
    saved = status.get("last_checkpoint")
    if isinstance(saved, dict):
        words.append(f"saved at step {saved.get('step'):,}")
    age = _age_s(status)
    if age is not None and age > 10 and goes_on:
        words.append(f"last update {format_seconds(age)} ago")
    out = Table.grid(padding=(0, 2))
    out.add_row(
        ProgressBar(total=total or 1, completed=step if total else 0, width=24),
        Text("   ".join(words)),
    )
    return out


def _numbers(series: dict[str, list[float]]) -> Table:
    out = Table.grid(padding=(0, 2))
    out.add_column(style="dim")
    out.add_column(justify="right", style="bold")
    out.add_column(style="cyan", no_wrap=True)
    for name, title in SHOWN.items():
        values = series.get(name)
        if not values or (name == "skipped_steps" and not values[-1]):
            continue
        last = "not finite" if not math.isfinite(values[-1]) else format_number(values[-1])
        out.add_row(title, last, sparkline(values))
    return out


def _preview(record: dict[str, Any]) -> Table:
    out = Table.grid(padding=(0, 2))
    out.add_column(style="dim")
    out.add_column(max_width=100)
    marks: dict[Any, tuple[str, str]] = {True: ("  right", "green"), False: ("  wrong", "red")}
    mark = marks.get(record.get("right"), ("", ""))
    for title, key in (
        ("prompt", "prompt"),
        ("expected", "expected"),
        ("completion", "completion"),
    ):
        if record.get(key) is not None:
            said = Text(strip_control(str(record[key]))[-400:])
            out.add_row(title, Text.assemble(said, mark) if key == "completion" else said)
    return out


def _age_s(status: dict[str, Any]) -> float | None:
    try:
        then = datetime.fromisoformat(str(status.get("updated_at")))
        return (datetime.now(UTC) - then).total_seconds()
    except (ValueError, TypeError):
        return None
