"""Converts rows to training examples, with a report of truncated and dropped rows."""

import dataclasses
from collections import Counter
from collections.abc import Iterator

import numpy as np

from relax.data.encode import Encoder
from relax.data.examples import IGNORE, Encoded, Examples
from relax.data.formats import (
    ALPACA,
    Format,
    FormatOptions,
    check_row,
    columns_of,
    find_format,
    from_alpaca,
)
from relax.data.reading import Rows, read_rows
from relax.data.report import DataReport, percentiles, spans
from relax.errors import DataError

_SHOWN = 5  # number of examples in the report


def prepare(
    rows, tokenizer, options: FormatOptions | None = None, vocab_size: int | None = None
) -> tuple[Examples, DataReport]:
    """Converts rows to tokens and labels, with a report.

    Every row is checked against the format of the first before anything is tokenised. A row
    without a trainable token is dropped and counted.

    Args:
      rows: a result or an argument of `read_rows`.
      tokenizer: a Hugging Face tokenizer.
      options: options for encoding.
      vocab_size: rows of the model's embedding; None: not checked.

    Returns:
      The examples and the report.

    Raises:
      DataError: a row is invalid (with file and line), or none can be trained on.
      ConfigError: if an option does not fit the data.
    """
    options = options or FormatOptions()
    rows = rows if isinstance(rows, Rows) else read_rows(rows, limits=options.limits)
    if not rows.rows:
        raise DataError("the data set has no rows.")
    rows = _with_known_columns(rows, tokenizer, options)
    found = find_format(rows.rows[0], rows.origin(0), options, columns_of(rows.rows))
    for i, row in enumerate(rows.rows):
        check_row(row, found, rows.origin(i))
    encoder = Encoder(tokenizer, found, options)
    fate = _Truncator(rows, options, vocab_size, _ending_tokens(tokenizer, encoder.eos))
    examples = Examples(fate.keep(encoder.encode(rows.rows, rows.origin)))
    if not len(examples):
        raise DataError(_nothing_left(fate, options))
    return examples, _report(rows, found, encoder, fate, examples, tokenizer)


def _with_known_columns(rows: Rows, tokenizer, options: FormatOptions) -> Rows:
    """Converts Alpaca's columns to prompt and completion; other rows are unchanged."""
    present = columns_of(rows.rows[:1])
    others = {"input_ids", "text", "messages", "conversations", "prompt", "completion"}
    if not set(ALPACA) <= set(present) or others & {*present, options.text_field} - {"text"}:
        return rows
    chat = bool(tokenizer.chat_template)
    made = [
        from_alpaca(row, rows.origin(i), conversational=chat) for i, row in enumerate(rows.rows)
    ]
    kind = "messages" if chat else "texts, since the tokenizer has no chat template"
    note = f"instruction and input are read as the prompt, output as the completion ({kind})"
    return dataclasses.replace(rows, rows=made, notes=(*rows.notes, note))


