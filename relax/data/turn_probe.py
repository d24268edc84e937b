"""One assistant's turn in a rendered conversation, found by comparing renderings."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from relax.data.templates import Job, Variant
from relax.errors import DataError

SENTINEL = "relaxq7zsentinel"  # letters and digits only, which no template trims or escapes
HEADER = 200  # characters that a turn's header has at most
_THOUGHT = re.compile(r".*</think>\s*", re.DOTALL)
_SHOWN = 40  # characters of a text in a message


class Turn(NamedTuple):
    """Characters of one assistant message: those that the model generates."""

    message: int
    start: int
    end: int


class Tokens(NamedTuple):
    """Patterns of a tokenizer's added tokens: of all, and of those that may end a turn."""

    all: re.Pattern
    ending: re.Pattern


# Renderings, in this order as far as a turn needs them: for both places, for its beginning, for its
# end, and for its beginning where earlier turns are rewritten.
FURTHER = (
    ("asked", "last"),
    ("bare",),
    ("own", "own last"),
    ("before", "before asked", "before bare", "own", "own last", "asked again"),
)


class Probe:
    """The turn of message i in the whole text, by other renderings.

    Attributes:
      texts: renderings by name: `asked`, `messages[:i]` with the generation prompt; `last`,
        `messages[:i + 1]`; and those of `_variants`. One that the template refuses is missing.
    """

    def __init__(self, tokens: Tokens, job: Job, i: int, text: str):
        self.tokens, self.job, self.i, self.text = tokens, job, i, text
        self.texts: dict[str, str] = {}
        self.start: int | None = None
        self.end: int | None = None

    @property
    def is_found(self) -> bool:
        return self.start is not None and self.end is not None and self.start < self.end

    def lacking(self, names: Sequence[str]) -> list[tuple[str, Variant]]:
        """The renderings of these names that may help, and are not there."""
        known = _variants(self.job.messages, self.i)
        return [
            (name, known[name])
            for name in names
            if name in known
            and name not in self.texts
            and (self.start is None or name in ("last", "own", "own last"))
        ]

    def look(self, texts: dict[str, str | None]) -> None:
        """Finds what more texts tell; None is one that the template refuses."""
        self.texts |= {name: text for name, text in texts.items() if text is not None}
        if self.start is None:
            self.start = self._find_start()
        if self.start is not None and (self.end is None or self.end <= self.start):
            self.end = self._find_end(self.start)

    def turn(self) -> Turn:
        """The turn; raises DataError if it is not found."""
        if self.start is None or self.end is None or self.end <= self.start:
            raise self._not_found()
        return Turn(self.i, self.start, self.end)

    def _find_start(self) -> int | None:
        """Where the turn begins: behind what the generation prompt and the whole text share."""
        texts = self.texts
        asked = texts.get("asked")
        if asked is not None and self.text.startswith(asked):
            return len(asked)
        found = None
        if asked is not None and "bare" in texts:
            found = self._behind_prompt(0, asked, texts["bare"])
        if found is None and texts.keys() >= {"before", "before asked", "before bare"}:
            _, original = _with_sentinel(self.job.messages[self.i - 1])
            at = _behind(self.text, texts["before"], original)
            asked = _tail(texts["before asked"], original)
            bare = _tail(texts["before bare"], original)
            if at is not None and asked is not None and bare is not None:
                found = self._behind_prompt(at, asked, bare)
        if found is None and texts.keys() >= {"own", "last", "asked again"}:
            # The text before its own is a generation prompt.
            again = texts["asked again"]
            prompt = again[undivided(self.tokens.all, again, common(again, texts["last"])) :]
            head = texts["own"].partition(SENTINEL)[0]
            if prompt and head.endswith(prompt) and self.text.startswith(head):
                found = len(head)
        return found

    def _behind_prompt(self, at: int, asked: str, bare: str) -> int | None:
        """Where the text from `at` and a prompt part, if not before the generation prompt."""
        given, tokens = self.text[at:], self.tokens.all
        shared = common(given, asked)
        own = common(asked, bare)  # before the generation prompt
        if own < shared < len(asked):
            shared = min(undivided(tokens, given, shared), undivided(tokens, asked, shared))
            if shared > own and (asked[shared - 1] + asked[shared]).isalnum():
                return None  # in the middle of a word
        return at + shared if shared >= own else None

    def _find_end(self, start: int) -> int | None:
        """Where the turn ends: behind what follows its text, whether or not it is the last."""
        texts, message = self.texts, self.job.messages[self.i]
        end = self._end_of(texts["last"]) if "last" in texts else None
        if end is not None and end > start:
            return end
        if "own" not in texts:
            return None
        _, original = _with_sentinel(message)
        at = _behind(self.text, texts["own"], original)
        if at is None or at < start:
            return None
        tail = _tail(texts.get("own last"), original)
        if tail and self.text.startswith(tail, at):
            return at + len(tail)
        # The last message may end in another way, as with <|return|> in place of <|end|>.
        follows = self.tokens.ending.match(self.text, at)
        if not follows or message.get("tool_calls"):
            return None
        end = follows.end() + self.text.startswith("\n", follows.end())
        shared = common(self.text[at:], tail or "")
        return end if at + undivided(self.tokens.all, self.text[at:], shared) <= end else None

    def _end_of(self, upto: str) -> int | None:
        """The length of a beginning of the whole text, but for tokens at its end (Phi 3)."""
        if self.text.startswith(upto):
            return len(upto)
        end = undivided(self.tokens.all, self.text, common(upto, self.text))
        shared = upto[max(0, end - HEADER) : end].rstrip("\n")
        *_, last = [None, *self.tokens.ending.finditer(shared)]
        ends = last is not None and last.end() == len(shared)
        return end if ends and not self.tokens.all.sub("", upto[end:]).strip() else None

    def _not_found(self) -> DataError:
        i, whole = self.i, self.text
        reason = f"it writes nothing for messages[{i}], or refuses its beginning"
        for name, which in (("asked", "the prompt of"), ("last", "the text up to")):
            text = self.texts.get(name)
            if text is not None and not whole.startswith(text):
                place = common(text, whole)
                shown = [repr(t[place : place + _SHOWN]) for t in (text, whole)]
                reason = (
                    f"{which} messages[{i}] and the whole part at character {place}, "
                    f"{shown[0]} and {shown[1]}"
                )
                break
        return DataError(
            f"{self.job.where}: the chat template does not show where messages[{i}] of the "
            f"assistant begins and ends: {reason}. Use prompt and completion columns, or a "
            "template with {% generation %} marks (--chat_template_path)."
        )


