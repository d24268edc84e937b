"""The report on the data before the first step, and its form on a terminal."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from relax.data.examples import IGNORE, Encoded

PERCENTS = (0, 50, 90, 99, 100)
MERGED = "rows whose prompt alone is no prefix of the whole: the prompt is the common beginning"


@dataclass(frozen=True)
class DataReport:
    """Counts and lengths of the rows of a data set.

    Args:
      format: format of the rows.
      columns: the columns that were read.
      unused_columns: the columns that were not.
      num_rows: rows read.
      num_examples: rows that are trained on.
      dropped: number of dropped rows, by reason.
      truncated: number of rows truncated to max_length.
      merged: number of rows whose tokenised prompt is no prefix of the whole: a token spans the
        border, or the chat template renders the prompt differently before a completion. The prompt
        is the common beginning, and the rest is trained on.
      endless: number of rows without a trained end token.
      turns: number of assistant messages found `by marks` of the template and `by rendering`, and
        of those `untrained`; empty where the loss is not by messages.
      lengths: tokens per row before truncation, by percentile.
      num_tokens: tokens of the examples.
      num_trained_tokens: trained tokens of the examples.
      trained_on: description of the trained tokens.
      last_trained_token: that of the first example, as text.
      ends_trained: whether the first example's end token is trained on.
      notes: further remarks.
      examples: the first examples as pieces of text, each trained on or not.
      packing: the strategy, if rows are packed.
      num_packed_rows: number of packed rows.
      num_dropped_packed_rows: packed rows dropped for lack of trained tokens.
      packing_fill: fraction of packed rows that is not padding.
    """

    format: str
    columns: tuple[str, ...]
    unused_columns: tuple[str, ...]
    num_rows: int
    num_examples: int
    dropped: dict[str, int]
    truncated: int
    merged: int
    endless: int
    lengths: dict[int, int]
    num_tokens: int
    num_trained_tokens: int
    trained_on: str
    last_trained_token: str
    ends_trained: bool
    turns: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    examples: tuple[tuple[tuple[str, bool], ...], ...] = ()
    packing: str | None = None
    num_packed_rows: int | None = None
    num_dropped_packed_rows: int = 0
    packing_fill: float | None = None

    @property
    def share(self) -> float:
        """Fraction of tokens that are trained on."""
        return self.num_trained_tokens / self.num_tokens

    def with_packing(self, strategy: str, loader) -> "DataReport":
        """The report with the counts of a packing loader."""
        return dataclasses.replace(
            self,
            packing=strategy,
            num_packed_rows=len(loader.rows),
            num_dropped_packed_rows=loader.num_dropped_rows,
            packing_fill=loader.fill,
        )

    def to_dict(self) -> dict:
        """The report as JSON types, without the examples, which are the user's data."""
        fields = dataclasses.asdict(self)
        del fields["examples"]
        return {**fields, "lengths": {str(k): v for k, v in self.lengths.items()}} | {
            "share": self.share
        }


def percentiles(lengths: Sequence[int] | np.ndarray) -> dict[int, int]:
    """Minimum, median, 90th and 99th percentile, and maximum of the lengths.

    >>> percentiles([1, 2, 3, 4, 5])
    {0: 1, 50: 3, 90: 5, 99: 5, 100: 5}
    """
    values = np.percentile(lengths, PERCENTS, method="inverted_cdf")
    return {p: int(v) for p, v in zip(PERCENTS, values, strict=True)}


def spans(example: Encoded, tokenizer) -> tuple[tuple[str, bool], ...]:
    """The example as pieces of text, each trained on or not."""
    trained = example.labels != IGNORE
    edges = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), len(trained)]
    return tuple(
        (tokenizer.decode(example.input_ids[a:b].tolist()), bool(trained[a]))
        for a, b in zip(edges, edges[1:], strict=False)
    )


def render(report: DataReport, console, print_examples: int = 1, title: str = "data") -> None:
    """Prints the report on a rich console.

    Trained tokens are bold green, or «like this» without colour.

    Args:
      report: report to print.
      console: a `rich.console.Console`.
      print_examples: number of examples to show.
      title: title of the table.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in _lines(report):
        # Column names and tokens are the user's: never markup.
        table.add_row(name, Text(value), style="yellow" if name == "note" else None)
    console.rule(title, align="left", style="dim")
    console.print(table)
    plain = console.color_system is None or console.no_color
    for i, example in enumerate(report.examples[:print_examples]):
        marked = "«trained»" if plain else "trained tokens in green"
        console.rule(Text(f"example {i + 1}, {marked}"), align="left", style="dim")
        console.print(_coloured(example, plain), soft_wrap=True)


def _lines(report: DataReport):
    yield "format", f"{report.format} ({', '.join(report.columns)})"
    if report.unused_columns:
        yield "not used", ", ".join(report.unused_columns)
    dropped = sum(report.dropped.values())
    yield "rows", f"{report.num_rows:,} read, {report.num_examples:,} trained on"
    if dropped:
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in report.dropped.items())
        yield "dropped", f"{dropped:,} ({reasons})"
    yield "truncated", f"{report.truncated:,}"
    if report.merged:
        yield "merged", f"{report.merged:,} {MERGED}"
    names = {0: "min", 50: "median", 90: "90 %", 99: "99 %", 100: "max"}
    yield "tokens a row", ", ".join(f"{names[p]} {n:,}" for p, n in report.lengths.items())
    trained = f"{report.num_trained_tokens:,} trained ({report.share:.1%}): {report.trained_on}"
    yield "tokens", f"{report.num_tokens:,}, of which {trained}"
    if report.turns:
        found = (f"{count:,} {how}" for how, count in report.turns.items())
        yield "assistant turns", ", ".join(found)
    if report.packing:
        packed = f"{report.num_packed_rows:,} rows, {report.packing_fill:.1%} full"
        yield "packing", f"{report.packing}: {packed}"
    if report.num_dropped_packed_rows:
        yield (
            "dropped rows",
            f"{report.num_dropped_packed_rows:,} packed rows without a trained token",
        )
    end = "end token trained" if report.ends_trained else "end token NOT trained"
    yield "last trained", f"{report.last_trained_token!r} ({end})"
    for note in report.notes:
        yield "note", note


def _coloured(example, plain: bool):
    from rich.text import Text

    text = Text()
    for piece, trained in example:
        if plain:
            text.append(f"«{piece}»" if trained else piece)
        else:
            text.append(piece, style="bold green" if trained else "dim")
    return text
