"""Preferences: rows as tokens of a prompt and two completions, and the report on them.

Three formats of rows, recognised by the first row:

    {"prompt", "chosen", "rejected"}      strings or messages; without `prompt` it is the common
                                          beginning of both
    {"prompt", "completion", "label"}     one completion, good or bad by itself
    {"prompt_ids", "chosen_ids", "rejected_ids"}

Reward models also read `margin`, the wanted difference of the scores, and need no prompt, since
they score the whole text.
"""

import array
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from relax.data.cache import Entry, ExampleCache, Writer, cache_key, report_of
from relax.data.formats import FormatOptions
from relax.data.limits import DEFAULT, Limits
from relax.data.mixing import Mixture
from relax.data.preference_arrays import PairColumns, Pairs, Preference
from relax.data.preference_encode import MARGIN, PairEncoder, split_prompt
from relax.data.preference_report import PreferenceReport
from relax.data.reading import Rows, read_rows
from relax.data.report import percentiles
from relax.data.stored import notes_of
from relax.errors import ConfigError, DataError

__all__ = ["Preference", "Preferences", "prepare_preferences", "split_prompt"]


@dataclasses.dataclass(frozen=True)
class Preferences:
    """Tokenised rows; a list of them becomes `Pairs`."""

    items: Sequence[Preference]
    is_paired: bool
    has_margins: bool = False
    mixture: Mixture | None = None  # how they are mixed, where they are of several sources

    def __post_init__(self):
        object.__setattr__(self, "items", self.pairs)

    @property
    def pairs(self) -> Pairs:
        """The items as arrays."""
        return self.items if isinstance(self.items, Pairs) else Pairs(self.items)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def digest(self) -> int:
        """A checksum of every token, where completions begin, the labels and the margins."""
        return self.pairs.digest


def prepare_preferences(
    rows,
    tokenizer,
    *,
    unpaired: bool = False,
    for_reward_model: bool = False,
    system_prompt: str | None = None,
    eos_token: str | None = None,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    vocab_size: int | None = None,
    limits: Limits = DEFAULT,
    cache: ExampleCache | None = None,
) -> tuple[Preferences, PreferenceReport]:
    """Converts rows to tokens of prompts and completions, split from the tokenised whole.

    If tokenisation or the chat template changes the end of the prompt when a completion follows,
    the prompt is the common beginning of all of them, and the row counts as merged.

    Args:
      rows: a result or an argument of `read_rows`.
      tokenizer: a Hugging Face tokenizer.
      unpaired: a pair becomes two rows, one desirable and one not (for KTO).
      for_reward_model: read `margin`, and allow empty prompts.
      system_prompt: system message of conversations that have none.
      eos_token: end token of plain texts; None: the tokenizer's.
      max_length: tokens of prompt and completion; None: any number.
      truncation_mode: treatment of longer rows: `keep_start` truncates the ends of completions,
        `keep_end` the start of the prompt, by what the longer completion needs; `drop`; `error`.
      vocab_size: rows of the model's embedding; None: not checked.
      limits: on rows and rendering.
      cache: keeps the tokens of rows that have a `key`, and has those of earlier runs.

    Raises:
      DataError: a row is invalid (with file and line), no row is left, or all unpaired rows have
        one prompt.
    """
    rows = rows if isinstance(rows, Rows) else read_rows(rows, limits=limits)
    if truncation_mode == "turns":
        raise ConfigError("truncation_mode turns is one of SFT: completions have no turns.")
    options = FormatOptions(
        system_prompt=system_prompt,
        eos_token=eos_token,
        max_length=max_length,
        truncation_mode=truncation_mode,
        limits=limits,
    )
    make = partial(_prepared, rows, tokenizer, options, unpaired, for_reward_model, vocab_size)
    key = cache and cache_key(
        rows.key, tokenizer, "preferences", options, unpaired, for_reward_model, vocab_size
    )
    entry = cache.find_or_make(key, partial(_kept, make)) if cache and key else None
    made = make(None) if entry is None else _found(entry)
    mixture = None if rows.mixture is None else rows.mixture.resized(made.sizes)
    return Preferences(made.pairs, not unpaired, made.has_margins, mixture), made.report


class _Prepared(NamedTuple):
    pairs: Pairs
    report: PreferenceReport
    has_margins: bool
    sizes: list[int]  # rows of each source


def _kept(make: Callable[[Writer], _Prepared], writer: Writer) -> dict:
    made = make(writer)
    report = dataclasses.asdict(made.report)
    fields = {"has_margins": made.has_margins, "sizes": made.sizes}
    return {"report": report, "digest": made.pairs.digest} | fields


