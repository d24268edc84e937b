"""Charts as inline SVG."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from relax.config.text import format_number, format_seconds

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 66, 16, 12, 32  # margins around the plot
SMOOTHED_FROM = 40  # minimum points of a curve that is also shown smoothed
COLOURS = 8  # colours in the palette, --c0 to --c7
# Those of a picture of its own, which has no page's style.
PALETTE = "#2f6fde #e0782a #1d9a6c #b0479b #c9a40f #d1495b #4aa5b8 #7a68d8".split()
FILE_STYLE = """
text{font:14px system-ui,"DejaVu Sans",sans-serif;fill:#687078}.title{fill:#1d2126;font-weight:600}
.grid{stroke:#e4e4e0;fill:none}.axis{stroke:#687078;fill:none}
.tick{text-anchor:end}.tick.x{text-anchor:middle}
.s path{fill:none;stroke:var(--c);stroke-linejoin:round}
.s .line{stroke-width:2.2}.s .raw{stroke-width:1;opacity:.32}.s circle{fill:var(--c)}"""


class Series(NamedTuple):
    """A curve: finite ascending `xs`; `ys` with NaN for missing numbers."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    points: bool = False  # mark every point, for few measurements such as evaluations
    colour: int | None = None

    def num_finite(self) -> int:
        """The number of finite values."""
        return sum(map(math.isfinite, self.ys))


def downsample(
    xs: Sequence[float], ys: Sequence[float], most: int
) -> tuple[list[float], list[float]]:
    """Reduces a curve to about `most` points that look the same: the extremes of each section.

    A section without a number keeps one NaN, so that the gap remains.

    >>> downsample([0, 1, 2, 3, 4, 5, 6, 7], [0, 9, 1, 1, 1, -5, 1, 2], 4)
    ([0, 1, 5, 7], [0, 9, -5, 2])
    """
    n, stretches = len(xs), max(most // 2, 1)
    if n <= most:
        return list(xs), list(ys)
    kept = []
    for s in range(stretches):
        stretch = range(s * n // stretches, (s + 1) * n // stretches)
        real = [i for i in stretch if math.isfinite(ys[i])]
        if real:
            chosen = {min(real, key=ys.__getitem__), max(real, key=ys.__getitem__)}
            if len(real) < len(stretch) and len(real) <= len(stretch) // 2:
                chosen.add(next(i for i in stretch if not math.isfinite(ys[i])))
            kept += sorted(chosen)
        elif stretch:
            kept.append(stretch[0])
    return [xs[i] for i in kept], [ys[i] for i in kept]


def smooth(ys: Sequence[float], span: float) -> list[float]:
    """An exponential mean over about `span` points, corrected for its start.

    >>> [round(y, 3) for y in smooth([1.0, 1.0, float("nan"), 4.0], 1.0)]
    [1.0, 1.0, nan, 2.714]
    """
    decay, mean, weight, out = span / (span + 1), 0.0, 0.0, []
    for y in ys:
        if not math.isfinite(y):
            out.append(math.nan)
            continue
        mean, weight = decay * mean + (1 - decay) * y, decay * weight + (1 - decay)
        out.append(mean / weight)
    return out


def is_noisy(ys: Sequence[float]) -> bool:
    """Whether a curve has many points and its length is more than four times its range.

    >>> is_noisy([1.0, 2.0] * 50), is_noisy([i / 100 for i in range(100)])
    (True, False)
    """
    real = [y for y in ys if math.isfinite(y)]
    if len(real) < SMOOTHED_FROM:
        return False
    way = sum(abs(b - a) for a, b in zip(real, real[1:], strict=False))
    return way > 4 * (max(real) - min(real))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that divide a range.

    >>> ticks(0, 1), ticks(3, 97)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [20.0, 40.0, 60.0, 80.0])
    """
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= count)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def limits(series: Sequence[Series]) -> tuple[float, float] | None:
    """The range of the vertical axis, without outliers; None without any value."""
    values = sorted(y for s in series for y in s.ys if math.isfinite(y))
    if not values:
        return None
    low, high = values[0], values[-1]
    if len(values) >= 20:
        p2, p98 = values[len(values) // 50], values[-1 - len(values) // 50]
        spread = p98 - p2
        high = high if high - p98 <= 2 * spread or spread == 0 else p98 + spread / 4
        low = low if p2 - low <= 2 * spread or spread == 0 else p2 - spread / 4
    if low == high == 0:
        return 0.0, 1.0
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        return low - pad, high + pad
    pad = (high - low) * 0.06
    # An axis that starts at 0 is easier to read than one that starts slightly above.
    return (0.0 if 0 <= low < pad * 4 else low - pad), high + pad


def chart(title: str, series: Sequence[Series], most: int = 400, note: str = "") -> str:
    """Draws a chart of curves with title, axes and legend; '' if no curve has two values.

    Args:
      title: the title.
      series: the curves; curves without any number are skipped.
      most: maximum number of points per curve.
      note: a line below the chart.
    """
    plotted = _plot(series, most)
    if plotted is None:
        return ""
    series, frame, drawn = plotted
    legend = [_legend(s, _colour(s, i)) for i, s in enumerate(series)]
    gaps = sum(1 for s in series for y in s.ys if not math.isfinite(y))
    notes = [note] if note else []
    notes += [f"{gaps} values are not finite"] if gaps else []
    outside = sum(1 for s in series for y in s.ys if math.isfinite(y) and not frame.holds(y))
    notes += [f"{outside} beyond the axis"] if outside else []
    name = escape(title)
    return (
        f'<figure class="card"><figcaption>{name}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}" '
        f'data-x="{frame.x0:.6g} {frame.x1:.6g}">'
        f"{drawn}<g class='cursor'></g></svg>"
        f'<div class="legend">{"".join(legend)}</div>'
        + (f'<p class="note">{escape("; ".join(notes))}</p>' if notes else "")
        + "</figure>"
    )


def picture(charts: Sequence[tuple[str, Sequence[Series]]], most: int = 200) -> str:
    """An SVG file of charts below each other, with their legends; '' if none has two values.

    Args:
      charts: titles and curves.
      most: maximum number of points per curve.
    """
    parts, y = [], 0
    for title, given in charts:
        plotted = _plot(given, most)
        if plotted is None:
            continue
        series, _, drawn = plotted
        names = "".join(
            f'<tspan dx="16" style="fill:{PALETTE[_colour(s, i)]}">{escape(s.name)}</tspan>'
            for i, s in enumerate(series)
        )
        parts.append(
            f'<text class="title" x="{LEFT}" y="{y + 24}">{escape(title)}{names}</text>'
            f'<svg x="0" y="{y + 34}" width="{WIDTH}" height="{HEIGHT}">{drawn}</svg>'
        )
        y += HEIGHT + 44
    if not parts:
        return ""
    colours = ";".join(f"--c{i}:{colour}" for i, colour in enumerate(PALETTE))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" '
        f'height="{y}"><style>svg{{{colours}}}{FILE_STYLE}</style>'
        f'<rect width="{WIDTH}" height="{y}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _plot(series: Sequence[Series], most: int) -> tuple[list[Series], "_Frame", str] | None:
    """The curves with numbers, their frame, and axes and curves; None without two values."""
    series = [s for s in series if s.num_finite()]
    bounds = limits(series)
    if bounds is None or all(s.num_finite() < 2 for s in series):
        return None
    x0, x1 = min(s.xs[0] for s in series), max(s.xs[-1] for s in series)
    frame = _Frame(x0, x1 if x1 > x0 else x0 + 1, *bounds)
    drawn = [_curve(s, frame, _colour(s, i), most) for i, s in enumerate(series)]
    return series, frame, _axes(frame) + "".join(drawn)


def _colour(series: Series, i: int) -> int:
    return (i if series.colour is None else series.colour) % COLOURS


class _Frame(NamedTuple):
    """Maps values to coordinates in the picture."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        height = HEIGHT - TOP - BOTTOM
        place = TOP + (self.y1 - value) / (self.y1 - self.y0) * height
        return min(max(place, TOP - 4.0), HEIGHT - BOTTOM + 4.0)  # beyond the axis: at its edge

    def holds(self, value: float) -> bool:
        return self.y0 <= value <= self.y1


def _axes(frame: _Frame) -> str:
    parts = []
    for value in ticks(frame.y0, frame.y1):
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 8}" y="{y + 5:.1f}">{format_number(value)}</text>'
        )
    bottom = HEIGHT - BOTTOM
    for value in ticks(frame.x0, frame.x1, 6):
        if value == int(value):  # updates are whole
            x = frame.x(value)
            parts.append(
                f'<text class="tick x" x="{x:.1f}" y="{bottom + 22}">{format_number(value)}</text>'
            )
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>')
    return "".join(parts)


def _curve(series: Series, frame: _Frame, colour: int, most: int) -> str:
    xs, ys = downsample(series.xs, series.ys, most)
    values = " ".join(f"{x:.6g},{y:.5g}" for x, y in zip(xs, ys, strict=True) if math.isfinite(y))
    head = f'<g class="s" style="--c:var(--c{colour})" data-n="{escape(series.name)}" '
    head += f'data-v="{values}">'
    points = series.points or series.num_finite() <= 2
    smoothed = not points and is_noisy(series.ys)
    kind = "raw" if smoothed else "line"
    out = f'<path class="{kind}" d="{_path(xs, ys, frame)}"/>'
    if smoothed:
        means = smooth(series.ys, max(len(series.ys) / 60, 2.0))
        out += f'<path class="line" d="{_path(*downsample(series.xs, means, most // 2), frame)}"/>'
    if points and len(xs) <= 60:
        out += "".join(
            f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3"/>'
            for x, y in zip(xs, ys, strict=True)
            if math.isfinite(y)
        )
    return f"{head}{out}</g>"


def _path(xs: Sequence[float], ys: Sequence[float], frame: _Frame) -> str:
    """An SVG path of straight lines through the points, with gaps for missing numbers."""
    parts, pen = [], "M"
    for x, y in zip(xs, ys, strict=True):
        if not math.isfinite(y):
            pen = "M"
            continue
        parts.append(f"{pen}{frame.x(x):.1f} {frame.y(y):.1f}")
        pen = "L"
    return "".join(parts)


def _legend(series: Series, colour: int) -> str:
    real = [y for y in series.ys if math.isfinite(y)]
    last, low, high = (format_number(y) for y in (real[-1], min(real), max(real)))
    return (
        f'<span style="--c:var(--c{colour})"><i></i>{escape(series.name)} '
        f"<b>{last}</b> <small>{low} … {high}</small></span>"
    )


def bar(parts: dict[str, float]) -> str:
    """Draws a bar of shares with a legend; `parts` are seconds by name."""
    total = sum(parts.values())
    if total <= 0:
        return ""
    drawn, legend, x = [], [], 0.0
    for i, (name, value) in enumerate(parts.items()):
        share = value / total
        drawn.append(
            f'<rect style="--c:var(--c{i % COLOURS})" x="{x * 1000:.1f}" y="0" '
            f'width="{max(share * 1000 - 2, 0.5):.1f}" height="22" rx="3"/>'
        )
        x += share
        legend.append(
            f'<span style="--c:var(--c{i % COLOURS})"><i></i>{escape(name)} <b>{share:.1%}</b> '
            f"<small>{format_seconds(value)}</small></span>"
        )
    return (
        '<svg class="bar" viewBox="0 0 1000 22" preserveAspectRatio="none" role="img" '
        f'aria-label="shares of time">{"".join(drawn)}</svg>'
        f'<div class="legend">{"".join(legend)}</div>'
    )
