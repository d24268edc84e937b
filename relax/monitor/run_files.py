"""Reads the directory of a run: configuration, data report, status, metrics and texts."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relax.errors import DataError
from relax.files import json_object
from relax.monitor.status import read_status

TIME = "time/"
# Standard columns in `completions/`; all others were logged by reward functions.
COMPLETION = ("prompt", "completion", "finish", "tokens", "rewards", "reward", "advantage")


@dataclasses.dataclass(frozen=True)
class Run:
    """The contents of a run's directory.

    Attributes:
      name: the directory's name.
      config: config.json by section, or {}.
      data: data.json, the data report, or {}.
      status: status.json, or {}.
      series: steps and values of each metric; NaN for a non-finite value.
      previews: lines of `samples/`, by step.
      completions: lines of `completions/`, by step.
    """

    name: str
    config: dict[str, Any]
    data: dict[str, Any]
    status: dict[str, Any]
    series: dict[str, tuple[list[float], list[float]]]
    previews: dict[int, list[dict]]
    completions: dict[int, list[dict]]

    @property
    def algorithm(self) -> str:
        return str(self.config.get("algorithm") or self.status.get("algorithm") or "")

    def last(self, name: str) -> float | None:
        """The last finite value of a metric."""
        values = [v for v in self.series.get(name, ((), ()))[1] if math.isfinite(v)]
        return values[-1] if values else None


def read_run(directory: str | Path, previews: int = 50, completions: int = 8) -> Run:
    """Reads the directory of a run.

    Args:
      directory: the run's directory.
      previews, completions: maximum number of steps to read texts of, spread evenly.

    Raises:
      DataError: the directory contains no run.
    """
    directory = Path(directory)
    metrics, status = directory / "metrics.jsonl", read_status(directory / "status.json")
    if status is None and not metrics.is_file() and not (directory / "config.json").is_file():
        raise DataError(
            f"'{directory}' must be the output_dir of a run, but has no status.json, config.json "
            "or metrics.jsonl. Pass the directory given by --output_dir."
        )
    return Run(
        directory.resolve().name,
        _json(directory / "config.json"),
        _json(directory / "data.json"),
        status or {},
        read_series(metrics),
        _texts(directory / "samples", previews),
        _texts(directory / "completions", completions),
    )


def read_series(path: str | Path) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and values of each metric in a metrics.jsonl; malformed lines are skipped."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for record in read_lines(Path(path)):
        step = record.pop("step", None)
        if not _is_number(step):
            continue
        for name, value in record.items():
            if value is not None and not _is_number(value):
                continue
            steps, values = series.setdefault(name, ([], []))
            steps.append(step)
            values.append(math.nan if value is None else value)
    return series


def logged_columns(records: Sequence[dict]) -> list[str]:
    """The columns that reward functions added to completions with `log_extra`.

    >>> logged_columns([{"prompt": "2+2=", "completion": "4", "steps": 3}])
    ['steps']
    """
    return [n for n in dict.fromkeys(n for r in records for n in r) if n not in COMPLETION]


def _texts(directory: Path, most: int) -> dict[int, list[dict]]:
    """Lines of the files `step_<step>.jsonl` by step: first, last, and some in between."""
    files = {}
    for path in directory.glob("step_*.jsonl"):
        digits = path.stem.removeprefix("step_")
        if digits.isdecimal():
            files[int(digits)] = path
    steps = sorted(files)
    if len(steps) > most:
        chosen = {round(i * (len(steps) - 1) / (most - 1)) for i in range(most)}
        steps = [steps[i] for i in sorted(chosen)]
    return {step: read_lines(files[step]) for step in steps}


def read_lines(path: Path) -> list[dict]:
    """The objects in a file of JSON lines; malformed lines are skipped, a missing file has none."""
    records = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    records.append(json_object(line))
    except OSError:
        pass
    return records


def _json(path: Path) -> dict[str, Any]:
    return read_status(path) or {}


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
