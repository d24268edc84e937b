"""Comparison of runs on one page: curves, last values and differing options."""

import dataclasses
import math
import re
from collections.abc import Sequence

from relax.config.text import format_number, format_seconds
from relax.monitor.curves import Series, chart
from relax.monitor.run_files import TIME, Run
from relax.monitor.sections import CHARTS, UNDRAWN, plain, text


def with_distinct_names(runs: Sequence[Run]) -> list[Run]:
    """The runs, with numbers added to equal directory names."""
    names = [run.name for run in runs]
    return [
        dataclasses.replace(run, name=f"{run.name} ({i})") if names.count(run.name) > 1 else run
        for i, run in enumerate(runs, 1)
    ]


def head(runs: Sequence[Run]) -> str:
    """The header: names, phases and times of the runs."""
    title = " · ".join(run.name for run in runs)
    facts = "".join(
        f"<div><dt>{text(run.name)}</dt><dd>{text(run.status.get('phase') or 'unknown')} <small>"
        f"{text(run.algorithm.upper())}, {format_seconds(run.last('elapsed_s'))}</small></dd></div>"
        for run in runs
    )
    return f'<header><h1>{text(title, 400)}</h1></header><dl class="facts">{facts}</dl>'


def curves(runs: Sequence[Run], points: int) -> str:
    """One chart per metric, with a curve per run."""
    names = list(dict.fromkeys(name for run in runs for name in run.series if name not in UNDRAWN))
    first = [n for _, pattern in CHARTS for n in names if re.fullmatch(pattern, n)]
    first = [n for n in dict.fromkeys(first) if not n.startswith(TIME)]
    rest = sorted(set(names) - set(first))
    main, more = ("".join(_chart(name, runs, points) for name in part) for part in (first, rest))
    out = f'<h2>Curves</h2><div class="charts">{main}</div>'
    if more:
        out += f'<details><summary>more metrics</summary><div class="charts">{more}</div></details>'
    return out


def _chart(name: str, runs: Sequence[Run], points: int) -> str:
    drawn = [
        Series(run.name, *run.series[name], points=name.startswith("eval_"), colour=i)
        for i, run in enumerate(runs)
        if name in run.series
    ]
    return chart(name, drawn, points // len(runs) + 20)


def numbers(runs: Sequence[Run]) -> str:
    """The last value of every metric."""
    names = list(dict.fromkeys(name for run in runs for name in run.series))
    rows = "".join(
        f"<tr><th>{text(name)}</th>"
        + "".join(f'<td class="n">{_shown(run.last(name))}</td>' for run in runs)
        + "</tr>"
        for name in names
    )
    return f"<h2>Last values</h2>{_table(runs, rows, 'n')}" if rows else ""


def configuration(runs: Sequence[Run]) -> str:
    """The options that differ."""
    flat = [
        {name: value for part in run.config.values() if isinstance(part, dict)
         for name, value in part.items()}
        for run in runs
    ]  # fmt: skip
    missing = object()
    names = [
        name
        for name in dict.fromkeys(name for fields in flat for name in fields)
        if any(fields.get(name, missing) != flat[0].get(name, missing) for fields in flat)
    ]
    rows = "".join(
        f"<tr><th>{text(name)}</th>"
        + "".join(f"<td>{text(plain(f[name])) if name in f else 'not there'}</td>" for f in flat)
        + "</tr>"
        for name in names
    )
    body = _table(runs, rows, "") if rows else "<p>They have the same configuration.</p>"
    return f"<h2>Options that differ</h2>{body}"


def _table(runs: Sequence[Run], rows: str, kind: str) -> str:
    top = "".join(f'<th class="{kind}">{text(run.name)}</th>' for run in runs)
    return f'<div class="scroll"><table><tr><th></th>{top}</tr>{rows}</table></div>'


def _shown(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else format_number(value)