class _Truncator:
    """Truncates, drops and counts rows."""

    def __init__(self, rows: Rows, options: FormatOptions, vocab_size, ending_tokens: np.ndarray):
        self.rows, self.options, self.vocab_size = rows, options, vocab_size
        self.ending_tokens = ending_tokens
        self.dropped: Counter[str] = Counter()
        self.truncated = self.endless = 0
        self.lengths: list[int] = []

    def keep(self, encoded: Iterator[Encoded]) -> Iterator[Encoded]:
        for i, example in enumerate(encoded):
            self.lengths.append(len(example.input_ids))
            self._check_ids(example, i)
            cut = self._truncate(example, i)
            if cut is None:
                self.dropped["longer than max_length"] += 1
                continue
            cut.labels[:1] = IGNORE  # the first token has no context
            trained = cut.labels[cut.labels != IGNORE]
            if not len(trained):
                had_some = (example.labels[1:] != IGNORE).any()
                reason = "no trained token within max_length" if had_some else "no trained token"
                self.dropped[reason] += 1
                continue
            self.truncated += len(cut.input_ids) < len(example.input_ids)
            # Templates may write a line break after the end token and mark both.
            self.endless += not np.isin(trained[-3:], self.ending_tokens).any()
            yield cut

    def _check_ids(self, example: Encoded, i: int) -> None:
        ids, labels = example
        wrong = ids[(ids < 0) | (ids >= (self.vocab_size or np.inf))]
        wrong_labels = labels[(labels != IGNORE) & (labels != ids)]
        if len(wrong):
            raise DataError(
                f"{self.rows.origin(i)}: token id {wrong[0]} is outside of the model's embedding "
                f"of {self.vocab_size} rows: is the tokenizer this model's?"
            )
        if len(wrong_labels):
            raise DataError(
                f"{self.rows.origin(i)}: label {wrong_labels[0]} is neither the token at its place "
                "nor -100: labels must not be shifted; each is at its own token."
            )

    def _truncate(self, example: Encoded, i: int) -> Encoded | None:
        ids, labels = example
        limit, mode = self.options.max_length, self.options.truncation_mode
        if limit is None or len(ids) <= limit:
            return Encoded(ids, labels.copy())
        if mode == "error":
            raise DataError(
                f"{self.rows.origin(i)}: the row has {len(ids)} tokens, max_length={limit}: raise "
                "max_length, or choose a truncation_mode that cuts or drops."
            )
        if mode == "drop":
            return None
        kept = slice(limit) if mode == "keep_start" else slice(len(ids) - limit, None)
        return Encoded(ids[kept], labels[kept].copy())


def _ending_tokens(tokenizer, eos: str | None) -> np.ndarray:
    """Ids that may end a turn: all special tokens, since not every template uses EOS."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ending = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    ending -= {tokenizer.bos_token_id, tokenizer.unk_token_id}
    if eos:
        ending.add(tokenizer.convert_tokens_to_ids(eos))
    return np.array(sorted(ending), np.int64)


def _nothing_left(fate: _Truncator, options: FormatOptions) -> str:
    reasons = "; ".join(f"{count} {reason}" for reason, count in fate.dropped.items())
    advice = "check the masks or labels of the rows."
    if fate.dropped["no trained token"] < len(fate.lengths):
        longest = max(fate.lengths)
        advice = f"raise max_length={options.max_length} (the longest row has {longest} tokens)."
    return f"none of {len(fate.lengths)} rows can be trained on ({reasons}): {advice}"


def _report(rows: Rows, found: Format, encoder: Encoder, fate: _Truncator, examples, tokenizer):
    last = examples[0].labels[examples[0].labels != IGNORE][-1]
    used = set(found.columns)
    notes = [*rows.notes, *encoder.renderer.notes()]
    ignored = {"prompt", "completion"} & set(columns_of(rows.rows))
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
        unused_columns=tuple(sorted({str(k) for row in rows.rows for k in row} - used)),
        num_rows=len(rows),
        num_examples=len(examples),
        dropped=dict(fate.dropped),
        truncated=fate.truncated,
        merged=encoder.counts["merged"],
        endless=fate.endless,
        lengths=percentiles(fate.lengths),
        num_tokens=int(examples.lengths.sum()),
        num_trained_tokens=int((examples.labels != IGNORE).sum()),
        trained_on=_trained_on(found, encoder),
        last_trained_token=tokenizer.decode([int(last)]),
        ends_trained=bool(np.isin(examples[0].labels[-3:], fate.ending_tokens).any()),
        notes=tuple(notes),
        examples=tuple(spans(example, tokenizer) for example in examples[:_SHOWN]),
    )


def _trained_on(found: Format, encoder: Encoder) -> str:
    if "labels" in found.columns:
        return "labels of the rows"
    parts = []
    if encoder.completion_only:
        parts.append("completions")
    if encoder.options.assistant_only_loss or "assistant_masks" in found.columns:
        parts.append("the assistant's words")
    return " that are ".join(parts) or "every token"
