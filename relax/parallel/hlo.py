"""What a compiled program moves between devices, read from its text."""

import collections
import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
_OPERATION = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(KINDS)})(-start)?\((?=[^)]*\))", re.MULTILINE)
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply|branch_computations)=\{?([%\w.\-, ]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Traffic(NamedTuple):
    """Of one kind of collective in a program, per device.

    Attributes:
      count: how often it runs.
      nbytes: that a device sends and receives, as rings do it.
    """

    count: int
    nbytes: float


def collectives(text: str) -> dict[str, Traffic]:
    """The traffic of a program by kind; loops whose trips are known count as often as they run.

    An all-gather of S bytes among n moves S (n - 1) / n, a reduce-scatter to S bytes S (n - 1), an
    all-reduce twice the former, an all-to-all as much as it, a permute S.

    Args:
      text: `compiled.as_text()`.

    >>> collectives('''
    ... ENTRY %main (a: f32[2,4]) -> f32[8,4] {
    ...   ROOT %g = f32[8,4]{1,0} all-gather(%a), replica_groups=[2,4]<=[8], dimensions={0}
    ... }''')
    {'all-gather': Traffic(count=1, nbytes=96.0)}
    """
    bodies, entry = _computations(text)
    totals: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    _walk(bodies, entry, 1, totals)
    return {kind: Traffic(int(n), nbytes) for kind, (n, nbytes) in sorted(totals.items())}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies, name, entry = {}, None, ""
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            name = start[1]
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            name = None
        elif name is not None:
            bodies[name].append(line)
    return bodies, entry


def _walk(bodies, name: str, times: int, totals) -> None:
    for line in bodies.get(name, ()):
        found = _OPERATION.search(line)
        if found and "-done" not in found[0]:
            kind = found[2]
            totals[kind][0] += times
            totals[kind][1] += times * _moved(kind, _size(found[1], bool(found[3])), _among(line))
            continue
        trips = _TRIPS.search(line)
        inner = times * (int(trips[1]) if trips and " while(" in line else 1)
        for group in _CALLED.findall(line):
            for called in group.replace("%", "").split(","):
                _walk(bodies, called.strip(), inner, totals)


def _size(shapes: str, started: bool) -> float:
    """Bytes of a result; that of a started operation comes behind its operands."""
    sizes = [
        math.prod(map(int, filter(None, dims.split(",")))) * _bits(dtype) / 8
        for dtype, dims in _SHAPE.findall(shapes)
    ]
    if started and len(sizes) > 1:
        sizes = sizes[len(sizes) // 2 :]
    return sum(sizes)


def _bits(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)
    return _BITS.get(dtype, int(digits[0]) if digits else 8)


def _among(line: str) -> int:
    """How many devices take part in one group."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(found[1].split(","))
    return 2


def _moved(kind: str, size: float, n: int) -> float:
    share = (n - 1) / n
    factor = {"all-reduce": 2 * share, "reduce-scatter": n - 1, "collective-permute": 1.0}
    return size * factor.get(kind, share)
