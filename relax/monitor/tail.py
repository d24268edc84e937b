"""Reader for the new lines of a growing metrics file."""

import math
from pathlib import Path

from relax.files import json_object

SPARKS = "▁▂▃▄▅▆▇█"


class Tail:
    """Reads new lines of a metrics.jsonl, and keeps the last values of each metric.

    Args:
      path: the file, which may not exist yet.
      most: maximum number of values per metric.
    """

    def __init__(self, path: str | Path, most: int = 400):
        self.path, self.most = Path(path), most
        self._clear()

    def _clear(self) -> None:
        self.series: dict[str, list[float]] = {}
        self._offset = 0

    def read(self) -> dict[str, list[float]]:
        """Reads new lines; returns all values by metric. Starts over if the file was truncated."""
        try:
            if self.path.stat().st_size < self._offset:
                self._clear()
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                lines = file.read().splitlines(keepends=True)
        except OSError:
            return self.series
        for line in lines:
            if not line.endswith(b"\n"):
                break  # still being written
            self._offset += len(line)
            self._take(line)
        return self.series

    def _take(self, line: bytes) -> None:
        try:
            record = json_object(line)
        except ValueError:
            return
        for name, value in record.items():
            if value is None or isinstance(value, int | float):
                values = self.series.setdefault(name, [])
                values.append(math.nan if value is None else value)
                del values[: -self.most]


def sparkline(values: list[float], width: int = 24) -> str:
    """Draws a curve as one line of text, scaled from its smallest to its largest section mean.

    >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7]), sparkline([2.0, 2.0]), sparkline([float("nan")])
    ('▁▂▃▄▅▆▇█', '▁▁', ' ')
    """
    n = len(values)
    width = min(width, n)
    means = []
    for i in range(width):
        stretch = values[i * n // width : (i + 1) * n // width]
        real = [v for v in stretch if math.isfinite(v)]
        means.append(sum(real) / len(real) if real else math.nan)
    real = [v for v in means if math.isfinite(v)]
    if not real:
        return " " * width
    low, span = min(real), (max(real) - min(real)) or 1.0
    top = len(SPARKS) - 1
    return "".join(
        SPARKS[round((v - low) / span * top)] if math.isfinite(v) else " " for v in means
    )
