"""Prompts for reinforcement learning: rows as tokens that a completion follows."""

import array
import dataclasses
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from relax.data.cache import Entry, ExampleCache, Writer, cache_key
from relax.data.formats import TEMPLATE_COLUMNS, Format, FormatOptions, check_row, conversation
from relax.data.limits import DEFAULT, Limits
from relax.data.mixing import Mixture
from relax.data.reading import Rows, read_rows
from relax.data.report import percentiles
from relax.data.sources import check_same_formats
from relax.data.stored import Mapped, View, notes_of
from relax.data.templates import ChatRenderer, Job, require_template
from relax.data.tokens import tokenize
from relax.errors import DataError
from relax.rewards.protocol import Column, describe_columns

_BLOCK = 1000  # rows that are rendered and tokenised together


class TokenLists(Sequence):
    """Lists of token ids in flat arrays, in memory or memory-mapped; `lists[i]` is a new list.

    Args:
      input_ids: int32, all lists one behind the other.
      offsets: int64, where each of them begins, and the end of the last one.
    """

    def __init__(self, input_ids: np.ndarray, offsets: np.ndarray):
        self.input_ids, self.offsets = input_ids, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"list {index} of {len(self)}")
        start, stop = self.offsets[index % len(self)], self.offsets[index % len(self) + 1]
        return self.input_ids[start:stop].tolist()


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Tokenised prompts and their rows.

    Attributes:
      prompt_ids: token ids of each prompt.
      rows: dicts with the columns of all rows, for reward functions; None where a row has no value.
      conversational: prompts are lists of messages.
      notes: normalised data, content that the chat template omits, prompts that end with an answer.
      mixture: how they are mixed, where they are of several sources.
      digest: a checksum of tokens and rows.
      described: what is known of each column; None: it is found by reading all rows.
    """

    prompt_ids: Sequence[list[int]]
    rows: Sequence[dict]
    conversational: bool
    notes: tuple[str, ...] = ()
    mixture: Mixture | None = None
    digest: int = 0
    described: Mapping[str, Column] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self.rows[0])

    @cached_property
    def facts(self) -> Mapping[str, Column]:
        """What is known of each column."""
        return describe_columns(self.rows) if self.described is None else self.described

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each prompt."""
        if isinstance(self.prompt_ids, TokenLists):
            return np.diff(self.prompt_ids.offsets)
        return np.array([len(ids) for ids in self.prompt_ids])

    def report(self) -> str:
        """A summary line, and one line per note."""
        lengths = percentiles(self.lengths)
        kind = "conversations" if self.conversational else "texts"
        line = (
            f"{len(self):,} prompts ({kind}), tokens: min {lengths[0]}, median {lengths[50]}, "
            f"max {lengths[100]}; columns: {', '.join(self.columns)}"
        )
        return "\n".join([line, *(f"note: {note}" for note in self.notes)])


def prepare_prompts(
    rows,
    tokenizer,
    *,
    system_prompt: str | None = None,
    vocab_size: int | None = None,
    max_prompt_length: int | None = None,
    limits: Limits = DEFAULT,
    tools: Sequence[dict] = (),
    cache: ExampleCache | None = None,
) -> Prompts:
    """Converts rows with a `prompt`, a string or messages, to tokens.

    Messages are rendered with the chat template, up to the header of the assistant's turn.

    Args:
      rows: a result or an argument of `read_rows`.
      tokenizer: a Hugging Face tokenizer.
      system_prompt: system message of conversations that have none.
      vocab_size: rows of the model's embedding; None: not checked.
      max_prompt_length: longer prompts are refused, never truncated; None: any length.
      limits: on rows and rendering.
      tools: JSON schemas of tools that all prompts are rendered with.
      cache: keeps the tokens of rows that have a `key`, and has those of earlier runs.

    Raises:
      DataError: a row has no prompt, a format other than the first row's, is too long, or has tools
        of its own besides `tools`.
    """
    rows = rows if isinstance(rows, Rows) else read_rows(rows, limits=limits)
    if not len(rows):
        raise DataError("the data set has no rows.")
    options = FormatOptions(system_prompt=system_prompt, limits=limits)
    lengths = (vocab_size, max_prompt_length)
    make = partial(_prepared, rows, tokenizer, options, *lengths, list(tools))
    key = cache and cache_key(rows.key, tokenizer, "prompts", options, *lengths, list(tools))
    entry = cache.find_or_make(key, partial(_kept, make)) if cache and key else None
    made = make(None) if entry is None else _found(entry, rows.rows)
    return Prompts(
        made.ids,
        _with_all_columns(made.rows, made.columns),
        made.conversational,
        made.notes,
        rows.mixture,
        made.digest,
        made.columns,
    )


