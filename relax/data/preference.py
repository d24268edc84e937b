"""Preferences: rows as tokens of a prompt and two completions, and the report on them.

Three formats of rows, recognised by the first row:

    {"prompt", "chosen", "rejected"}      strings or messages; without `prompt` it is the common
                                          beginning of both
    {"prompt", "completion", "label"}     one completion, good or bad by itself
    {"prompt_ids", "chosen_ids", "rejected_ids"}

Reward models also read `margin`, the wanted difference of the scores, and need no prompt, since
they score the whole text.
"""

import dataclasses
import zlib
from collections import Counter
from collections.abc import Iterable

import numpy as np

from relax.data.formats import FormatOptions
from relax.data.limits import DEFAULT, Limits
from relax.data.preference_encode import MARGIN, PAIRED, PairEncoder, Preference, split_prompt
from relax.data.preference_report import PreferenceReport
from relax.data.reading import Rows, read_rows
from relax.data.report import percentiles
from relax.errors import ConfigError, DataError

__all__ = ["Preference", "Preferences", "prepare_preferences", "split_prompt"]


@dataclasses.dataclass(frozen=True)
class Preferences:
    """Tokenised rows."""

    items: list[Preference]
    is_paired: bool
    has_margins: bool = False

    def __len__(self) -> int:
        return len(self.items)

    @property
    def digest(self) -> int:
        """A checksum of every token, where completions begin, the labels and the margins."""
        crc = 0
        for *parts, is_desirable, margin in self.items:
            for part in parts:
                crc = zlib.crc32(part.tobytes(), zlib.crc32(len(part).to_bytes(8, "big"), crc))
            crc = zlib.crc32(bytes([is_desirable]) + np.float64(margin).tobytes(), crc)
        return crc


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

    Raises:
      DataError: a row is invalid (with file and line), no row is left, or all unpaired rows have
        one prompt.
    """
    rows = rows if isinstance(rows, Rows) else read_rows(rows, limits=limits)
    if not rows.rows:
        raise DataError("the data set has no rows.")
    options = FormatOptions(
        system_prompt=system_prompt,
        eos_token=eos_token,
        max_length=max_length,
        truncation_mode=truncation_mode,
        limits=limits,
    )
    maker = PairEncoder(rows, tokenizer, options, for_reward_model)
    if not maker.is_pair and not unpaired:
        kto = "rows" if for_reward_model else "--loss_type kto, or rows"
        raise ConfigError(
            f"{rows.origin(0)}: rows with 'completion' and 'label' are no pairs: use {kto} with "
            "'chosen' and 'rejected'."
        )
    cutter = _PairTruncator(rows, maker, max_length, truncation_mode, vocab_size)
    # The prompt of a row before anything of it is cut, by which KTO tells prompts apart.
    cut = [(cutter(item, i), maker.prompts[i]) for i, item in enumerate(maker)]
    items = [item for item, _ in cut if item is not None]
    prompts = [prompt for item, prompt in cut if item is not None]
    if unpaired and maker.is_pair:
        items, prompts = _unpaired(items), [prompt for prompt in prompts for _ in PAIRED]
    if not items:
        reasons = "; ".join(f"{count} {reason}" for reason, count in cutter.dropped.items())
        raise DataError(f"none of {len(rows)} rows can be trained on ({reasons}).")
    report = _report(maker, cutter, items, tokenizer)
    items = _with_partners(items, prompts, rows.origin(0)) if unpaired else items
    return Preferences(items, not unpaired, maker.has_margins), report


class _PairTruncator:
    """Checks, truncates, drops and counts rows."""

    def __init__(self, rows: Rows, maker: PairEncoder, max_length, mode: str, vocab_size):
        self.rows, self.is_pair, self.vocab_size = rows, maker.is_pair, vocab_size
        self.for_reward_model = maker.for_reward_model
        self.max_length, self.mode = max_length, mode
        self.dropped: Counter[str] = Counter()
        self.truncated = 0
        self.lengths: list[int] = []
        self.completion_lengths: list[int] = []

    def __call__(self, item: Preference, i: int) -> Preference | None:
        self._check(item, i)
        kept = self._cut(item, i)
        if isinstance(kept, str):
            self.dropped[kept] += 1
            return None
        return kept

    def _cut(self, item: Preference, i: int) -> Preference | str:
        """The pair, cut where need be, or why it is dropped."""
        completions = (item.chosen, item.rejected)
        longest = max(map(len, completions))
        self.lengths.append(len(item.prompt) + longest)
        self.completion_lengths += map(len, completions)
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


def _unpaired(items: list[Preference]) -> list[Preference]:
    """Splits each pair into a desirable and an undesirable row."""
    return [
        Preference(p.prompt, completion, completion, good)
        for p in items
        for completion, good in ((p.chosen, True), (p.rejected, False))
    ]


def _with_partners(items: list[Preference], prompts: list[bytes], where: str) -> list[Preference]:
    """Adds to each row the completion of another prompt, truncated to the longest row.

    KTO estimates its KL term from completions of other prompts. The partner is the next row with
    the same label, so that desirable rows are not all paired with undesirable completions.

    Raises:
      DataError: all rows have one prompt.
    """
    partners = _next_others(range(len(items)), prompts)
    if not partners:
        raise DataError(
            f"{where}: KTO needs completions of at least two different prompts, and the set has "
            f"one prompt in all of its {len(items)} rows: its KL term is estimated from "
            "completions of other prompts. Add rows with other prompts, or train on pairs with "
            "another loss_type."
        )
    longest = max(len(item.prompt) + len(item.chosen) for item in items)
    for label in (True, False):
        same = [i for i, item in enumerate(items) if item.is_desirable == label]
        partners |= _next_others(same, prompts)
    return [
        item._replace(rejected=items[partners[i]].chosen[: longest - len(item.prompt)])
        for i, item in enumerate(items)
    ]


def _next_others(places: Iterable[int], prompts: list[bytes]) -> dict[int, int]:
    """Maps each place to the next one, cyclically, with another prompt, if there is one.

    >>> _next_others([0, 1, 2], [b"a", b"a", b"b"])
    {2: 0, 1: 2, 0: 2}
    """
    places, found = list(places), {}
    last: int | None = None
    for i, following in [*zip(places, places[1:] + places[:1], strict=True)][::-1] * 2:
        if prompts[following] != prompts[i]:
            last = following
        if last is not None:
            found[i] = last
    return found


def _report(maker: PairEncoder, cutter: _PairTruncator, items, tokenizer) -> PreferenceReport:
    rows, used = maker.rows, {*maker.format.columns}
    used |= set() if maker.is_pair else {"label"}
    used |= {MARGIN} if maker.has_margins else set()
    notes = [*rows.notes, *maker.renderer.notes()]
    if maker.ignores_prompt:
        notes.append("the prompt is the beginning of the conversations; the column is not used")
    return PreferenceReport(
        format=maker.format.name + (", conversational" if maker.format.conversational else ""),
        columns=tuple(sorted(used)),
        unused_columns=tuple(sorted({str(k) for row in rows.rows for k in row} - used)),
        num_rows=len(rows),
        num_examples=len(items),
        dropped=dict(cutter.dropped),
        truncated=cutter.truncated,
        merged=maker.merged,
        lengths=percentiles(cutter.lengths),
        completion_lengths=percentiles(cutter.completion_lengths),
        num_tokens=sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in items),
        example=tuple(tokenizer.decode(part.tolist()) for part in items[0][:3]),
        notes=tuple(notes),
    )
