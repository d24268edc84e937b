"""The report of a run, and the comparison of several, as one HTML page."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from relax.files import atomic_write
from relax.monitor import compare, sections
from relax.monitor.run_files import Run, read_run
from relax.monitor.style import SCRIPT, STYLE, policy

MOST_BYTES = 2_000_000
# From large to small: points per curve, steps with texts, characters per text.
BUDGETS = ((400, 8, 900), (200, 5, 400), (100, 3, 200), (40, 2, 80))


def write_report(directory: str | Path, path: str | Path | None = None) -> Path:
    """Writes the report of a run.

    Args:
      directory: the run's directory.
      path: the page; None: `report.html` in the directory.

    Raises:
      DataError: the directory contains no run.
    """
    return _write(Path(path or Path(directory) / "report.html"), run_page(read_run(directory)))


def write_comparison(directories: Sequence[str | Path], path: str | Path) -> Path:
    """Writes a page that compares the curves of several runs."""
    return _write(Path(path), comparison_page([read_run(one) for one in directories]))


def run_page(run: Run) -> str:
    """The report of a run as HTML of at most 2 MB, however much the run has written."""
    return _within_budget(lambda budget: _run_body(run, *budget), run.name)


def comparison_page(runs: Sequence[Run]) -> str:
    """The comparison of several runs as HTML."""
    runs = compare.with_distinct_names(runs)
    title = " and ".join(run.name for run in runs)
    return _within_budget(lambda budget: _comparison_body(runs, budget[0]), title)


def _run_body(run: Run, points: int, steps: int, characters: int) -> str:
    return "".join(
        (
            sections.head(run),
            sections.alerts(run),
            sections.curves(run, points),
            sections.times(run),
            sections.previews(run, steps, characters),
            sections.completions(run, steps, characters),
            '<div class="two">',
            sections.data(run, characters),
            sections.environment(run),
            "</div>",
            sections.configuration(run, characters),
        )
    )


def _comparison_body(runs: Sequence[Run], points: int) -> str:
    return "".join(
        (
            compare.head(runs),
            compare.curves(runs, points),
            compare.numbers(runs),
            compare.configuration(runs),
        )
    )


def _within_budget(body, title: str) -> str:
    for budget in BUDGETS:
        page = _document(title, body(budget))
        if len(page.encode()) < MOST_BYTES:
            return page
    return _document(title, "<h1>This run has written too much for one page.</h1>")


def _document(title: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy())}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)} · ReLax</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _write(path: Path, page: str) -> Path:
    # A lone surrogate, which JSON can hold, cannot be encoded.
    atomic_write(path, page.encode(errors="replace"), sync=False)
    return path
