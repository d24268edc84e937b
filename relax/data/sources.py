"""Rows of several sources as one set: reading them, and checking that their formats agree."""

import dataclasses
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from relax.data.digest import digest_of
from relax.data.formats import Format
from relax.data.limits import DEFAULT, Limits
from relax.data.mixing import Mixture, Source
from relax.data.reading import Rows, read_rows
from relax.data.stored import Chained, Selected
from relax.data.tasks import is_task
from relax.errors import ConfigError, DataError, ErrorList


def read_sources(
    sources: Sequence[Source],
    strategy: str | None = None,
    split: str = "train",
    options: Mapping | None = None,
    limits: Limits = DEFAULT,
    stored_from: int | None = None,
) -> Rows:
    """Reads the rows of several sources, one after the other, with their mixture.

    Args:
      sources: result of `parse_sources`.
      strategy: of `Mixture`; None: `first_exhausted` with weights, else `concat`.
      split: the split of each.
      options: options of those that are tasks.
      limits, stored_from: as for `read_rows`, of each.

    Raises:
      RelaxError: all problems of all sources together.
    """
    if options and not any(is_task(source.path) for source in sources):
        raise ConfigError(
            f"dataset_kwargs are options of reasoning_gym tasks, got {dict(options)} for sources "
            "of which none is a task. Leave them out."
        )
    found, parts = ErrorList(), []
    for source in sources:
        with found.catch():
            given = options if is_task(source.path) else None
            parts.append(read_rows(source.path, split, None, given, limits, stored_from))
    found.raise_all()
    weights = tuple(source.weight for source in sources if source.weight is not None) or None
    strategy = strategy or ("concat" if weights is None else "first_exhausted")
    names, sizes = tuple(source.name for source in sources), tuple(map(len, parts))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]

    def origin(i: int) -> str:
        part = bisect_right(starts, i) - 1
        return parts[part].origin(i - starts[part])

    notes = tuple(
        f"{source.name}: {note}"
        for source, part in zip(sources, parts, strict=True)
        for note in part.notes
    )
    keys = [part.key for part in parts]
    key = None if None in keys else digest_of(keys)
    return Rows(_joined(parts, names), origin, notes, Mixture(names, sizes, weights, strategy), key)


def _joined(parts: Sequence[Rows], names: Sequence[str]) -> Sequence[dict]:
    if all(isinstance(part.rows, list) for part in parts):
        return [row for part in parts for row in part.rows]
    return Chained([part.rows for part in parts], names)


def by_source(rows: Rows, change: Callable[[Rows], Rows]) -> Rows:
    """Applies a change that depends on the first row to the rows of each source."""
    if rows.mixture is None:
        return change(rows)
    starts = [*rows.firsts, len(rows)]
    parts = []
    for i, (first, stop) in enumerate(zip(starts, starts[1:], strict=False)):
        some: Sequence[dict] = Selected(rows.rows, range(first, stop))
        if isinstance(rows.rows, list):
            some = rows.rows[first:stop]
        elif isinstance(rows.rows, Chained) and len(rows.rows.parts[i]) == stop - first:
            some = rows.rows.parts[i]
        parts.append(change(Rows(some, partial(_from, rows.origin, first))))
    notes = dict.fromkeys((*rows.notes, *(note for part in parts for note in part.notes)))
    return dataclasses.replace(rows, rows=_joined(parts, rows.mixture.names), notes=tuple(notes))


def _from(origin: Callable[[int], str], first: int, i: int) -> str:
    return origin(first + i)


def check_same_formats(rows: Rows, find_format: Callable[[dict, str], Format]) -> None:
    """Refuses sources whose first rows are of different formats.

    Args:
      find_format: the format of a row at a place.
    """
    if rows.mixture is None:
        return
    firsts = [(rows.origin(i), find_format(rows.rows[i], rows.origin(i))) for i in rows.firsts]
    (where, form), *others = firsts
    for place, other in others:
        if (form.name, form.conversational) != (other.name, other.conversational):
            raise DataError(
                f"sources must have one format, and {where} is {form.title} while {place} is "
                f"{other.title}: write all in one format (`relax data convert` makes conversations "
                "of rows for SFT), or leave one out."
            )