class KeptRows(View):
    """Rows as JSON in a flat array of bytes; `offsets` says where each begins."""

    def __init__(self, text: np.ndarray, offsets: np.ndarray):
        self.text, self.offsets = text, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, i: int) -> dict:
        return json.loads(self.text[self.offsets[i] : self.offsets[i + 1]].tobytes())


class _Prepared(NamedTuple):
    ids: TokenLists
    rows: Sequence[dict]
    conversational: bool
    columns: dict[str, Column]
    notes: tuple[str, ...]
    digest: int


def _kept(make, writer: Writer) -> dict:
    about = make(writer)._asdict()
    del about["ids"], about["rows"]
    return about


def _found(entry: Entry, rows: Sequence[dict]) -> _Prepared:
    about, arrays = entry.about, entry.columns
    columns = {name: Column(*facts) for name, facts in about["columns"].items()}
    if "rows" in arrays:
        rows = KeptRows(arrays["rows"], arrays["row_offsets"])
    ids = TokenLists(arrays["input_ids"], arrays["offsets"])
    notes, digest = tuple(about["notes"]), about["digest"]
    return _Prepared(ids, rows, about["conversational"], columns, notes, digest)


def _prepared(
    rows: Rows,
    tokenizer,
    options: FormatOptions,
    vocab_size: int | None,
    max_prompt_length: int | None,
    tools: list[dict],
    writer: Writer | None,
) -> _Prepared:
    """The tokens, in files of `writer` if there is one, and what is known of the rows."""
    conversational = _checked(rows, tokenizer, options)
    columns = describe_columns(rows.rows)
    renderer = ChatRenderer(tokenizer, options.limits)
    digest, kept = 0, rows.rows

    def blocks() -> Iterator[list[list[int]]]:
        nonlocal digest
        for first, block in _blocks(_with_all_columns(kept, columns)):
            texts = [row["prompt"] for row in block]
            if conversational:
                numbered = enumerate(block, first)
                texts = renderer.texts([_job(row, rows.origin(i), options, tools)
                                        for i, row in numbered])  # fmt: skip
            ids = tokenize(tokenizer, texts, special=not conversational)
            for i, prompt in enumerate(ids, first):
                _check_ids(prompt, rows, i, vocab_size, max_prompt_length)
            digest = zlib.crc32(_content([ids, block]), digest)
            yield ids

    if writer is not None and all(column.odd_row is None for column in columns.values()):
        kept = _keep_rows(rows.rows, writer)  # they are read in any order, also of parquet files
    lists = _token_lists(blocks(), writer)
    notes = (*rows.notes, *notes_of(rows.rows), *renderer.notes())
    return _Prepared(lists, kept, conversational, columns, notes, digest)


def _content(value) -> bytes:
    """A value as bytes for a checksum."""
    try:
        return json.dumps(value, default=str).encode()
    except TypeError:  # keys of dicts from Python
        return repr(value).encode("utf-8", "surrogatepass")


