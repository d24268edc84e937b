"""Answers of OpenAI's API, as objects and as the chunks of a stream."""

import hashlib
import json
import secrets
import time
from collections.abc import Sequence

from relax.data.call_text import whole
from relax.data.tool_calls import parse_tool_calls
from relax.serving.text import INCOMPLETE, TextStream, TokenText

FINISH = {"eos": "stop", "stop": "stop", "length": "length"}


class Reply:
    """A completion of a chat or a text, and the fields of its choice.

    Args:
      text: texts of tokens.
      stop: stop strings of the request.
      alternatives: as in `SamplingFields`.
      format: of tool calls, see `relax.data.tool_calls`; None: none may be called.
      tools: their schemas.
    """

    def __init__(
        self,
        text: TokenText,
        stop: Sequence[str] = (),
        alternatives: int | None = None,
        format: str | None = None,
        tools: Sequence[dict] = (),
    ):
        self.text, self.stop, self.alternatives = text, stop, alternatives
        self.format, self.tools = format, tools
        self.stream = TextStream(text, stop, format)
        self.values: dict[str, list] = {}
        self.reason = ""

    def add(self, values: dict[str, list], reason: str | None) -> None:
        """Adds the tokens of a piece."""
        for name, new in values.items():
            self.values.setdefault(name, []).extend(new)
        self.reason = reason or ""

    @property
    def tokens(self) -> list[int]:
        return self.values.get("tokens", [])

    def message(self, call_id: str) -> tuple[dict, str]:
        """The message of a chat, and the finish reason.

        Args:
          call_id: what the ids of tool calls are made from.
        """
        content, finish = self.text.text(self.tokens, self.stop), FINISH[self.reason]
        if self.format is None:
            return {"role": "assistant", "content": content}, finish
        raw = self.text.text(self.tokens, self.stop, special=True)
        turn = parse_tool_calls(raw, self.format, self.tools)
        if turn.errors or (turn.calls and not self.tools):  # the text as it is says most
            return {"role": "assistant", "content": raw}, finish
        thoughts = {"reasoning_content": turn.thoughts} if turn.thoughts else {}
        if not turn.calls:
            content = turn.content if self.format == "gpt_oss" else content
            return {"role": "assistant", "content": content} | thoughts, finish
        calls = [
            {
                "id": _call_id(call_id, i),
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": json.dumps(call.arguments, ensure_ascii=False),
                },
            }
            for i, call in enumerate(turn.calls)
        ]
        beside = self.text.visible(turn.content).strip() or None
        message = {"role": "assistant", "content": beside, "tool_calls": calls} | thoughts
        return message, "tool_calls"

    def chat_logprobs(self, first: int = 0) -> dict | None:
        """Log-probabilities of the tokens from `first` on, in the form of chats."""
        if self.alternatives is None:
            return None
        return {"content": [self._chat_token(i) for i in self._visible(first)], "refusal": None}

    def text_logprobs(self, offset: int, first: int = 0) -> dict | None:
        """The same in the form of texts; the first token begins at character `offset`."""
        if self.alternatives is None:
            return None
        names = [self.text.of_token(self.tokens[i]) for i in self._visible(0)]
        offsets = [offset + sum(map(len, names[:i])) for i in range(first, len(names))]
        shown = self._visible(first)
        return {
            "tokens": names[first:],
            "token_logprobs": [self.values["logprobs"][i] for i in shown],
            # Of tokens with one text, parts of characters, the most likely one is given.
            "top_logprobs": [dict(self._top(i)[::-1]) for i in shown]
            if self.alternatives
            else None,
            "text_offset": offsets,
        }

    def _visible(self, first: int) -> range:
        return range(first, len(self.text.without_eos(self.tokens)))

    def _chat_token(self, i: int) -> dict:
        found = self._token(self.text.of_token(self.tokens[i]), self.values["logprobs"][i])
        return found | {"top_logprobs": [self._token(*pair) for pair in self._top(i)]}

    def _top(self, i: int) -> list[tuple[str, float]]:
        if not self.alternatives:
            return []
        pairs = zip(self.values["top_tokens"][i], self.values["top_logprobs"][i], strict=True)
        return [(self.text.of_token(token), value) for token, value in pairs][: self.alternatives]

    @staticmethod
    def _token(text: str, logprob: float) -> dict:
        found = None if INCOMPLETE in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": found}


def _call_id(completion: str, index: int) -> str:
    """An id of nine letters and digits, as Mistral's templates demand."""
    return hashlib.sha256(f"{completion}/{index}".encode()).hexdigest()[:9]


def header(kind: str, object: str, model: str) -> dict:
    """The fields with which every answer begins."""
    made = {"id": f"{kind}-{secrets.token_hex(12)}", "object": object}
    return made | {"created": int(time.time()), "model": model}


def usage(prompt_tokens: int, reused: int, replies: Sequence[Reply]) -> dict:
    """Numbers of tokens, of which `reused` ones of prompts were not computed; end tokens count."""
    sampled = sum(len(reply.values.get("tokens", ())) for reply in replies)
    total = prompt_tokens + sampled
    made = {"prompt_tokens": prompt_tokens, "completion_tokens": sampled, "total_tokens": total}
    return made | {"prompt_tokens_details": {"cached_tokens": reused}}


def encoded(body: dict) -> bytes:
    """JSON of a body; what clients and models write may hold halves of surrogate pairs."""
    return whole(json.dumps(body, ensure_ascii=False)).encode()


def event(body: dict | str) -> bytes:
    """A server-sent event."""
    data = body.encode() if isinstance(body, str) else encoded(body)
    return b"data: " + data + b"\n\n"
