"""The assistant's turns in a rendered conversation, for any chat template.

A turn begins behind the prompt that the template gives for generating it, and ends with the token
that ends generation. Both places are found by rendering, in one of two ways:

- By beginnings: `messages[:i]` with the generation prompt ends where turn i begins, and
  `messages[:i + 1]` ends where it ends, if the whole text begins with both.
- By a sentinel, where the template writes the last message or earlier turns in another way: a
  message's text is replaced in the whole and in a part, and what surrounds it is compared.

A turn for which neither is conclusive is refused, with the place where the two texts part.
"""

import re
from collections.abc import Sequence

from relax.data.templates import ChatRenderer, Job, Rendered, Variant
from relax.data.turn_probe import (
    FURTHER,
    HEADER,
    SENTINEL,
    Probe,
    Tokens,
    Turn,
    common,
    one_of,
    undivided,
)
from relax.errors import DataError

_FEW = 3  # turns of a row that are rendered one by one


class TurnFinder:
    """Finds the assistant's turns in rendered conversations.

    Args:
      renderer: renders with the chat template.
      tokens: texts of the tokenizer's added tokens; none is divided.
      ending: texts of those that may end a turn.
    """

    def __init__(self, renderer: ChatRenderer, tokens: Sequence[str], ending: Sequence[str]):
        self.renderer = renderer
        self.tokens = Tokens(one_of(tokens), one_of(ending))
        self.run = re.compile(rf"(?:(?:{self.tokens.all.pattern})\s*)+\Z")

    def find(self, jobs: Sequence[Job]) -> list[tuple[Rendered, list[Turn]]]:
        """The rendered text of each job with its turns, in order, which do not overlap.

        Raises:
          DataError: the template refuses a conversation, or a turn cannot be told from its text.
        """
        places = [_assistants(job) for job in jobs]
        variants = [
            _alike(job.messages, where) if len(where) > _FEW else _parts(job.messages, where)
            for job, where in zip(jobs, places, strict=True)
        ]
        rendered = self.renderer.render(jobs, spans=True, variants=variants)
        probes = [
            probe
            for job, where, whole in zip(jobs, places, rendered, strict=True)
            for probe in self._probes(job, where, whole)
        ]
        for names in FURTHER:
            self._ask([probe for probe in probes if not probe.is_found], names)
        turns = iter([probe.turn() for probe in probes])
        made = []
        for job, where, whole in zip(jobs, places, rendered, strict=True):
            ordered = [self._to_end_token(job, whole.text, next(turns)) for _ in where]
            _check_order(job, ordered)
            made.append((whole, ordered))
        return made

    def _probes(self, job: Job, where: list[int], whole: Rendered) -> list[Probe]:
        """A probe of each turn, with what the first request has told of it."""
        probes = [Probe(self.tokens, job, i, whole.text) for i in where]
        if len(where) > _FEW:
            found = self._all_alike(job.messages, where, whole)
            for probe in probes:
                probe.start, probe.end = found.get(probe.i, (None, None))
            return probes
        texts = iter(whole.variants)
        for probe in probes:
            asked = next(texts)
            is_last = probe.i + 1 == len(job.messages)
            probe.look({"asked": asked, "last": whole.text if is_last else next(texts)})
        return probes

    def _all_alike(self, messages, where, whole: Rendered) -> dict[int, tuple[int, int]]:
        """Turns of a long row that begin and end as its last one does, by two renderings in all.

        With a sentinel in every text, the pieces between them must be those of the whole text. A
        turn is found if the piece before it ends with the generation prompt, and the piece behind
        it begins as the text ends behind the last turn.
        """
        marked, asked = whole.variants
        plain = [i for i in where if _is_plain(messages[i])]
        if marked is None or asked is None or plain[-1:] != [len(messages) - 1]:
            return {}
        text = whole.text
        prompt = asked[undivided(self.tokens.all, asked, common(asked, text)) :]
        pieces = re.split(rf"{SENTINEL}\d+e", marked)
        if not prompt or len(pieces) != len(plain) + 1 or not all(pieces):
            return {}
        place, found = 0, {}
        for i, piece, following in zip(plain, pieces, pieces[1:], strict=False):
            if not text.startswith(piece, place):
                return {}
            start = place + len(piece)
            content = messages[i]["content"]
            ways = [c for c in (content, content.strip()) if text.startswith(c + following, start)]
            if not ways:
                return {}
            place = start + len(ways[0])
            if piece.endswith(prompt) and following.startswith(pieces[-1]):
                found[i] = (start, place + len(pieces[-1]))
        return found if text[place:] == pieces[-1] else {}

    def _ask(self, probes: list[Probe], names: Sequence[str]) -> None:
        """Renders what the probes lack, and looks again."""
        probes = [probe for probe in probes if probe.lacking(names)]
        wanted = [probe.lacking(names) for probe in probes]
        variants = [[v for _, v in some] for some in wanted]
        texts = self.renderer.parts([probe.job for probe in probes], variants)
        for probe, some, found in zip(probes, wanted, texts, strict=True):
            probe.look(dict(zip((name for name, _ in some), found, strict=True)))

    def _to_end_token(self, job: Job, text: str, turn: Turn) -> Turn:
        """The turn up to its end token and the line break that the template writes behind it."""
        self._check_tail(job, text, turn)
        *_, last = [None, *self.tokens.ending.finditer(text, turn.start, turn.end)]
        if last and not text[last.end() : turn.end].strip():
            end = last.end() + text.startswith("\n", last.end(), turn.end)
            return turn._replace(end=end)
        # Without an end token of its own (GLM), a turn ends with the token that begins the next.
        after = job.messages[turn.message + 1 : turn.message + 2]
        following = self.tokens.ending.match(text, turn.end)
        if following and after and after[0].get("role") != "assistant":
            return turn._replace(end=following.end())
        return turn

    def _check_tail(self, job: Job, text: str, turn: Turn) -> None:
        """Refuses a turn that ends with the header of another one, which some templates append."""
        header = text[max(0, turn.start - HEADER) : turn.start]
        tail = text[max(turn.start, turn.end - HEADER) : turn.end]
        repeated = header[len(header) - common(header[::-1], tail[::-1]) :]
        token = self.tokens.all.search(repeated)
        *_, one, two = [None, None, *self.tokens.all.finditer(tail)]
        if token and repeated[token.end() :].strip():
            found = repeated[token.start() :]
        elif one and two and not (tail[one.end() : two.start()] + tail[two.end() :]).strip():
            found = tail[one.start() : two.end()]
            run = self.run.search(header)
            if run is None or found not in run[0]:
                return
        else:
            return
        raise DataError(
            f"{job.where}: the chat template writes {found!r} both before and behind "
            f"messages[{turn.message}] of the assistant, so its end cannot be told: use prompt "
            "and completion columns, or another template (--chat_template_path)."
        )


