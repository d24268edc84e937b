"""Means with standard errors, and results as a table and as JSON."""

import importlib.metadata
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

PACKAGES = ("jax", "numpy", "transformers", "tokenizers", "reasoning-gym", "lm_eval")


class Estimate(NamedTuple):
    """A metric, and its standard error; None where there is none."""

    value: float
    stderr: float | None


@dataclass
class TaskResult:
    """The results of a task.

    Attributes:
      kind: rewards, choices or perplexity.
      n: number of rows.
      metrics: name -> estimate.
      samples: a dict per row.
      notes: sentences about the data.
    """

    kind: str
    n: int
    metrics: dict[str, Estimate]
    samples: list[dict] = field(default_factory=list)
    notes: tuple[str, ...] = ()


def mean(values: Sequence[float]) -> Estimate:
    """The mean, and its standard error s / sqrt(n), with s² divided by n - 1.

    >>> mean([1.0, 0.0, 1.0, 0.0])
    Estimate(value=0.5, stderr=0.28867513459481287)
    """
    array = np.asarray(values, np.float64)
    n = array.size
    return Estimate(float(array.mean()), float(array.std(ddof=1) / math.sqrt(n)) if n > 1 else None)


def ratio(totals: Sequence[float], weights: Sequence[float]) -> Estimate:
    """r = Σ total / Σ weight, of rows of different weights, such as nats per token.

    Its standard error is that of the linearised ratio,
    sqrt(n / (n - 1) Σ (total - r weight)²) / Σ weight (Cochran, Sampling Techniques, 1977, 6.3).
    """
    t, w = np.asarray(totals, np.float64), np.asarray(weights, np.float64)
    value, n = t.sum() / w.sum(), t.size
    spread = ((t - value * w) ** 2).sum() * n / max(n - 1, 1)
    return Estimate(float(value), float(math.sqrt(spread) / w.sum()) if n > 1 else None)


def exponential(estimate: Estimate) -> Estimate:
    """e to the power of an estimate; the error is e^x times that of x."""
    value = math.exp(min(estimate.value, 700))
    return Estimate(value, None if estimate.stderr is None else value * estimate.stderr)


def table(results: dict[str, TaskResult]) -> str:
    """All metrics, one a line."""
    lines = [f"{'task':32} {'n':>6}  {'metric':24} {'value':>10}  stderr"]
    for name, result in results.items():
        for metric, (value, stderr) in result.metrics.items():
            error = "" if stderr is None else f"{stderr:.4f}"
            line = f"{name[-32:]:32} {result.n:6}  {metric[:24]:24} {value:10.4f}  {error}"
            lines.append(line.rstrip())
    return "\n".join(lines)


def to_json(results: dict[str, TaskResult], config: dict[str, Any]) -> dict[str, Any]:
    """Results, samples, the configuration with its seed, and versions."""
    return {
        "results": {
            name: {
                "kind": result.kind,
                "n": result.n,
                "metrics": {m: estimate._asdict() for m, estimate in result.metrics.items()},
                "notes": list(result.notes),
            }
            for name, result in results.items()
        },
        "config": config,
        "versions": versions(),
        "samples": {name: result.samples for name, result in results.items()},
    }


def versions() -> dict[str, str]:
    """Versions of Python, of ReLax, and of the packages that results depend on."""
    from relax import __version__

    found = {"python": platform.python_version(), "relax": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
