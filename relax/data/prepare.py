"""Converts rows to training examples, with a report of truncated and dropped rows."""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import numpy as np

from relax.data.cache import Entry, ExampleCache, Writer, cache_key, report_of
from relax.data.conversion import with_known_columns
from relax.data.encode import Encoder
from relax.data.examples import IGNORE, Block, Columns, Examples
from relax.data.formats import Format, FormatOptions, check_row, find_format
from relax.data.reading import Rows, read_rows
from relax.data.report import DataReport, percentiles, spans
from relax.data.sources import by_source, check_same_formats
from relax.data.stored import notes_of
from relax.data.tokens import ending_ids
from relax.data.truncation import Truncator
from relax.errors import DataError

_SHOWN = 5  # number of examples in the report


def prepare(
    rows,
    tokenizer,
    options: FormatOptions | None = None,
    vocab_size: int | None = None,
    cache: ExampleCache | None = None,
) -> tuple[Examples, DataReport]:
    """Converts rows to tokens and labels, with a report.

    Every row is checked against the format of the first before anything is tokenised. A row
    without a trainable token is dropped and counted.

    Args:
      rows: a result or an argument of `read_rows`.
      tokenizer: a Hugging Face tokenizer.
      options: options for encoding.
      vocab_size: rows of the model's embedding; None: not checked.
      cache: keeps the examples of rows that have a `key`, and has those of earlier runs.

    Returns:
      The examples and the report.

    Raises:
      DataError: a row is invalid (with file and line), or none can be trained on.
      ConfigError: if an option does not fit the data.
    """
    options = options or FormatOptions()
    rows = rows if isinstance(rows, Rows) else read_rows(rows, limits=options.limits)
    make = partial(_prepared, rows, tokenizer, options, vocab_size)
    key = cache and cache_key(rows.key, tokenizer, options, vocab_size)
    entry = cache.find_or_make(key, partial(_kept, make)) if cache and key else None
    examples, report, sizes = make(Examples.of_blocks) if entry is None else _found(entry)
    if rows.mixture is not None:
        examples.mixture = rows.mixture.resized(sizes)
    return examples, report


def _kept(make: Callable, writer: Writer) -> dict:
    _, report, sizes = make(writer.write)
    return {"report": dataclasses.asdict(report), "sizes": sizes}


def _found(entry: Entry) -> tuple[Examples, DataReport, list[int]]:
    columns = Columns(*(entry.columns[name] for name in Columns._fields))
    checksums = [entry.checksums[name] for name in Columns._fields]
    examples = Examples(columns=columns, checksums=checksums)
    return examples, report_of(DataReport, entry.about["report"]), entry.about["sizes"]


def _prepared(
    rows: Rows,
    tokenizer,
    options: FormatOptions,
    vocab_size: int | None,
    keep: Callable[[Iterable[Block]], Examples],
) -> tuple[Examples, DataReport, list[int]]:
    """The examples, as `keep` keeps them, their report, and the number of each source's."""
    if not len(rows):
        raise DataError("the data set has no rows.")
    with_template = bool(tokenizer.chat_template)

    def convert(part: Rows) -> Rows:
        return with_known_columns(part, conversational=with_template, text_field=options.text_field)

    rows = by_source(rows, convert)
    check_same_formats(rows, lambda row, where: find_format(row, where, options))
    found, columns = _checked(rows, options)
    encoder = Encoder(tokenizer, found, options)
    fate = Truncator(rows, options, vocab_size, _ending_tokens(tokenizer, encoder.eos))
    examples = keep(fate.keep(encoder.encode(rows.rows, rows.origin)))
    if not len(examples):
        raise DataError(_nothing_left(fate, options))
    sizes = [len(examples)]
    if rows.mixture is not None:
        sizes = [*rows.mixture.kept(np.frombuffer(fate.kept, np.int64)).sizes]
    return examples, _report(rows, found, columns, encoder, fate, examples, tokenizer), sizes


class _Columns(NamedTuple):
    """The columns of rows: those that have a value in some row, and all."""

    with_values: dict[str, None]
    all: set[str]