def _keep_rows(rows: Iterable[dict], writer: Writer) -> KeptRows:
    ends: Any = array.array("q", [0])
    with writer.growing("rows", np.uint8) as file:
        for row in rows:
            ends.append(ends[-1] + file.write(json.dumps(row).encode()))
    writer.save("row_offsets", np.frombuffer(ends, np.int64))
    return KeptRows(writer.mapped("rows"), writer.mapped("row_offsets"))


def _checked(rows: Rows, tokenizer, options: FormatOptions) -> bool:
    """Whether the prompts are messages; every row is checked."""
    conversational = isinstance(rows.rows[0].get("prompt"), list)
    extra = TEMPLATE_COLUMNS if conversational else ()
    found = Format("prompts", ("prompt", *extra), conversational)
    check_same_formats(
        rows, lambda row, where: Format("prompts", (), isinstance(row.get("prompt"), list))
    )
    for i, row in enumerate(rows.rows):
        try:
            check_row(row, found, "")
        except DataError:  # the place of a row costs more than its check
            check_row(row, found, rows.origin(i))
    if options.system_prompt and not conversational:
        raise DataError("system_prompt needs conversations, and the prompts are texts.")
    if conversational:
        require_template(tokenizer, "prompts of messages")
    return conversational


def _with_all_columns(rows: Sequence[dict], columns: Iterable[str]) -> Sequence[dict]:
    """Rows with the same columns, whatever rows form a batch for reward functions."""
    empty = dict.fromkeys(columns)
    made = Mapped(rows, lambda row, i: empty | row)
    return [*made] if isinstance(rows, list) else made


def _blocks(rows: Sequence[dict]) -> Iterator[tuple[int, list[dict]]]:
    """Rows in blocks, each with the index of its first row."""
    first, block = 0, []
    for row in rows:
        block.append(row)
        if len(block) == _BLOCK:
            yield first, block
            first, block = first + _BLOCK, []
    if block:
        yield first, block


def _job(row: dict, where: str, options: FormatOptions, tools: list[dict]) -> Job:
    """What the chat template renders for a row."""
    if tools and row.get("tools"):
        raise DataError(
            f"{where}: the row has tools of its own, which no function would answer: "
            "leave out the column, or --tools."
        )
    shown = row | {"tools": tools} if tools else row
    return Job(conversation(row, "prompt", options), shown, where, True)


def _token_lists(blocks: Iterable[list[list[int]]], writer: Writer | None) -> TokenLists:
    lengths: Any = array.array("q")

    def flat() -> Iterator[bytes]:
        for block in blocks:
            for ids in block:
                lengths.append(len(ids))
                yield np.array(ids, np.int32).tobytes()

    if writer is None:
        all_ids = np.frombuffer(b"".join(flat()), np.int32)
    else:
        with writer.growing("input_ids", np.int32) as file:
            file.writelines(flat())
        all_ids = writer.mapped("input_ids")
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(np.frombuffer(lengths, np.int64), out=offsets[1:])
    if writer is not None:
        writer.save("offsets", offsets)
        offsets = writer.mapped("offsets")
    return TokenLists(all_ids, offsets)


def _check_ids(
    ids: list[int], rows: Rows, i: int, vocab_size: int | None, max_prompt_length: int | None
) -> None:
    if not ids:
        raise DataError(f"{rows.origin(i)}: the prompt is empty; it needs at least one token.")
    if vocab_size is not None and max(ids) >= vocab_size:
        raise DataError(
            f"{rows.origin(i)}: token id {max(ids)} is outside of the model's embedding of "
            f"{vocab_size} rows: is the tokenizer this model's?"
        )
    if max_prompt_length is not None and len(ids) > max_prompt_length:
        raise DataError(
            f"{rows.origin(i)}: the prompt has {len(ids)} tokens, and with max_completion_length "
            f"there is room for {max_prompt_length} in the model's positions. Lower "
            "max_completion_length, or leave the row out."
        )
