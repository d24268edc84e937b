"""Compares values of ReLax with those of a public package, and keeps a row for each comparison."""

import dataclasses
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np

EQUAL, DEPARTS, MISSING, CHANGED = "equal", "departs", "missing", "changed"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of docs/parity.md.

    Attributes:
      section: the group of subjects.
      subject: what is compared, such as a loss.
      peer: the package, without its version.
      compared: `value`, `gradient`, `mask`, `tokens`, ...
      verdict: `equal`; `departs` (on purpose); `missing`; `changed` (the check failed).
      difference: see `difference`; None where nothing is computed.
      why: the reason of a departure, or the advice about what is missing.
      check: the function that wrote the row, and its file.
    """

    section: str
    subject: str
    peer: str
    compared: str
    verdict: str
    difference: float | None = None
    why: str = ""
    check: str = ""


class Parity:
    """Compares, records a row, and fails where the expectation does not hold.

    Args:
      section: the group of subjects.
      rows: the list that is appended to.
      check: see `Row`.
    """

    def __init__(self, section: str, rows: list[Row], check: str):
        self.section, self.rows, self.check = section, rows, check

    def equal(
        self,
        subject: str,
        peer: str,
        compared: str,
        ours: Any,
        theirs: Any,
        *,
        tolerance: float = 2e-6,
    ) -> None:
        """Records that `ours` equals `theirs` up to rounding (`tolerance` times the largest)."""
        distance = difference(ours, theirs)
        holds = distance <= tolerance
        self._add(subject, peer, compared, EQUAL if holds else CHANGED, distance)
        assert holds, f"{subject}: {compared} differs from {peer} by {distance:.2e}"

    def departs(
        self,
        subject: str,
        peer: str,
        compared: str,
        ours: Any,
        theirs: Any,
        why: str,
        *,
        explained: Any = None,
        tolerance: float = 2e-6,
    ) -> None:
        """Records that `ours` differs from `theirs` on purpose.

        Args:
          why: one sentence.
          explained: what the peer's value becomes without the named difference: equals `ours`.
        """
        distance = difference(ours, theirs)
        rest = 0.0 if explained is None else difference(ours, explained)
        holds = distance > tolerance and rest <= tolerance
        self._add(subject, peer, compared, DEPARTS if holds else CHANGED, distance, why)
        assert distance > tolerance, f"{subject}: {compared} no longer departs from {peer}"
        assert rest <= tolerance, f"{subject}: {why!r} leaves a difference of {rest:.2e}"

    def missing(self, subject: str, peer: str, why: str = "") -> None:
        """Records what the peer has and ReLax has not."""
        self._add(subject, peer, "", MISSING, None, why)

    def _add(self, subject, peer, compared, verdict, distance, why=""):
        version(peer)  # raises for a package that is not installed
        place = self.section, subject, peer, compared
        self.rows.append(Row(*place, verdict, distance, why, self.check))


def difference(ours: Any, theirs: Any) -> float:
    """Largest difference, as a fraction of the largest finite magnitude of `theirs`.

    Texts, integers and booleans give 0 if all are equal, else 1; so do shapes, and infinities and
    NaN that do not coincide. Mappings and sequences of arrays give that of their worst entry.
    """
    if isinstance(theirs, Mapping):
        if set(ours) != set(theirs):
            return 1.0
        return max((difference(ours[key], theirs[key]) for key in theirs), default=0.0)
    if isinstance(theirs, str):
        return float(ours != theirs)
    if isinstance(theirs, list | tuple):
        if len(ours) != len(theirs):
            return 1.0
        return max((difference(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)
    ours, theirs = as_numpy(ours), as_numpy(theirs)
    if ours.shape != theirs.shape:
        return 1.0
    if theirs.dtype.kind != "f":
        return float(not np.array_equal(ours, theirs))
    finite = np.isfinite(theirs)
    if not np.array_equal(ours[~finite], theirs[~finite], equal_nan=True):
        return 1.0
    ours, theirs = ours[finite].astype(np.float64), theirs[finite].astype(np.float64)
    largest = np.abs(theirs).max(initial=0.0)
    return float(np.abs(ours - theirs).max(initial=0.0) / (largest or 1.0))


def as_numpy(values: Any) -> np.ndarray:
    """An array of jax, torch or numpy, or a number, as numpy's."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    return np.asarray(values)
