"""Encodes pairs and labelled completions as tokens, without truncation."""

import array
import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from relax.data.ahead import in_lists
from relax.data.encode import CHUNK
from relax.data.formats import (
    TEMPLATE_COLUMNS,
    Format,
    FormatOptions,
    check_row,
    conversation,
)
from relax.data.preference_arrays import Preference
from relax.data.reading import Rows
from relax.data.sources import check_same_formats
from relax.data.templates import ChatRenderer, Job, require_template
from relax.data.tokens import common_length, end_token, tokenize, with_end_token
from relax.errors import ConfigError, DataError

TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")
PAIRED, UNPAIRED = ("chosen", "rejected"), ("completion",)
MARGIN = "margin"
UNPAIRED_NAME = "unpaired preference"


class PairEncoder:
    """Iterates over the rows as tokens, not truncated.

    Attributes:
      columns: the names of all columns, and whether some row has a value there.
      prompts: a digest of each row's whole prompt, so far; the prompts of the items may be shorter.
      merged: number of items with a shortened prompt, so far.
    """

    def __init__(self, rows: Rows, tokenizer, options: FormatOptions, for_reward_model: bool):
        self.rows, self.tokenizer, self.for_reward_model = rows, tokenizer, for_reward_model
        self.columns = _columns_of(rows.rows)
        columns = [name for name, has_value in self.columns.items() if has_value]
        self.format = find_format(rows.rows[0], rows.origin(0), for_reward_model, columns)
        check_same_formats(rows, lambda row, where: find_format(row, where, for_reward_model))
        self.has_margins = for_reward_model and MARGIN in columns
        self.options = options
        self.is_pair = self.format.name != UNPAIRED_NAME
        reads_prompt = self.format.name == "tokens" or "prompt" in self.format.columns
        self.ignores_prompt = "prompt" in columns and not reads_prompt
        self.renderer = ChatRenderer(tokenizer, options.limits)
        self.prompts = array.array("Q")
        self.merged = 0
        for i, row in enumerate(rows.rows):
            _check(row, self.format, rows.origin(i))
            _check_no_prompt(row, self.format, rows.origin(i))
            if self.has_margins:
                _check_margin(row, rows.origin(i))
        if self.format.conversational:
            require_template(tokenizer, "messages", options.eos_token)
        if options.system_prompt and not self.format.conversational:
            raise ConfigError("system_prompt needs conversations, and the rows are texts.")
        if self.format.name != "tokens" and not self.format.conversational:
            self.eos = end_token(tokenizer, options.eos_token)

    def __iter__(self) -> Iterator[Preference]:
        if self.format.name == "tokens":
            for i, row in enumerate(self.rows.rows):
                columns = row
                if "prompt_ids" not in self.format.columns:
                    split = split_prompt(row["chosen_ids"], row["rejected_ids"], may_be_empty=True)
                    columns = {f"{name}_ids": ids for name, ids in split.items()}
                self._note_prompt(columns["prompt_ids"], row, i)
                prompt, chosen, rejected = (np.asarray(columns[n], np.int32) for n in TOKENS)
                yield Preference(prompt, chosen, rejected, margin=self._margin(row))
            return
        first = 0
        for some in in_lists(self.rows.rows, CHUNK):
            parts = [self._parts(row, self.rows.origin(i)) for i, row in enumerate(some, first)]
            chat = self.format.conversational
            texts = [part for row in parts for part in row]
            if chat:
                texts = self.renderer.texts(texts)
            # Templates write their own special tokens.
            all_ids = iter(tokenize(self.tokenizer, texts, special=not chat))
            for i, (row, one) in enumerate(zip(some, parts, strict=True), first):
                yield self._item([next(all_ids) for _ in one], row, i)
            first += len(some)

    def _parts(self, row: dict, where: str) -> list:
        """The prompt, if any, and the prompt with each completion: texts or conversations."""
        columns = PAIRED if self.is_pair else UNPAIRED
        if "prompt" not in self.format.columns:
            row = row | split_prompt(row["chosen"], row["rejected"], where, self.for_reward_model)
        if not self.format.conversational:
            completions = [row[name] for name in columns]
            completions = [with_end_token(completion, self.eos) for completion in completions]
            return [row["prompt"], *(row["prompt"] + completion for completion in completions)]
        if not row["prompt"]:  # a reward model's pair, whose conversations share no beginning
            return [Job(conversation(row, n, self.options), row, where) for n in columns]
        prompt = conversation(row, "prompt", self.options)
        wholes = [prompt + row[name] for name in columns]
        return [Job(prompt, row, where, True), *(Job(whole, row, where) for whole in wholes)]

    def _item(self, parts: list[list[int]], row: dict, i: int) -> Preference:
        *before, first, last = parts if self.is_pair else (*parts, parts[-1])
        prompt, wholes = before[0] if before else [], (first, last)
        self._note_prompt(prompt, row, i)
        length = min(common_length(prompt, whole) for whole in wholes)
        self.merged += length < len(prompt)
        completions = [np.array(whole[length:], np.int32) for whole in wholes]
        shared = np.array(prompt[:length], np.int32)
        label = self.is_pair or bool(_label(row))
        return Preference(shared, completions[0], completions[-1], label, self._margin(row))

    def _note_prompt(self, prompt: list[int], row: dict, i: int) -> None:
        digest = hashlib.blake2b(np.asarray(prompt, np.int32).tobytes(), digest_size=8)
        self.prompts.frombytes(digest.digest())
        if not prompt and not self.for_reward_model:
            found = "" if "prompt" in row else ", as the completions share no beginning"
            raise DataError(
                f"{self.rows.origin(i)}: the prompt has no token{found}: it needs one for a "
                "completion to follow."
            )

    def _margin(self, row: dict) -> float:
        return float(row[MARGIN]) if self.has_margins else 0.0


