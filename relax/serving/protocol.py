"""Requests of OpenAI's API: reads and checks the fields of a body.

A field that is not known, or asks for something that is not computed, is refused by name: nothing
is ignored but what says nothing about the answer (`user`, `metadata`, `store`, ...).
"""

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

from relax.serving.errors import ApiError

MAX_STOPS, MAX_CHOICES, MAX_PROMPTS, MAX_TOP_LOGPROBS = 4, 128, 128, 20
# Fields about the caller, which never change an answer.
_SILENT = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier")
# Fields of which one value alone is possible.
_ONLY: dict[str, tuple[Callable[[Any], bool], str]] = {
    "presence_penalty": (lambda v: v == 0, "0"),
    "frequency_penalty": (lambda v: v == 0, "0"),
    "logit_bias": (lambda v: v == {}, "empty"),
    "best_of": (lambda v: v == 1, "1"),
    "suffix": (lambda v: v == "", "empty"),
    "response_format": (lambda v: v == {"type": "text"}, '{"type": "text"}'),
    "parallel_tool_calls": (lambda v: v is True, "true"),
    "modalities": (lambda v: v == ["text"], '["text"]'),
}


@dataclasses.dataclass(frozen=True)
class SamplingFields:
    """How completions are sampled, and what is asked of the answer.

    Attributes:
      max_tokens: maximum tokens of a completion; None: as many as fit.
      alternatives: most likely tokens to give beside each token; None: no log-probabilities.
    """

    model: str | None
    max_tokens: int | None
    temperature: float
    top_p: float
    n: int
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    alternatives: int | None


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A request to `/v1/chat/completions`."""

    messages: list[dict]
    tools: list[dict]
    template_kwargs: dict
    sampling: SamplingFields


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """A request to `/v1/completions`; each prompt is a text or a list of token ids."""

    prompts: list[str] | list[list[int]]
    echo: bool
    sampling: SamplingFields


def read_body(raw: bytes) -> dict:
    """Parses a body of JSON.

    Raises:
      ApiError: it is no JSON object.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body must be JSON: {error}.") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be an object, got {_shown(body)}.")
    return body


class _Fields:
    """Takes fields out of a body one by one; null counts as absent."""

    def __init__(self, body: dict):
        self.body = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str, kind: type | tuple[type, ...], what: str, default=None):
        if name not in self.body:
            return default
        value = self.body.pop(name)
        # bool is an int in Python.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise _wrong(name, what, value)
        return value

    def number(self, name: str, default, low, high, kind=(int, float)):
        what = f"{'an integer' if kind is int else 'a number'} from {low} to {high}"
        value = self.take(name, kind, what, default)
        if value is not None and not low <= value <= high:
            raise _wrong(name, what, value)
        return value

    def end(self) -> None:
        """Refuses what is left."""
        for name in _SILENT:
            self.body.pop(name, None)
        for name, (holds, what) in _ONLY.items():
            value = self.body.pop(name, None)
            if value is not None and not holds(value):
                raise ApiError(400, f"{name} must be {what} here, got {_shown(value)}.", name)
        for name in self.body:
            raise ApiError(400, f"{name!r} is not a field that this endpoint knows.", name)


