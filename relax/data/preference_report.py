"""The report on preference rows: truncated, dropped and unused data."""

import dataclasses
from collections.abc import Iterator

from relax.data.report import MERGED


@dataclasses.dataclass(frozen=True)
class PreferenceReport:
    """Counts and lengths of preference rows.

    Attributes:
      format, columns: format of the rows, and the columns that were read.
      unused_columns: the other columns.
      num_rows, num_examples: number of rows read, and trained on.
      dropped: number of dropped rows, by reason.
      truncated: number of truncated rows.
      merged: number of rows with a shortened prompt, see `prepare_preferences`.
      lengths, completion_lengths: percentiles, in tokens; `lengths` are those of a prompt with its
        longer completion.
      num_tokens: tokens of prompts and completions; a prompt counts once per completion.
      example: one row as text: prompt, first and second completion.
      notes: further remarks.
    """

    format: str
    columns: tuple[str, ...]
    unused_columns: tuple[str, ...]
    num_rows: int
    num_examples: int
    dropped: dict[str, int]
    truncated: int
    merged: int
    lengths: dict[int, int]
    completion_lengths: dict[int, int]
    num_tokens: int
    example: tuple[str, str, str]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict:
        """The report as JSON types, without the example."""
        fields = dataclasses.asdict(self)
        del fields["example"]
        return fields

    def lines(self) -> Iterator[str]:
        """The report as lines of text."""
        yield f"format       {self.format} ({', '.join(self.columns)})"
        if self.unused_columns:
            yield f"not used     {', '.join(self.unused_columns)}"
        yield f"rows         {self.num_rows:,} read, {self.num_examples:,} trained on"
        if self.dropped:
            reasons = "; ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
            yield f"dropped      {sum(self.dropped.values()):,} ({reasons})"
        yield f"truncated    {self.truncated:,}"
        if self.merged:
            yield f"merged       {self.merged:,} {MERGED}"
        for name, n in (("tokens", self.lengths), ("completions", self.completion_lengths)):
            yield f"{name:12} min {n[0]:,}, median {n[50]:,}, 99 % {n[99]:,}, max {n[100]:,}"
        for note in self.notes:
            yield f"note         {note}"
