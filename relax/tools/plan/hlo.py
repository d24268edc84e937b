"""Traffic between devices, read from the text of a compiled program."""

import collections
import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
_OPERATION = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(KINDS)})(-start)?\((?=[^)]*\))", re.MULTILINE)
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|body|condition|to_apply|(?:true|false)_computation)=%?([\w.\-]+)"
    r"|branch_computations=\{([^}]*)\}"
)
_NUMBER = re.compile(r"= [su]\d+\[\]\S* constant\((\d+)\)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Traffic(NamedTuple):
    """The traffic of one kind of collective in a program, per device.

    Attributes:
      runs: number of executions.
      nbytes: bytes that a device sends and receives, by the ring algorithm.
    """

    runs: int
    nbytes: float


def collectives(text: str) -> dict[str, Traffic]:
    """The traffic of a program by kind; a loop counts as often as the text says it runs.

    The parts of a split collective (fused with arithmetic) share a channel and count once.

    An all-gather of S bytes among n moves S (n - 1) / n, a reduce-scatter to S bytes S (n - 1), an
    all-reduce twice the former, an all-to-all as much as it, a permute S.

    Args:
      text: `compiled.as_text()`.

    >>> collectives('''
    ... ENTRY %main (a: f32[2,4]) -> f32[8,4] {
    ...   ROOT %g = f32[8,4]{1,0} all-gather(%a), replica_groups=[2,4]<=[8], dimensions={0}
    ... }''')
    {'all-gather': Traffic(runs=1, nbytes=96.0)}
    """
    bodies, entry = _computations(text)
    totals: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    _walk(bodies, entry, 1, totals, set())
    return {kind: Traffic(int(n), nbytes) for kind, (n, nbytes) in sorted(totals.items())}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    name, entry = None, ""
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            name = start[1]
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif line.rstrip() == "}":  # other such lines end a constant of several lines
            name = None
        elif name is not None:
            bodies[name].append(line)
    return bodies, entry


def _walk(bodies, name: str, times: int, totals, seen: set[str]) -> None:
    for line in bodies.get(name, ()):
        found = _OPERATION.search(line)
        if found:
            channel = _CHANNEL.search(line)
            if channel and channel[1] in seen:
                continue
            seen |= {channel[1]} if channel else set()
            kind = found[2]
            totals[kind][0] += times
            totals[kind][1] += times * _moved(kind, _size(kind, found[1], bool(found[3])), line)
            continue
        inner = times * (_trips(bodies, line) if " while(" in line else 1)
        for groups in _CALLED.findall(line):
            for called in "".join(groups).replace("%", "").split(","):
                _walk(bodies, called.strip(), inner, totals, seen)


def _trips(bodies, line: str) -> int:
    """The trip count of a loop: the compiler's, else the single number it counts to, else 1."""
    if found := _TRIPS.search(line):
        return int(found[1])
    found = _CONDITION.search(line)
    condition = bodies.get(found[1], ()) if found else ()
    numbers = [found[1] for line in condition if (found := _NUMBER.search(line))]
    counts = any("direction=LT" in line for line in condition)
    return int(numbers[0]) if counts and len(numbers) == 1 else 1


def _size(kind: str, shapes: str, started: bool) -> float:
    """Bytes of a result; a `-start` operation lists its operands first and context numbers last."""
    sizes = [
        math.prod(map(int, filter(None, dims.split(",")))) * _bits(dtype) / 8
        for dtype, dims in _SHAPE.findall(shapes)
        if dims or not started or dtype != "u32"
    ]
    if started and kind != "all-reduce" and len(sizes) > 1:
        sizes = sizes[len(sizes) // 2 :]
    return sum(sizes)


def _bits(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)
    return _BITS.get(dtype, int(digits[0]) if digits else 8)


def _among(line: str) -> int:
    """The number of devices in one group.

    >>> _among("replica_groups=[4,2]<=[8]"), _among("replica_groups={{0,2,4,6},{1,3,5,7}}")
    (2, 4)
    >>> _among("replica_groups=mesh['a'=2,'b'=8], device_ids=([8,2]T(1,0)) {'b'}")
    8
    >>> _among("replica_groups=mesh['a'=4,'b'=3] {'a':(1)2,'b'}")
    6
    """
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(found[1].split(","))
    if found := re.search(r"mesh\[(.*?)\][^{]*\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    raise ValueError(f"unknown groups of devices: {line.strip()[:200]}")


def _moved(kind: str, size: float, line: str) -> float:
    if kind == "collective-permute":
        return size
    n = _among(line)
    share = (n - 1) / n
    return size * {"all-reduce": 2 * share, "reduce-scatter": n - 1}.get(kind, share)
