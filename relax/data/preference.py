"""Preferences: rows to a prompt and two answers each, in tokens; all that was cut or left out.

Three kinds of rows, told by the first:

    {"prompt", "chosen", "rejected"}      strings or messages; without `prompt` it is what the two
                                          answers begin with
    {"prompt", "completion", "label"}     one answer, good or bad by itself
    {"prompt_ids", "chosen_ids", "rejected_ids"}

Reward models read `margin` beside a pair, by how much the scores should differ, and their pairs may
have no prompt: they judge the whole text.
"""

import dataclasses
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from relax.data.encode import render_template
from relax.data.formats import Format, FormatOptions, check_row, conversation
from relax.data.preference_report import PreferenceReport
from relax.data.reading import Rows, read_rows
from relax.data.report import percentiles
from relax.errors import ConfigError, DataError

TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")
PAIRED, UNPAIRED = ("chosen", "rejected"), ("completion",)
MARGIN = "margin"
UNPAIRED_NAME = "unpaired preference"
_CHUNK = 1000  # rows tokenised in one call: fast tokenizers work on them in parallel


class Preference(NamedTuple):
    """A prompt and two answers, int32.

    Of unpaired data the second answer is another row's, which KTO compares with.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    is_desirable: bool = True  # the first answer; of a pair it always is
    margin: float = 0.0


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
        """A checksum of every token, where answers begin, the labels and the margins."""
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
    judges: bool = False,
    system_prompt: str | None = None,
    eos_token: str | None = None,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    vocab_size: int | None = None,
) -> tuple[Preferences, PreferenceReport]:
    """Turns rows into prompts and answers, such that prompt + answer is the whole as tokenised.

    Prompt and answer are tokenised together. Where that, or the chat template, makes the end of
    the prompt another than that of the prompt alone, the prompt is what all of them begin with, and
    the row counts as merged.

    Args:
      rows: what `read_rows` returns, or takes.
      tokenizer: a Hugging Face tokenizer.
      unpaired: a pair becomes two rows, one desirable and one not (for KTO).
      judges: the pairs are for a reward model, see above.
      system_prompt: put before conversations that have no system message.
      eos_token: ends a plain text, if not the tokenizer's own end token.
      max_length: tokens of prompt and answer; None: any number.
      truncation_mode: of longer rows: `keep_start` cuts the answers' ends, `keep_end` the prompt's
        beginning, to what the longer answer leaves; `drop`; `error`.
      vocab_size: rows of the model's embedding; None: not checked.

    Raises:
      DataError: a row that is not what it should be (with file and line), or none is left.
    """
    # Refuses what is no mode and no length.
    FormatOptions(max_length=max_length, truncation_mode=truncation_mode)
    rows = rows if isinstance(rows, Rows) else read_rows(rows)
    if not rows.rows:
        raise DataError("the data set has no rows.")
    maker = _PairEncoder(rows, tokenizer, system_prompt, eos_token, judges)
    if not maker.is_pair and not unpaired:
        kto = "rows" if judges else "--loss_type kto, or rows"
        raise ConfigError(
            f"{rows.origin(0)}: rows with 'completion' and 'label' are no pairs: use {kto} with "
            "'chosen' and 'rejected'."
        )
    cutter = _PairTruncator(rows, maker, max_length, truncation_mode, vocab_size)
    items = [kept for i, item in enumerate(maker) if (kept := cutter(item, i)) is not None]
    if unpaired and maker.is_pair:
        items = [
            Preference(p.prompt, answer, answer, good)
            for p in items
            for answer, good in ((p.chosen, True), (p.rejected, False))
        ]
    if not items:
        reasons = "; ".join(f"{count} {reason}" for reason, count in cutter.dropped.items())
        raise DataError(f"no row of {len(rows)} can be trained on ({reasons}).")
    report = _report(maker, cutter, items, tokenizer)
    items = _with_partners(items) if unpaired else items
    return Preferences(items, not unpaired, maker.has_margins), report


class _PairEncoder:
    """Iterates over what rows are in tokens, nothing cut."""

    def __init__(
        self, rows: Rows, tokenizer, system_prompt: str | None, eos_token: str | None, judges: bool
    ):
        self.rows, self.tokenizer, self.judges = rows, tokenizer, judges
        self.format = find_format(rows.rows[0], rows.origin(0), judges)
        self.has_margins = judges and rows.rows[0].get(MARGIN) is not None
        self.options = FormatOptions(system_prompt=system_prompt)
        self.eos = eos_token or tokenizer.eos_token
        self.is_pair = self.format.name != UNPAIRED_NAME
        self.merged = 0
        for i, row in enumerate(rows.rows):
            _check(row, self.format, rows.origin(i))
            if self.has_margins:
                _check_margin(row, rows.origin(i))
        if self.format.conversational and not tokenizer.chat_template:
            raise DataError(
                "messages need a chat template and the tokenizer has none: give one with "
                "--chat_template_path (a .jinja file or a tokenizer directory)."
            )
        if system_prompt and not self.format.conversational:
            raise ConfigError("system_prompt needs conversations, and the rows are texts.")
        if self.format.name != "tokens" and not self.format.conversational and not self.eos:
            raise DataError(
                "plain texts need an end token to learn where to stop and the tokenizer has none: "
                "name one with --eos_token."
            )

    def __iter__(self) -> Iterator[Preference]:
        if self.format.name == "tokens":
            for row in self.rows.rows:
                parts = row
                if "prompt_ids" not in self.format.columns:
                    split = split_prompt(row["chosen_ids"], row["rejected_ids"], may_be_empty=True)
                    parts = {f"{name}_ids": ids for name, ids in split.items()}
                arrays = [np.asarray(parts[name], np.int32) for name in TOKENS]
                yield Preference(*arrays, margin=self._margin(row))
            return
        for first in range(0, len(self.rows), _CHUNK):
            places = range(first, min(first + _CHUNK, len(self.rows)))
            texts = [self._texts(self.rows.rows[i], self.rows.origin(i)) for i in places]
            flat = [text for row in texts for text in row]
            special = not self.format.conversational  # templates write their own
            ids = iter(self.tokenizer(flat, add_special_tokens=special, verbose=False)["input_ids"])
            for i, row in zip(places, texts, strict=True):
                yield self._item([next(ids) for _ in row], i)

    def _texts(self, row: dict, where: str) -> list[str]:
        """The prompt, and the prompt with each answer."""
        columns = PAIRED if self.is_pair else UNPAIRED
        if "prompt" not in self.format.columns:
            row = row | split_prompt(row["chosen"], row["rejected"], where, self.judges)
        if not self.format.conversational:
            answers = [row[name] for name in columns]
            answers = [a if a.endswith(self.eos) else a + self.eos for a in answers]
            return [row["prompt"], *(row["prompt"] + answer for answer in answers)]
        if not row["prompt"]:
            wholes = [conversation(row, name, self.options) for name in columns]
            return ["", *(render_template(self.tokenizer, whole, row, where) for whole in wholes)]
        prompt = conversation(row, "prompt", self.options)
        return [
            render_template(self.tokenizer, prompt, row, where, add_generation_prompt=True),
            *(render_template(self.tokenizer, prompt + row[n], row, where) for n in columns),
        ]

    def _item(self, ids: list[list[int]], i: int) -> Preference:
        prompt, *wholes = ids
        length = min(_common(prompt, whole) for whole in wholes)
        self.merged += length < len(prompt)
        answers = [np.array(whole[length:], np.int32) for whole in wholes]
        row, prompt = self.rows.rows[i], np.array(prompt[:length], np.int32)
        label = self.is_pair or row["label"]
        return Preference(prompt, answers[0], answers[-1], label, self._margin(row))

    def _margin(self, row: dict) -> float:
        return float(row[MARGIN]) if self.has_margins else 0.0


class _PairTruncator:
    """Checks, cuts, drops and counts."""

    def __init__(self, rows: Rows, maker: _PairEncoder, max_length, mode: str, vocab_size):
        self.rows, self.is_pair, self.vocab_size = rows, maker.is_pair, vocab_size
        self.may_be_empty = ("prompt",) if maker.judges else ()
        self.max_length, self.mode = max_length, mode
        self.dropped: Counter[str] = Counter()
        self.truncated = 0
        self.lengths: list[int] = []
        self.answer_lengths: list[int] = []

    def __call__(self, item: Preference, i: int) -> Preference | None:
        self._check(item, i)
        answers = (item.chosen, item.rejected)
        longest = max(map(len, answers))
        self.lengths.append(len(item.prompt) + longest)
        self.answer_lengths += map(len, answers)
        if self.is_pair and np.array_equal(*answers):
            return self._drop("chosen equals rejected")
        if self.max_length is None or len(item.prompt) + longest <= self.max_length:
            return item
        if self.mode == "error":
            raise DataError(
                f"{self.rows.origin(i)}: the row has {len(item.prompt) + longest} tokens, "
                f"max_length={self.max_length}: raise max_length, or choose a truncation_mode that "
                "cuts or drops."
            )
        if self.mode == "drop":
            return self._drop("longer than max_length")
        if self.mode == "keep_end":
            room = self.max_length - longest
            if room < 1:
                return self._drop("an answer fills max_length")
            self.truncated += 1
            return item._replace(prompt=item.prompt[-room:])
        room = self.max_length - len(item.prompt)
        if room < 1:
            return self._drop("the prompt fills max_length")
        answers = [answer[:room] for answer in answers]
        if self.is_pair and np.array_equal(*answers):
            return self._drop("no difference within max_length")
        self.truncated += 1
        return item._replace(chosen=answers[0], rejected=answers[1])

    def _drop(self, reason: str) -> None:
        self.dropped[reason] += 1

    def _check(self, item: Preference, i: int) -> None:
        for part, what in zip(item, ("prompt", "chosen answer", "rejected answer"), strict=False):
            if not len(part) and what not in self.may_be_empty:
                raise DataError(
                    f"{self.rows.origin(i)}: the {what} has no token: a prompt needs one for the "
                    "answer to follow, and an answer one to be judged by."
                )
            wrong = part[(part < 0) | (part >= (self.vocab_size or np.inf))]
            if len(wrong):
                raise DataError(
                    f"{self.rows.origin(i)}: token id {wrong[0]} is outside of the model's "
                    f"embedding of {self.vocab_size} rows: is the tokenizer this model's?"
                )


def find_format(row: dict, where: str, judges: bool = False) -> Format:
    """Recognises the kind of the first row; for `judges` tokens may come without a prompt.

    >>> find_format({"chosen": "a b", "rejected": "a c"}, "a.jsonl:1").name
    'preference'
    """
    present = [name for name, value in row.items() if value is not None]
    if "chosen_ids" in present:
        return Format("tokens", TOKENS[judges and "prompt_ids" not in present :])
    extra = tuple(name for name in ("tools", "chat_template_kwargs") if name in present)
    if "chosen" in present or "rejected" in present:
        prompt = ("prompt",) if "prompt" in present else ()
        conversational = isinstance(row.get("chosen"), list)
        columns = (*prompt, *PAIRED, *(extra if conversational else ()))
        return Format("preference", columns, conversational)
    if "completion" in present and "label" in row:
        conversational = isinstance(row["completion"], list)
        columns = ("prompt", *UNPAIRED, *(extra if conversational else ()))
        return Format(UNPAIRED_NAME, columns, conversational)
    raise DataError(
        f"{where}: no preference: the row has {', '.join(map(repr, row)) or 'nothing'}. A row has "
        "'prompt', 'chosen' and 'rejected' (or, for KTO, 'prompt', 'completion' and 'label')."
    )


def _check(row: dict, found: Format, where: str) -> None:
    if found.name == "tokens":
        for name in found.columns:
            value = row.get(name)
            value = value.tolist() if hasattr(value, "tolist") else value
            if not isinstance(value, list) or not all(
                type(item) is int and abs(item) < 2**31 for item in value
            ):
                raise DataError(f"{where}: {name!r} must be a list of 32-bit integers.")
        return
    check_row(row, found, where)
    if found.name == UNPAIRED_NAME and not isinstance(row.get("label"), bool):
        raise DataError(f"{where}: 'label' must be true or false, it is {row.get('label')!r}.")


def _check_margin(row: dict, where: str) -> None:
    value = row.get(MARGIN)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise DataError(f"{where}: 'margin' must be a number in every row, it is {value!r}.")


def split_prompt(chosen, rejected, where: str = "row", may_be_empty: bool = False) -> dict:
    """The prompt that two answers begin with, strings or messages, and what is left of them.

    A space before the first difference belongs to the answers. Only a prompt that may be empty is
    taken from messages that do not begin alike.

    >>> split_prompt("The sky is blue.", "The sky is green.")
    {'prompt': 'The sky is', 'chosen': ' blue.', 'rejected': ' green.'}
    """
    common = _common(chosen, rejected)
    if isinstance(chosen, str):
        common -= chosen[:common].endswith(" ")
    elif may_be_empty:
        common = common if common < min(len(chosen), len(rejected)) else 0
    elif not 0 < common < min(len(chosen), len(rejected)):
        raise DataError(
            f"{where}: without 'prompt' the messages of 'chosen' and 'rejected' must begin alike "
            f"and differ in a later one, and {common} of {len(chosen)} and {len(rejected)} are "
            "alike."
        )
    return {
        "prompt": chosen[:common],
        "chosen": chosen[common:],
        "rejected": rejected[common:],
    }


def _common(one, other) -> int:
    """How many first items of two sequences are the same.

    >>> _common("blue", "black")
    2
    """
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _with_partners(items: list[Preference]) -> list[Preference]:
    """The next row's answer beside each, cut where the two would make the longest row."""
    longest = max(len(item.prompt) + len(item.chosen) for item in items)
    return [
        item._replace(rejected=items[(i + 1) % len(items)].chosen[: longest - len(item.prompt)])
        for i, item in enumerate(items)
    ]


def _report(maker: _PairEncoder, cutter: _PairTruncator, items, tokenizer) -> PreferenceReport:
    rows, used = maker.rows, {*maker.format.columns}
    used |= set() if maker.is_pair else {"label"}
    used |= {MARGIN} if maker.has_margins else set()
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
        answer_lengths=percentiles(cutter.answer_lengths),
        num_tokens=sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in items),
        example=tuple(tokenizer.decode(part.tolist()) for part in items[0][:3]),
    )