def read_chat(body: dict) -> ChatRequest:
    """Reads a request to `/v1/chat/completions`.

    Raises:
      ApiError: a field is missing, wrong or unknown.
    """
    fields = _Fields(body)
    messages = fields.take("messages", list, "a list of messages")
    if not messages:
        raise ApiError(400, "messages must hold at least one message.", "messages")
    tools = fields.take("tools", list, "a list of tools", [])
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            what = 'an object {"type": "function", "function": {"name": ...}}'
            raise _wrong(f"tools[{i}]", what, tool)
    choice = fields.take("tool_choice", (str, dict), "auto or none", "auto")
    if choice not in ("auto", "none"):
        message = f"tool_choice must be auto or none here, got {_shown(choice)}."
        raise ApiError(400, message, "tool_choice")
    kwargs = fields.take("chat_template_kwargs", dict, "an object", {})
    asked = fields.take("logprobs", bool, "true or false", False)
    top = fields.number("top_logprobs", None, 0, MAX_TOP_LOGPROBS, int)
    if top is not None and not asked:
        raise ApiError(400, "top_logprobs needs logprobs true.", "top_logprobs")
    most = fields.number("max_completion_tokens", None, 1, 2**31 - 1, int)
    legacy = fields.number("max_tokens", None, 1, 2**31 - 1, int)
    if most is not None and legacy is not None:
        message = "max_tokens and max_completion_tokens are the same: give one."
        raise ApiError(400, message, "max_tokens")
    sampling = _sampling(fields, most or legacy, (top or 0) if asked else None)
    fields.end()
    return ChatRequest(messages, tools if choice == "auto" else [], kwargs, sampling)


def read_completion(body: dict) -> CompletionRequest:
    """Reads a request to `/v1/completions`; errors as for `read_chat`."""
    fields = _Fields(body)
    prompt = fields.take("prompt", (str, list), "a text, token ids, or a list of them")
    prompts = [prompt] if isinstance(prompt, str) or _is_ids(prompt) else prompt
    if not prompts or not (all(isinstance(p, str) for p in prompts) or all(map(_is_ids, prompts))):
        raise _wrong("prompt", "a text, token ids, or a list of them", prompt)
    if len(prompts) > MAX_PROMPTS:
        raise ApiError(400, f"there may be {MAX_PROMPTS} prompts, got {len(prompts)}.", "prompt")
    echo = fields.take("echo", bool, "true or false", False)
    most = fields.number("max_tokens", 16, 0 if echo else 1, 2**31 - 1, int)
    top = fields.number("logprobs", None, 0, MAX_TOP_LOGPROBS, int)
    sampling = _sampling(fields, most, top)
    fields.end()
    if echo and sampling.stream:
        raise ApiError(400, "echo is not possible with stream.", "echo")
    return CompletionRequest(prompts, echo, sampling)


def _sampling(fields: _Fields, max_tokens: int | None, alternatives: int | None) -> SamplingFields:
    stop = fields.take("stop", (str, list), "a text or a list of texts", [])
    stops = [stop] if isinstance(stop, str) else stop
    if len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise _wrong("stop", f"at most {MAX_STOPS} texts that are not empty", stop)
    top_p = fields.number("top_p", 1.0, 0, 1)
    if top_p == 0:
        raise _wrong("top_p", "above 0", top_p)
    stream = fields.take("stream", bool, "true or false", False)
    options = fields.take("stream_options", dict, "an object", {})
    if options and not stream:
        raise ApiError(400, "stream_options needs stream true.", "stream_options")
    if unknown := set(options) - {"include_usage", "include_obfuscation"}:
        message = f"stream_options has no field {min(unknown)!r}."
        raise ApiError(400, message, "stream_options")
    for name, value in options.items():
        if not isinstance(value, bool):
            raise _wrong(f"stream_options.{name}", "true or false", value)
    return SamplingFields(
        model=fields.take("model", str, "a text"),
        max_tokens=max_tokens,
        temperature=float(fields.number("temperature", 1.0, 0, 2)),
        top_p=float(top_p),
        n=fields.number("n", 1, 1, MAX_CHOICES, int),
        seed=fields.number("seed", None, -(2**63), 2**63 - 1, int),
        stop=tuple(stops),
        stream=stream,
        include_usage=options.get("include_usage", False),
        alternatives=alternatives,
    )


def _is_ids(value) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(i, int) and not isinstance(i, bool) for i in value)


def _wrong(name: str, what: str, value) -> ApiError:
    return ApiError(
        400, f"{name} must be {what}, got {_shown(value)}.", re.split(r"[\[.]", name)[0]
    )


def _shown(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