def _found(entry: Entry) -> _Prepared:
    columns = PairColumns(*(entry.columns[name] for name in PairColumns._fields))
    about = entry.about
    pairs = Pairs(columns=columns, digest=about["digest"])
    report = report_of(PreferenceReport, about["report"])
    return _Prepared(pairs, report, about["has_margins"], about["sizes"])


def _prepared(
    rows: Rows,
    tokenizer,
    options: FormatOptions,
    unpaired: bool,
    for_reward_model: bool,
    vocab_size: int | None,
    writer: Writer | None,
) -> _Prepared:
    """The pairs, in files of `writer` if there is one, their report, and what is known of them."""
    if not len(rows):
        raise DataError("the data set has no rows.")
    maker = PairEncoder(rows, tokenizer, options, for_reward_model)
    if not maker.is_pair and not unpaired:
        kto = "rows" if for_reward_model else "--loss_type kto, or rows"
        raise ConfigError(
            f"{rows.origin(0)}: rows with 'completion' and 'label' are no pairs: use {kto} with "
            "'chosen' and 'rejected'."
        )
    cutter = _PairTruncator(rows, maker, options, vocab_size)
    splits = unpaired and maker.is_pair
    items = _kept_items(maker, cutter, splits)
    pairs = _pairs(items, writer, "first_" * unpaired)
    if not len(pairs):
        reasons = "; ".join(f"{count} {reason}" for reason, count in cutter.dropped.items())
        raise DataError(f"none of {len(rows)} rows can be trained on ({reasons}).")
    report = _report(maker, cutter, pairs, tokenizer)
    kept = np.frombuffer(cutter.kept, np.int64).repeat(1 + splits)
    if unpaired:
        # The prompt of a row before anything of it is cut, by which KTO tells prompts apart.
        prompts = np.frombuffer(maker.prompts, np.uint64)[kept]
        pairs = _pairs(_with_partners(pairs, prompts, rows.origin(0)), writer)
        if writer is not None:
            for name in PairColumns._fields:
                writer.remove("first_" + name)
    sizes = [len(pairs)] if rows.mixture is None else [*rows.mixture.kept(kept).sizes]
    return _Prepared(pairs, report, maker.has_margins, sizes)


def _pairs(items: Iterable[Preference], writer: Writer | None, prefix: str = "") -> Pairs:
    return Pairs(items) if writer is None else Pairs.written(items, writer, prefix)


def _kept_items(maker: PairEncoder, cutter: "_PairTruncator", splits: bool) -> Iterator[Preference]:
    for i, item in enumerate(maker):
        kept = cutter(item, i)
        if kept is not None:
            yield from _unpaired(kept) if splits else (kept,)


class _PairTruncator:
    """Checks, truncates, drops and counts rows."""

    def __init__(self, rows: Rows, maker: PairEncoder, options: FormatOptions, vocab_size):
        self.rows, self.is_pair, self.vocab_size = rows, maker.is_pair, vocab_size
        self.for_reward_model = maker.for_reward_model
        self.max_length, self.mode = options.max_length, options.truncation_mode
        self.dropped: Counter[str] = Counter()
        self.truncated = 0
        self.kept = array.array("q")
        self.lengths, self.completion_lengths = array.array("q"), array.array("q")

    def __call__(self, item: Preference, i: int) -> Preference | None:
        self._check(item, i)
        kept = self._cut(item, i)
        if isinstance(kept, str):
            self.dropped[kept] += 1
            return None
        self.kept.append(i)
        return kept

    def _cut(self, item: Preference, i: int) -> Preference | str:
        """The pair, cut where need be, or why it is dropped."""
        completions = (item.chosen, item.rejected)
        longest = max(map(len, completions))
        self.lengths.append(len(item.prompt) + longest)
        self.completion_lengths.extend(map(len, completions))
        if self.is_pair and np.array_equal(*completions):
            return "chosen equals rejected"
        if not self._is_trained(item):
            return "no trained token"
        if self.max_length is None or len(item.prompt) + longest <= self.max_length:
            return item
        if self.mode == "error":
            raise DataError(
                f"{self.rows.origin(i)}: the row has {len(item.prompt) + longest} tokens, "
                f"max_length={self.max_length}: raise max_length, or choose a truncation_mode that "
                "cuts or drops."
            )
        if self.mode == "drop":
            return "longer than max_length"
        if self.mode == "keep_end":
            room = self.max_length - longest
            if room < 1:
                return "a completion fills max_length"
            self.truncated += 1
            return item._replace(prompt=item.prompt[-room:])
        room = self.max_length - len(item.prompt)
        if room < 1:
            return "the prompt fills max_length"
        item = item._replace(chosen=item.chosen[:room], rejected=item.rejected[:room])
        if self.is_pair and np.array_equal(item.chosen, item.rejected):
            return "no difference within max_length"
        if not self._is_trained(item):
            return "no trained token within max_length"
        self.truncated += 1
        return item

    def _is_trained(self, item: Preference) -> bool:
        """Whether each completion has a token with context, or any token for a reward model."""
        least = 1 if len(item.prompt) or self.for_reward_model else 2
        return min(len(item.chosen), len(item.rejected)) >= least

    def _check(self, item: Preference, i: int) -> None:
        parts = {
            "prompt": item.prompt,
            "chosen completion": item.chosen,
            "rejected completion": item.rejected,
        }
        for what, part in parts.items():
            if not len(part) and what != "prompt":
                raise DataError(
                    f"{self.rows.origin(i)}: the {what} has no token: a completion needs at "
                    "least one."
                )
            wrong = part[(part < 0) | (part >= (self.vocab_size or np.inf))]
            if len(wrong):
                raise DataError(
                    f"{self.rows.origin(i)}: token id {wrong[0]} is outside of the model's "
                    f"embedding of {self.vocab_size} rows: is the tokenizer this model's?"
                )


