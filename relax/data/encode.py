"""From rows to tokens and labels: chat templates, joint tokenisation, loss masks, the end token."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from relax.data.examples import IGNORE, Encoded
from relax.data.formats import Format, FormatOptions, conversation
from relax.errors import ConfigError, DataError

_CHUNK = 1000  # rows tokenised in one call: fast tokenizers work on them in parallel
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Encoder:
    """Encodes rows of one format with one tokenizer; `counts` says what happened on the way.

    Args:
      tokenizer: a Hugging Face tokenizer.
      found: the format of the rows.
      options: how rows become tokens.

    Raises:
      ConfigError, DataError: if the tokenizer cannot do what the format and the options need.
    """

    def __init__(self, tokenizer, found: Format, options: FormatOptions):
        self.tokenizer, self.format, self.options = tokenizer, found, options
        self.counts: Counter[str] = Counter()
        self.eos = options.eos_token or tokenizer.eos_token
        if found.conversational:
            self._check_template()
        elif found.name != "tokens":
            self._check_eos()
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
        for first in range(0, len(rows), _CHUNK):
            chunk = rows[first : first + _CHUNK]
            yield from encode_chunk(chunk, [origin(first + i) for i in range(len(chunk))])

    def _check_template(self) -> None:
        if not self.tokenizer.chat_template:
            raise DataError(
                f"rows of format {self.format.name} need a chat template and the tokenizer has "
                "none: give one with --chat_template_path (a .jinja file or a tokenizer directory)."
            )
        if self.options.eos_token and self.options.eos_token != self.tokenizer.eos_token:
            raise ConfigError(
                "eos_token ends plain texts; conversations end as the chat template says: "
                "give another one with --chat_template_path."
            )
        templates = self.tokenizer.chat_template
        templates = templates.values() if isinstance(templates, dict) else [templates]
        if self.options.assistant_only_loss and not any(map(_GENERATION.search, templates)):
            raise ConfigError(
                "assistant_only_loss needs a chat template that marks the assistant's words with "
                "{% generation %} ... {% endgeneration %}, and the tokenizer's does not: give one "
                "with --chat_template_path, or use prompt and completion columns."
            )

    def _check_eos(self) -> None:
        if not self.eos:
            raise DataError(
                "plain texts need an end token to learn where to stop and the tokenizer has none: "
                "name one with --eos_token."
            )
        if self.eos not in self.tokenizer.get_vocab():
            raise DataError(f"eos_token {self.eos!r} is not a token of the tokenizer.")

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
        texts = [self._end(row[self.format.columns[0]]) for row in rows]
        for ids in self._tokenize(texts, special=True):
            yield Encoded(np.asarray(ids, np.int64), np.asarray(ids, np.int64))

    def _prompt_completions(self, rows, where) -> Iterator[Encoded]:
        chat = self.format.conversational
        if chat:
            prompts = [
                self._render(self._messages(row, "prompt"), row, place, add_generation_prompt=True)
                for row, place in zip(rows, where, strict=True)
            ]
        else:
            prompts = [row["prompt"] for row in rows]
        fulls = [
            self._render(self._whole(row), row, place) if chat else self._joined(row)
            for row, place in zip(rows, where, strict=True)
        ]
        all_prompt_ids = self._tokenize(prompts, special=not chat)
        all_ids = self._tokenize(fulls, special=not chat)
        for i, (prompt_ids, ids) in enumerate(zip(all_prompt_ids, all_ids, strict=True)):
            if not fulls[i].startswith(prompts[i]):
                raise _not_a_prefix(where[i], prompts[i], fulls[i])
            labels = np.array(ids, np.int64)
            if self.options.assistant_only_loss:
                labels = self._marked(rows[i], where[i]).labels
            if self.completion_only:
                labels[: self._prompt_length(prompt_ids, ids)] = IGNORE
            yield Encoded(np.array(ids, np.int64), labels)

    def _conversations(self, rows, where) -> Iterator[Encoded]:
        if self.options.assistant_only_loss:
            yield from (self._marked(row, place) for row, place in zip(rows, where, strict=True))
            return
        texts = [
            self._render(self._whole(row), row, place)
            for row, place in zip(rows, where, strict=True)
        ]
        for ids in self._tokenize(texts, special=False):
            yield Encoded(np.asarray(ids, np.int64), np.asarray(ids, np.int64))

    def _prompt_length(self, prompt_ids: list[int], ids: list[int]) -> int:
        """How many tokens of `ids` are the prompt's.

        Tokenising the whole may merge the prompt's last characters with the completion's first.
        The merged token is part of the answer, so it is trained on: the prompt is what both share.
        """
        common = len(prompt_ids)
        if ids[:common] != prompt_ids:
            self.counts["merged"] += 1
            common = next(
                (i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b),
                min(len(prompt_ids), len(ids)),
            )
        return common

    def _messages(self, row: dict, column: str) -> list[dict]:
        return conversation(row, column, self.options)

    def _whole(self, row: dict) -> list[dict]:
        if self.format.name == "prompt-completion":
            return self._messages(row, "prompt") + self._messages(row, "completion")
        return self._messages(row, self.format.columns[0])

    def _joined(self, row: dict) -> str:
        return row["prompt"] + self._end(row["completion"])

    def _end(self, text: str) -> str:
        return text if text.endswith(self.eos) else text + self.eos

    def _tokenize(self, texts: list[str], special: bool) -> list[list[int]]:
        # Templates write their special tokens themselves; verbose would warn of every long text.
        return self.tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]

    def _marked(self, row: dict, where: str) -> Encoded:
        """A conversation with labels where the template marks the assistant's words."""
        messages = self._whole(row)
        out = self._render(
            messages, row, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        if not any(out["assistant_masks"]):
            raise DataError(
                f"{where}: assistant_only_loss found no word of the assistant: the row has the "
                f"roles {[m['role'] for m in messages]}."
            )
        ids, spoken = np.array(out["input_ids"], np.int64), np.array(out["assistant_masks"])
        return Encoded(ids, np.where(spoken == 0, IGNORE, ids))

    def _render(self, messages: list[dict], row: dict, where: str, **how):
        return render_template(self.tokenizer, messages, row, where, **how)


def render_template(tokenizer, messages: list[dict], row: dict, where: str, **how):
    """Applies the chat template, in transformers' sandbox: the only place that renders one.

    Args:
      row: its `tools` and `chat_template_kwargs` reach the template.
      where: the row's place, for what is said when the template refuses it.
      how: of `apply_chat_template`.
    """
    try:
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        return tokenizer.apply_chat_template(
            messages,
            tools=tools or None,
            # Written out so that a row's own arguments cannot bring another template.
            chat_template=None,
            **{"tokenize": False, **how},
            **(row.get("chat_template_kwargs") or {}),
        )
    except Exception as error:  # a template may raise anything
        raise DataError(f"{where}: the chat template refuses the row: {error}") from error


def _not_a_prefix(where: str, prompt: str, full: str) -> DataError:
    at = next(
        (i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b),
        min(len(prompt), len(full)),
    )
    return DataError(
        f"{where}: the chat template renders the prompt differently once the completion follows: "
        f"{prompt[at : at + 30]!r} becomes {full[at : at + 30]!r} at character {at}, so what the "
        "completion is cannot be told. Use a template that only appends (--chat_template_path)."
    )
