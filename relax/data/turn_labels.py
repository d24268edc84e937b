"""Labels of conversations by the assistant's turns: which tokens of which messages are trained."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from relax.data.examples import IGNORE, Draft
from relax.data.formats import FormatOptions
from relax.data.templates import ChatRenderer, Job, Rendered
from relax.data.thoughts import thoughts_of
from relax.data.tokens import added_tokens, chunks, ending_ids, special_ids
from relax.data.turns import Turn, TurnFinder
from relax.errors import DataError


def is_trained(message: dict) -> bool:
    """Whether a message is trained on: not if its `weight` is 0 or its `train` false."""
    return message.get("weight") != 0 and message.get("train") not in (False, 0)


class TurnLabeller:
    """Tokenises conversations and labels the assistant's words.

    The template's {% generation %} marks say which words those are; where it has none, the turns
    are found by rendering (`relax.data.turns`).

    Attributes:
      counts: assistant messages `by marks` and `by rendering`, and those that are `untrained`.
      thoughtless: the place of each assistant message whose thoughts the template leaves out.

    Args:
      tokenizer: a Hugging Face tokenizer.
      renderer: renders conversations with its template.
      options: options for encoding.
    """

    def __init__(self, tokenizer, renderer: ChatRenderer, options: FormatOptions):
        self.tokenizer, self.renderer, self.options = tokenizer, renderer, options
        self.counts: Counter[str] = Counter()
        self.thoughtless: list[str] = []
        self.special = special_ids(tokenizer)
        texts = added_tokens(tokenizer)
        ending = [texts[i] for i in ending_ids(tokenizer) if i in texts]
        self.finder = TurnFinder(renderer, list(texts.values()), ending)

    def encode(self, jobs: Sequence[Job]) -> list[Draft]:
        """The tokens of each conversation, its labels, and the ends of its turns.

        Raises:
          DataError: a conversation has no assistant message, or its turns cannot be found.
        """
        if self.options.assistant_only_loss:
            for job in jobs:
                _require_assistant(job)
        marked = [self.renderer.has_marks(job) for job in jobs]
        # Marks alone do not say whose they are.
        plain = [m and self._all_alike(job) for m, job in zip(marked, jobs, strict=True)]
        simple = [job for job, is_plain in zip(jobs, plain, strict=True) if is_plain]
        others = [job for job, is_plain in zip(jobs, plain, strict=True) if not is_plain]
        by_marks = iter(self.renderer.render(simple, spans=True))
        by_turns = iter(self.finder.find(others))
        texts, all_spans, all_turns, all_trained = [], [], [], []
        for job, has_marks, is_plain in zip(jobs, marked, plain, strict=True):
            turns: list[Turn] = []
            if is_plain:
                whole = next(by_marks)
                spans = _require_marks(job, whole)
            else:
                whole, turns = next(by_turns)
                spans = [(turn.start, turn.end) for turn in turns]
                if has_marks and turns:
                    spans = _marks_of(job, turns, whole)
            answers = [message for message in job.messages if message["role"] == "assistant"]
            self.counts["by marks" if has_marks else "by rendering"] += len(answers)
            self.thoughtless += [
                job.where
                for message in answers
                if any(thought not in whole.text for thought in thoughts_of(message))
            ]
            texts.append(whole.text)
            all_spans.append(spans)
            all_turns.append(turns)
            all_trained.append(self._trained(job, turns, spans))
        return [
            self._draft(job, text, encoding, *parts)
            for job, text, encoding, *parts in zip(
                jobs, texts, self._encodings(texts), all_spans, all_turns, all_trained, strict=True
            )
        ]

    def _all_alike(self, job: Job) -> bool:
        """Whether every turn of the row is trained, and none is counted."""
        options = self.options
        return (
            options.train_on == "all_assistant"
            and options.truncation_mode != "turns"
            and all(is_trained(m) for m in job.messages if m["role"] == "assistant")
        )

    def _trained(self, job: Job, turns: list[Turn], spans: list) -> list[bool]:
        """Whether each span is trained on."""
        if not turns:
            return [True] * len(spans)
        last = turns[-1].message
        chosen = [
            turn
            for turn in turns
            if is_trained(job.messages[turn.message])
            and (self.options.train_on == "all_assistant" or turn.message == last)
        ]
        self.counts["untrained"] += len(turns) - len(chosen)
        return [any(t.start < end and start < t.end for t in chosen) for start, end in spans]

    def _encodings(self, texts: list[str]) -> Iterator:
        for chunk in chunks(texts):
            out = self.tokenizer(
                chunk, add_special_tokens=False, return_attention_mask=False, verbose=False
            )
            if out.encodings is None:
                raise DataError(
                    "the tokenizer does not give the places of its tokens, which the assistant's "
                    "turns need: use one with a tokenizer.json."
                )
            yield from out.encodings

    def _draft(self, job: Job, text: str, encoding, spans, turns, trained: list[bool]) -> Draft:
        ids = np.array(encoding.ids, np.int64)
        only = self.options.assistant_only_loss
        labels = np.full_like(ids, IGNORE) if only else ids.copy()
        for span, is_on in zip(spans, trained, strict=True):
            part = self._tokens(job, text, encoding, span, exact=bool(turns))
            if only and is_on:
                labels[part] = ids[part]
            elif not only and not is_on:
                labels[part] = IGNORE
        ends = [self._tokens(job, text, encoding, turn[1:]).stop for turn in turns]
        return Draft(ids, labels, ends)

    def _tokens(self, job: Job, text: str, encoding, span, *, exact: bool = True) -> slice:
        """The tokens of a span of characters.

        A token across the beginning is inside, as in a completion, unless it is a special one:
        those of some tokenizers include the space behind them. One across the end is outside; if
        it holds more than white space of the span, the row is refused, or, not `exact`, it is in.
        """
        start, end = span
        tokens = (encoding.char_to_token(place) for place in range(start, end))
        first = next((token for token in tokens if token is not None), None)
        if first is None:
            return slice(0, 0)
        tokens = (encoding.char_to_token(place) for place in range(end - 1, start - 1, -1))
        stop = next(token for token in tokens if token is not None) + 1
        ids, chars = encoding.ids, encoding.token_to_chars
        while stop < len(ids) and chars(stop)[0] < end:
            stop += 1  # a character of several tokens
        if ids[first] in self.special and chars(first)[0] < start:
            first += 1
        if first < stop and chars(stop - 1)[1] > end:
            shared = text[max(start, chars(stop - 1)[0]) : end]
            if not shared.strip():
                stop -= 1
            elif exact:
                raise DataError(
                    f"{job.where}: a token holds both {shared!r}, the end of the assistant's turn, "
                    "and what follows it: give a chat template that writes an end token with "
                    "--chat_template_path."
                )
        return slice(first, stop)


def _require_assistant(job: Job) -> None:
    roles = [message["role"] for message in job.messages]
    if "assistant" not in roles:
        raise DataError(
            f"{job.where}: assistant_only_loss found no assistant message: the row has "
            f"the roles {roles}."
        )


def _require_marks(job: Job, whole: Rendered) -> list[tuple[int, int]]:
    if not whole.spans:
        raise DataError(
            f"{job.where}: the chat template marks nothing of the row's assistant messages with "
            "{% generation %}: give another template with --chat_template_path."
        )
    return whole.spans


def _marks_of(job: Job, turns: list[Turn], whole: Rendered) -> list[tuple[int, int]]:
    """The template's marks, each of which must belong to one turn."""
    for start, end in _require_marks(job, whole):
        owners = [t.message for t in turns if t.start < end and start < t.end]
        if len(owners) != 1:
            raise DataError(
                f"{job.where}: characters {start} to {end}, which the chat template marks with "
                "{% generation %}, belong to "
                + (f"messages {owners}" if owners else "no assistant message")
                + ", so messages cannot be trained on one by one: leave their weights and "
                "train_on out, or give another template with --chat_template_path."
            )
    return whole.spans