def _checked(rows: Rows, options: FormatOptions) -> tuple[Format, _Columns]:
    """The format of rows, each of which is checked, and their columns."""
    where, only = rows.origin, options.assistant_only_loss
    first = find_format(rows.rows[0], where(0), options)
    columns = _Columns({}, set())
    for i, row in enumerate(rows.rows):
        for name, value in row.items():
            if value is not None:
                columns.with_values[name] = None
        columns.all.update(row)
        try:
            check_row(row, first, "", only_assistant=only)
        except DataError:  # the place of a row costs more than its check
            check_row(row, first, where(i), only_assistant=only)
    found = find_format(rows.rows[0], where(0), options, columns.with_values)
    if found != first:  # later rows have columns that the first one has not
        for i, row in enumerate(rows.rows):
            check_row(row, found, where(i), only_assistant=only)
    return found, columns


def _ending_tokens(tokenizer, eos: str | None) -> set[int]:
    return ending_ids(tokenizer) | ({tokenizer.convert_tokens_to_ids(eos)} if eos else set())


def _nothing_left(fate: Truncator, options: FormatOptions) -> str:
    reasons = "; ".join(f"{count} {reason}" for reason, count in fate.dropped.items())
    advice = "check the masks or labels of the rows."
    if fate.dropped["no trained token"] < len(fate.lengths):
        longest = max(fate.lengths)
        advice = f"raise max_length={options.max_length} (the longest row has {longest} tokens)."
    return f"none of {len(fate.lengths)} rows can be trained on ({reasons}): {advice}"


def _report(
    rows: Rows,
    found: Format,
    columns: _Columns,
    encoder: Encoder,
    fate: Truncator,
    examples: Examples,
    tokenizer,
) -> DataReport:
    last = examples[0].labels[examples[0].labels != IGNORE][-1]
    used = set(found.columns)
    notes = [*rows.notes, *notes_of(rows.rows), *encoder.notes()]
    ignored = {"prompt", "completion"} & set(columns.with_values)
    if found.name in ("messages", "conversations") and ignored:
        notes.append(
            f"{found.name} are used, the {' and '.join(sorted(ignored))} next to them is not"
        )
    if found.name == "conversations":
        notes.append("conversations (from, value) are read as messages (role, content)")
    if fate.endless:
        notes.append(
            f"{fate.endless} rows have no trained end token, so the model does not learn "
            "to stop there"
        )
    if "labels" in used and len(used & {"completion_mask", "assistant_masks"}):
        notes.append("labels are used, the masks next to them are not")
    return DataReport(
        format=found.name
        + (
            ", conversational" if found.name == "prompt-completion" and found.conversational else ""
        ),
        columns=found.columns,
        unused_columns=tuple(sorted({str(name) for name in columns.all} - used)),
        num_rows=len(fate.lengths),
        num_examples=len(examples),
        dropped=dict(fate.dropped),
        truncated=fate.truncated,
        merged=encoder.counts["merged"],
        endless=fate.endless,
        lengths=percentiles(fate.lengths),
        num_tokens=int(examples.offsets[-1]),
        num_trained_tokens=int(examples.trained.sum(dtype=np.int64)),
        trained_on=_trained_on(found, encoder),
        last_trained_token=tokenizer.decode([int(last)]),
        ends_trained=not fate.ending_tokens.isdisjoint(examples[0].labels[-3:].tolist()),
        turns={how: n for how, n in encoder.turns.counts.items() if n} if encoder.turns else {},
        notes=tuple(notes),
        examples=tuple(spans(example, tokenizer) for example in examples[:_SHOWN]),
    )


def _trained_on(found: Format, encoder: Encoder) -> str:
    if "labels" in found.columns:
        return "labels of the rows"
    parts = []
    if encoder.completion_only:
        parts.append("completions")
    if encoder.options.train_on == "last_assistant":
        parts.append("the assistant's last words")
    elif encoder.options.assistant_only_loss or "assistant_masks" in found.columns:
        parts.append("the assistant's words")
    if not parts and encoder.turns and encoder.turns.counts["untrained"]:
        return "every token but those of messages that are left out"
    return " that are ".join(parts) or "every token"
