"""Encodes rows as tokens and labels: chat templates, joint tokenisation, loss masks, end tokens."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from relax.data.examples import IGNORE, Draft
from relax.data.formats import Format, FormatOptions, conversation
from relax.data.templates import ChatRenderer, Job, require_template
from relax.data.thoughts import with_thinking
from relax.data.tokens import common_length, end_token, tokenize, with_end_token
from relax.data.turn_labels import TurnLabeller, is_trained

CHUNK = 1000  # rows per call, which fast tokenizers process in parallel


class Encoder:
    """Encodes rows of one format with one tokenizer.

    Attributes:
      counts: `merged`, rows whose tokenised prompt is not a prefix of the whole: a token spans the
        border, or the template renders the prompt differently before a completion; `stripped`,
        messages without the thoughts that they had.
      turns: labels the assistant's turns of conversations.
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
        self.turns: TurnLabeller | None = None
        if found.conversational:
            require_template(tokenizer, f"rows of format {found.name}", options.eos_token)
            self.turns = TurnLabeller(tokenizer, self.renderer, options)
        elif found.name != "tokens":
            self.eos = end_token(tokenizer, options.eos_token)
        with_prompt = found.name == "prompt-completion" or "completion_mask" in found.columns
        asked = options.completion_only_loss
        self.completion_only = with_prompt if asked is None else asked

    def encode(self, rows: Iterable[dict], origin: Callable[[int], str]) -> Iterator[Draft]:
        """Yields the tokens and labels of each row, in order, not yet truncated."""
        encode_chunk = {
            "tokens": self._given_tokens,
            "text": self._texts,
            "prompt-completion": self._prompt_completions,
        }.get(self.format.name, self._conversations)
        remaining = iter(rows)
        for first in itertools.count(0, CHUNK):
            chunk = list(itertools.islice(remaining, CHUNK))
            if not chunk:
                return
            # Places are made for conversations only.
            yield from encode_chunk(chunk, map(origin, range(first, first + len(chunk))))

    def notes(self) -> Iterator[str]:
        """What was left out of conversations, by the template or by an option."""
        yield from self.renderer.notes()
        if self.turns and self.turns.thoughtless:
            count, first = len(self.turns.thoughtless), self.turns.thoughtless[0]
            yield (
                f"the chat template leaves out the thoughts of {count:,} assistant messages: first "
                f"{first}. They are not trained on; most templates leave out those of earlier turns"
            )
        if self.counts["stripped"]:
            yield (
                f"{self.counts['stripped']:,} messages are without the thoughts that they had "
                f"(thinking={self.options.thinking})"
            )

    def _given_tokens(self, rows, where) -> Iterator[Draft]:
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
            yield Draft(ids, labels)

    def _texts(self, rows, where) -> Iterator[Draft]:
        texts = [with_end_token(row[self.format.columns[0]], self.eos) for row in rows]
        yield from _all_trained(self._tokenize(texts, special=True))

    def _prompt_completions(self, rows, where) -> Iterator[Draft]:
        chat = self.format.conversational
        if chat:
            jobs = self._jobs(rows, where)
            prompts = self.renderer.texts(
                [
                    job._replace(
                        messages=job.messages[: len(job.messages) - len(job.row["completion"])],
                        add_generation_prompt=True,
                    )
                    for job in jobs
                ]
            )
            wholes = self._rendered(jobs)
        else:
            prompts = [row["prompt"] for row in rows]
            wholes = _all_trained(self._tokenize([self._joined(row) for row in rows], special=True))
        all_prompt_ids = self._tokenize(prompts, special=not chat)
        for prompt_ids, whole in zip(all_prompt_ids, wholes, strict=True):
            length = common_length(prompt_ids, whole.input_ids.tolist())
            self.counts["merged"] += length < len(prompt_ids)
            if self.completion_only:
                whole.labels[:length] = IGNORE
            yield whole

    def _conversations(self, rows, where) -> Iterator[Draft]:
        yield from self._rendered(self._jobs(rows, where))

    def _rendered(self, jobs: list[Job]) -> list[Draft]:
        """Conversations with the labels of their turns, or all trained."""
        by_turns = self.options.assistant_only_loss or self.options.truncation_mode == "turns"
        if by_turns or not all(is_trained(m) for job in jobs for m in job.messages):
            assert self.turns is not None
            return self.turns.encode(jobs)
        return _all_trained(self._tokenize(self.renderer.texts(jobs), special=False))

    def _jobs(self, rows, where) -> list[Job]:
        jobs = []
        for row, place in zip(rows, where, strict=True):
            messages = self._messages(row)
            thoughtful = with_thinking(messages, self.options.thinking)
            pairs = zip(messages, thoughtful, strict=True)
            self.counts["stripped"] += sum(old is not new for old, new in pairs)
            jobs.append(Job(thoughtful, row, place))
        return jobs

    def _messages(self, row: dict) -> list[dict]:
        if self.format.name == "prompt-completion":
            columns = ("prompt", "completion")
            return [m for name in columns for m in conversation(row, name, self.options)]
        return conversation(row, self.format.columns[0], self.options)

    def _joined(self, row: dict) -> str:
        return row["prompt"] + with_end_token(row["completion"], self.eos)

    def _tokenize(self, texts: list[str], special: bool) -> list[list[int]]:
        return tokenize(self.tokenizer, texts, special=special)


def _all_trained(all_ids: list[list[int]]) -> list[Draft]:
    """Drafts whose tokens and labels are parts of two arrays: one for each row costs more."""
    ends = list(itertools.accumulate(map(len, all_ids), initial=0))
    ids = np.fromiter(itertools.chain.from_iterable(all_ids), np.int64, ends[-1])
    labels = ids.copy()
    return [
        Draft(ids[start:stop], labels[start:stop])
        for start, stop in zip(ends, ends[1:], strict=False)
    ]
