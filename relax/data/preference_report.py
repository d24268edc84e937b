"""What became of the rows of preferences: all that was cut, left out or not used."""

import dataclasses
from collections.abc import Iterator

from relax.data.report import MERGED


@dataclasses.dataclass(frozen=True)
class PreferenceReport:
    """What became of the rows.

    Attributes:
      format: of the rows, and `columns` of theirs that were read.
      unused_columns: of theirs that were not.
      num_rows, num_examples: read, and trained on.
      dropped: rows left out, by reason.
      truncated: rows of which something was cut.
      merged: rows whose prompt is cut short, see `prepare_preferences`.
      lengths, answer_lengths: percentiles of prompt and longer answer, and of answers, in tokens.
      num_tokens: of all prompts and answers, prompts counted per answer.
      example: one of them as text: prompt, first and second answer.
      notes: further things to know.
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
    answer_lengths: dict[int, int]
    num_tokens: int
    example: tuple[str, str, str]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict:
        """The report as JSON types, without the example."""
        fields = dataclasses.asdict(self)
        del fields["example"]
        return fields

    def lines(self) -> Iterator[str]:
        """What a person reads before training."""
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
        for name, n in (("tokens", self.lengths), ("answers", self.answer_lengths)):
            yield f"{name:12} min {n[0]:,}, median {n[50]:,}, 99 % {n[99]:,}, max {n[100]:,}"
        for note in self.notes:
            yield f"note         {note}"