def _columns_of(rows: Iterable[dict]) -> dict[str, bool]:
    found: dict[str, bool] = {}
    for row in rows:
        for name, value in row.items():
            found[name] = found.get(name, False) or value is not None
    return found


def find_format(
    row: dict, where: str, for_reward_model: bool = False, columns: Iterable[str] = ()
) -> Format:
    """Recognises the format of the first row; for a reward model, tokens need no prompt.

    A text `prompt` next to completions that are conversations repeats their beginning, as in
    UltraFeedback: the prompt is taken from the conversations.

    >>> find_format({"chosen": "a b", "rejected": "a c"}, "a.jsonl:1").name
    'preference'
    """
    present = [name for name, value in row.items() if value is not None]
    if "chosen_ids" in present:
        return Format("tokens", TOKENS[for_reward_model and "prompt_ids" not in present :])
    extra = tuple(name for name in TEMPLATE_COLUMNS if name in {*present, *columns})
    if "chosen" in present or "rejected" in present:
        conversational = isinstance(row.get("chosen"), list)
        repeats = conversational and isinstance(row.get("prompt"), str)
        prompt = ("prompt",) if "prompt" in present and not repeats else ()
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
            value: Any = row.get(name)
            value = value.tolist() if hasattr(value, "tolist") else value
            if not isinstance(value, list) or not all(
                type(item) is int and abs(item) < 2**31 for item in value
            ):
                raise DataError(f"{where}: {name!r} must be a list of 32-bit integers.")
        return
    check_row(row, found, where)
    if found.name == UNPAIRED_NAME and not isinstance(_label(row), bool):
        raise DataError(f"{where}: 'label' must be true or false, it is {row.get('label')!r}.")


def _label(row: dict):
    """The label of a row; all values of a CSV file are texts."""
    value = row.get("label")
    return (
        {"true": True, "false": False}.get(value.lower(), value)
        if isinstance(value, str)
        else value
    )


def _check_no_prompt(row: dict, found: Format, where: str) -> None:
    """Refuses a prompt in a later row if the format, that of the first row, reads none."""
    name = "prompt_ids" if found.name == "tokens" else "prompt"
    value = row.get(name)
    repeats = found.conversational and isinstance(value, str)
    if name not in found.columns and value is not None and not repeats:
        raise DataError(
            f"{where}: the row has {name!r}, and the first row has none: give it to every row, or "
            "to none, where the prompt is the common beginning of both completions."
        )


def _check_margin(row: dict, where: str) -> None:
    value = row.get(MARGIN)
    if isinstance(value, str):  # of a CSV file
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise DataError(f"{where}: 'margin' must be a number in every row, it is {value!r}.")


def split_prompt(chosen, rejected, where: str = "row", may_be_empty: bool = False) -> dict:
    """Splits the common beginning off two completions, strings or messages, as the prompt.

    A space before the first difference belongs to the completions. Messages without a common
    beginning are refused unless the prompt may be empty.

    >>> split_prompt("The sky is blue.", "The sky is green.")
    {'prompt': 'The sky is', 'chosen': ' blue.', 'rejected': ' green.'}
    """
    common = common_length(chosen, rejected)
    if isinstance(chosen, str):
        common -= chosen[:common].endswith(" ")
    elif may_be_empty:
        common = common if common < min(len(chosen), len(rejected)) else 0
    elif not 0 < common < min(len(chosen), len(rejected)):
        raise DataError(
            f"{where}: without a 'prompt' of messages those of 'chosen' and 'rejected' must begin "
            f"alike and differ in a later one, and {common} of {len(chosen)} and {len(rejected)} "
            "are alike."
        )
    return {
        "prompt": chosen[:common],
        "chosen": chosen[common:],
        "rejected": rejected[common:],
    }
