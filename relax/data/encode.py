"""Encodes rows as tokens and labels: chat templates, joint tokenisation, loss masks, end tokens."""

import re
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from relax.data.examples import IGNORE, Encoded
from relax.data.formats import Format, FormatOptions, conversation
from relax.data.templates import ChatRenderer, Job, require_template
from relax.data.tokens import common_length, end_token, token_mask, tokenize, with_end_token
from relax.errors import ConfigError, DataError

CHUNK = 1000  # rows per call, which fast tokenizers process in parallel
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Encoder:
    """Encodes rows of one format with one tokenizer.

    Attributes:
      counts: `merged`, rows whose tokenised prompt is not a prefix of the whole: a token spans the
        border, or the template renders the prompt differently before a completion.
      renderer: renders conversations; its notes list what the template omits.

    Args:
      tokenizer: a Hugging Face tokenizer.
      found: the format of the rows.
      options: options for encoding.

    Raises:
      ConfigError, DataError: if the tokenizer cannot do what the format and the options need.
    """

    def __init__(self, tokenizer, found: Format, options: FormatOptions):
        self.tokenizer, self.format, self.options = tokenizer, found, options
        self.counts: Counter[str] = Counter()
        self.renderer = ChatRenderer(tokenizer, options.limits)
        self.eos = options.eos_token or tokenizer.eos_token
        if found.conversational:
            self._check_template()
        elif found.name != "tokens":
            self.eos = end_token(tokenizer, options.eos_token)
        with_prompt = found.name == "prompt-completion" or "completion_mask" in found.columns
        asked = options.completion_only_loss
        self.completion_only = with_prompt if asked is None else asked

    def encode(self, rows: list[dict], origin: Callable[[int], str]) -> Iterator[Encoded]:
        """Yields the tokens and labels of each row, in order, not yet truncated."""
        encode_chunk = {
            "tokens": self._given_tokens,
            "text": self._texts,
            "prompt-completion": self._prompt_completions,
        }.get(self.format.name, self._conversations)
        for first in range(0, len(rows), CHUNK):
            chunk = rows[first : first + CHUNK]
            yield from encode_chunk(chunk, [origin(first + i) for i in range(len(chunk))])

    def _check_template(self) -> None:
        what = f"rows of format {self.format.name}"
        require_template(self.tokenizer, what, self.options.eos_token)
        templates = self.tokenizer.chat_template
        templates = templates.values() if isinstance(templates, dict) else [templates]
        if self.options.assistant_only_loss and not any(map(_GENERATION.search, templates)):
            raise ConfigError(
                "assistant_only_loss needs a chat template that marks the assistant's words with "
                "{% generation %} ... {% endgeneration %}, and the tokenizer's does not: give one "
                "with --chat_template_path, or use prompt and completion columns."
            )

    def _given_tokens(self, rows, where) -> Iterator[Encoded]:
        for row in rows:
            ids = np.asarray(row["input_ids"], np.int64)
            labels = np.array(row.get("labels", ids), np.int64)
            if "labels" not in self.format.columns:
                if "assistant_masks" in self.format.columns:
                    labels[np.asarray(row["assistant_masks"]) == 0] = IGNORE
                if "completion_mask" in self.format.columns and self.completion_only:
                    labels[np.asarray(row["completion_mask"]) == 0] = IGNORE
            if "attention_mask" in self.format.columns:
                real = np.asarray(row["attention_mask"]) != 0
                ids, labels = ids[real], labels[real]
            yield Encoded(ids, labels)

    def _texts(self, rows, where) -> Iterator[Encoded]:
        texts = [with_end_token(row[self.format.columns[0]], self.eos) for row in rows]
        for ids in self._tokenize(texts, special=True):
            yield Encoded(np.asarray(ids, np.int64), np.asarray(ids, np.int64))

    def _prompt_completions(self, rows, where) -> Iterator[Encoded]:
        chat = self.format.conversational
        if chat:
            prompts = self.renderer.texts(
                [
                    Job(self._messages(row, "prompt"), row, place, add_generation_prompt=True)
                    for row, place in zip(rows, where, strict=True)
                ]
            )
        else:
            prompts = [row["prompt"] for row in rows]
        if self.options.assistant_only_loss:
            wholes = self._marked(rows, where)
        else:
            fulls = self._rendered(rows, where) if chat else [self._joined(row) for row in rows]
            wholes = _all_trained(self._tokenize(fulls, special=not chat))
        all_prompt_ids = self._tokenize(prompts, special=not chat)
        for prompt_ids, whole in zip(all_prompt_ids, wholes, strict=True):
            length = common_length(prompt_ids, whole.input_ids.tolist())
            self.counts["merged"] += length < len(prompt_ids)
            if self.completion_only:
                whole.labels[:length] = IGNORE
            yield whole

    def _conversations(self, rows, where) -> Iterator[Encoded]:
        if self.options.assistant_only_loss:
            yield from self._marked(rows, where)
        else:
            yield from _all_trained(self._tokenize(self._rendered(rows, where), special=False))

    def _rendered(self, rows, where) -> list[str]:
        return self.renderer.texts(
            [Job(self._whole(row), row, place) for row, place in zip(rows, where, strict=True)]
        )

    def _messages(self, row: dict, column: str) -> list[dict]:
        return conversation(row, column, self.options)

    def _whole(self, row: dict) -> list[dict]:
        if self.format.name == "prompt-completion":
            return self._messages(row, "prompt") + self._messages(row, "completion")
        return self._messages(row, self.format.columns[0])

    def _joined(self, row: dict) -> str:
        return row["prompt"] + with_end_token(row["completion"], self.eos)

    def _tokenize(self, texts: list[str], special: bool) -> list[list[int]]:
        return tokenize(self.tokenizer, texts, special=special)

    def _marked(self, rows, where) -> list[Encoded]:
        """Conversations with labels where the template marks the assistant's words."""
        jobs = [Job(self._whole(row), row, place) for row, place in zip(rows, where, strict=True)]
        special = _special_ids(self.tokenizer)
        made = []
        for job, (text, spans) in zip(jobs, self.renderer.render(jobs, spans=True), strict=True):
            out = self.tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            mask = token_mask(out["offset_mapping"], out["input_ids"], spans, special)
            if not any(mask):
                raise DataError(
                    f"{job.where}: assistant_only_loss found no assistant message: the row has "
                    f"the roles {[m['role'] for m in job.messages]}."
                )
            ids = np.array(out["input_ids"], np.int64)
            made.append(Encoded(ids, np.where(mask, ids, IGNORE)))
        return made


def _all_trained(all_ids: list[list[int]]) -> list[Encoded]:
    return [Encoded(np.array(ids, np.int64), np.array(ids, np.int64)) for ids in all_ids]


def _special_ids(tokenizer) -> set[int]:
    """Ids of all special tokens, also of those without a name such as EOS."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