def _assistants(job: Job) -> list[int]:
    return [i for i, message in enumerate(job.messages) if message.get("role") == "assistant"]


def _parts(messages: list[dict], where: list[int]) -> list[Variant]:
    """What comes before each turn, and up to its end; the whole is the text up to the last one."""
    made = []
    for i in where:
        made += [Variant(i, True), Variant(i + 1)][: 1 + (i + 1 < len(messages))]
    return made


def _alike(messages: list[dict], where: list[int]) -> list[Variant]:
    """A sentinel in each text of the assistant, and the generation prompt behind the whole."""
    plain = [i for i in where if _is_plain(messages[i])]
    changed = ((i, {**messages[i], "content": f"{SENTINEL}{i}e"}) for i in plain)
    return [Variant(len(messages), changed=tuple(changed)), Variant(len(messages), True)]


def _is_plain(message: dict) -> bool:
    """Whether a message has nothing but a text, without thoughts."""
    content = message.get("content")
    others = any(v is not None for k, v in message.items() if k not in ("role", "content"))
    return isinstance(content, str) and "</think>" not in content and not others


def _check_order(job: Job, turns: list[Turn]) -> None:
    for one, other in zip(turns, turns[1:], strict=False):
        if other.start < one.end:
            raise DataError(
                f"{job.where}: messages[{one.message}] and messages[{other.message}] overlap in "
                "the rendered text, so the assistant's words cannot be told: give another "
                "template with --chat_template_path."
            )
