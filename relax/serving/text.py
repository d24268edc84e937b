"""Text of sampled tokens: as a whole, and piece by piece while they arrive."""

import functools
from collections.abc import Sequence

from relax.data.tool_calls import TOOL_FORMATS, parse_tool_calls

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decoders give for a part of a character


class TokenText:
    """The texts of a tokenizer's tokens.

    Args:
      eos_token_ids: tokens that end a completion, which are no part of its text.
    """

    def __init__(self, tokenizer, eos_token_ids: Sequence[int]):
        self.tokenizer, self.eos = tokenizer, frozenset(eos_token_ids)
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._anchor_text = tokenizer.decode(self._anchor)
        self.of_token = functools.lru_cache(maxsize=65536)(self._of_token)

    def without_eos(self, ids: Sequence[int]) -> list[int]:
        return [*ids[:-1]] if ids and ids[-1] in self.eos else [*ids]

    def text(self, ids: Sequence[int], stop: Sequence[str] = (), *, special: bool = False) -> str:
        """The text of a completion before its end token, or before the first stop string."""
        ids = self.without_eos(ids)
        text = self.tokenizer.decode(ids, skip_special_tokens=not special)
        found = [place for string in stop if (place := text.find(string)) >= 0]
        return text[: min(found)] if found else text

    def visible(self, text: str) -> str:
        """A text without special tokens."""
        for token in self.tokenizer.all_special_tokens:
            text = text.replace(token, "")
        return text

    def _of_token(self, token: int) -> str:
        # Behind another token, since decoders strip the space that begins a text.
        text = self.tokenizer.decode([*self._anchor, token])
        return text.removeprefix(self._anchor_text)


class TextStream:
    """The text of a completion in pieces, none of which is taken back.

    Held back are incomplete characters, what may become a stop string, and, where tools may be
    called, what may be a call.
    """

    def __init__(self, text: TokenText, stop: Sequence[str], format: str | None):
        self.text, self.stop = text, tuple(stop)
        self.format = None if format is None else TOOL_FORMATS[format]
        self.channels = format == "gpt_oss"
        self.ids: list[int] = []
        self.sent = ""

    def feed(self, ids: Sequence[int]) -> str:
        """The text that new tokens complete."""
        self.ids += ids
        if self.channels:
            return self._send(self._final())
        text = self.text.text(self.ids, self.stop).rstrip(INCOMPLETE)
        held = self.stop
        if self.format is not None:
            if self._has_begun():
                return ""
            held = (*held, self.format.begins)
        return self._send(text[: len(text) - _overlap(text, held)])

    def end(self, content: str) -> str:
        """The rest of the content, beside the calls."""
        # Content beside calls is stripped, and what has been sent may not be.
        sent = self.sent if content.startswith(self.sent) else self.sent.strip()
        return content[len(sent) :] if content.startswith(sent) else ""

    def _final(self) -> str:
        """The content of a turn in channels, as far as it is certain."""
        text = self.text.text(self.ids, self.stop, special=True).rstrip(INCOMPLETE)
        begun = text.rfind("<|message|>")
        header = text.find("<|start|>", begun + 1)  # of a message that has no text yet
        if begun < 0:
            return ""
        turn = parse_tool_calls(text[:header] if header >= 0 else text, "gpt_oss")
        if turn.calls or turn.errors:
            return self.sent
        return turn.content[: len(turn.content) - _overlap(turn.content, self.stop)]

    def _has_begun(self) -> bool:
        """Whether a call may have begun."""
        assert self.format is not None
        text = self.text.text(self.ids, self.stop, special=True)
        if self.format.begins == "{":  # the turn as a whole is a call or none
            return text.lstrip()[:1] in ("{", "<", "")
        return self.format.begins in text

    def _send(self, text: str) -> str:
        new = text[len(self.sent) :]
        self.sent = max(self.sent, text, key=len)
        return new


def _overlap(text: str, strings: Sequence[str]) -> int:
    """Length of the longest end of a text with which one of the strings begins.

    >>> _overlap("a\\n\\nEN", ["END"])
    2
    """
    lengths = range(1, 1 + max(map(len, strings), default=0))
    return max((n for n in lengths if any(text.endswith(s[:n]) for s in strings)), default=0)