def _variants(messages: list[dict], i: int) -> dict[str, Variant]:
    """Renderings that show turn i: with a sentinel in it, or in the message before it."""
    own = ((i, _with_sentinel(messages[i])[0]),)
    made = {
        "asked": Variant(i, True),
        "last": Variant(i + 1),
        "own": Variant(len(messages), changed=own),
        "own last": Variant(i + 1, changed=own),
        "asked again": Variant(i + 1, True),
    }
    if i:
        before = ((i - 1, _with_sentinel(messages[i - 1])[0]),)
        made |= {
            "bare": Variant(i),
            "before": Variant(len(messages), changed=before),
            "before asked": Variant(i, True, before),
            "before bare": Variant(i, changed=before),
        }
    return made


def _with_sentinel(message: dict) -> tuple[dict, str]:
    """The message with the sentinel in its last text: a call's name, or content behind thoughts."""
    calls = message.get("tool_calls")
    if calls:
        *others, last = calls
        function = last.get("function", last)
        named = {**function, "name": SENTINEL}
        changed = {**last, "function": named} if "function" in last else named
        return {**message, "tool_calls": [*others, changed]}, function.get("name") or ""
    content = message.get("content") or ""
    thought = _THOUGHT.match(content) if message.get("role") == "assistant" else None
    kept = thought.end() if thought else 0
    return {**message, "content": content[:kept] + SENTINEL}, content[kept:]


def _behind(text: str, whole: str, original: str) -> int | None:
    """The place in the text behind that of the sentinel, if nothing else differs.

    >>> _behind("<a>Hi<b>", f"<a>{SENTINEL}<b>", "Hi")
    5
    """
    head, _, tail = whole.partition(SENTINEL)
    tail = tail.replace(SENTINEL, original)  # results of a tool may repeat its name
    fits = len(head) + len(tail) <= len(text) and text.startswith(head) and text.endswith(tail)
    return len(text) - len(tail) if fits else None


def _tail(text: str | None, original: str) -> str | None:
    if text is None or SENTINEL not in text:
        return None
    return text.partition(SENTINEL)[2].replace(SENTINEL, original)


def common(one: str, other: str) -> int:
    """The number of characters that both texts begin with."""
    most = min(len(one), len(other))
    return bisect_left(range(most), True, key=lambda n: one[: n + 1] != other[: n + 1])


def undivided(tokens: re.Pattern, text: str, place: int) -> int:
    """The place, or the beginning of the token that it divides."""
    for match in tokens.finditer(text, max(0, place - HEADER)):
        if match.start() >= place:
            break
        if match.end() > place:
            return match.start()
    return place


def one_of(texts: Sequence[str]) -> re.Pattern:
    """The pattern of any of the texts, the longest first."""
    ordered = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