def _unpaired(pair: Preference) -> Iterator[Preference]:
    """A desirable and an undesirable row of a pair."""
    for completion, good in zip((pair.chosen, pair.rejected), (True, False), strict=True):
        yield Preference(pair.prompt, completion, completion, good)


def _with_partners(items: Pairs, prompts: np.ndarray, where: str) -> Iterator[Preference]:
    """Adds to each row the completion of another prompt, truncated to the longest row.

    KTO estimates its KL term from completions of other prompts. The partner is the next row with
    the same label, so that desirable rows are not all paired with undesirable completions.

    Raises:
      DataError: all rows have one prompt.
    """
    everything = np.arange(len(items))
    partners = _next_others(everything, prompts)
    if partners is None:
        raise DataError(
            f"{where}: KTO needs completions of at least two different prompts, and the set has "
            f"one prompt in all of its {len(items)} rows: its KL term is estimated from "
            "completions of other prompts. Add rows with other prompts, or train on pairs with "
            "another loss_type."
        )
    longest = int(items.sizes[:, :2].sum(axis=1).max())
    for label in (True, False):
        same = np.flatnonzero(items.columns.is_desirable == label)
        found = _next_others(same, prompts)
        if found is not None:
            partners[same] = found
    for item, partner in zip(items, partners.tolist(), strict=True):
        yield item._replace(rejected=items[partner].chosen[: longest - len(item.prompt)])


def _next_others(places: np.ndarray, prompts: np.ndarray) -> np.ndarray | None:
    """For each place the next one, cyclically, with another prompt; None: there is none.

    >>> _next_others(np.arange(3), np.array([7, 7, 8])).tolist()
    [2, 2, 0]
    """
    own = prompts[places]
    ends = np.flatnonzero(own != np.roll(own, -1))  # of stretches with one prompt
    if not len(ends):
        return None
    stretch = np.searchsorted(ends, np.arange(len(places))) % len(ends)
    return places[(ends[stretch] + 1) % len(places)]


def _report(
    maker: PairEncoder, cutter: _PairTruncator, items: Pairs, tokenizer
) -> PreferenceReport:
    rows, used = maker.rows, {*maker.format.columns}
    used |= set() if maker.is_pair else {"label"}
    used |= {MARGIN} if maker.has_margins else set()
    notes = [*rows.notes, *notes_of(rows.rows), *maker.renderer.notes()]
    prompt, chosen, rejected = (int(n) for n in items.sizes.sum(axis=0, dtype=np.int64))
    if maker.ignores_prompt:
        notes.append("the prompt is that of the conversations; the column is not used")
    return PreferenceReport(
        format=maker.format.name + (", conversational" if maker.format.conversational else ""),
        columns=tuple(sorted(used)),
        unused_columns=tuple(sorted({str(name) for name in maker.columns} - used)),
        num_rows=len(rows),
        num_examples=len(items),
        dropped=dict(cutter.dropped),
        truncated=cutter.truncated,
        merged=maker.merged,
        lengths=percentiles(cutter.lengths),
        completion_lengths=percentiles(cutter.completion_lengths),
        num_tokens=2 * prompt + chosen + rejected,
        example=tuple(tokenizer.decode(part.tolist()) for part in items[0][:3]),
        notes=tuple(notes),
    )
