"""Chat templates: render conversations as text, within limits; the only place that does so.

transformers renders in its sandbox; a separate process bounds time, memory and output, which no
sandbox does (`relax.data.template_process`).
"""

import functools
import json
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from relax.data.limits import DEFAULT, Limits
from relax.data.template_process import results
from relax.data.thoughts import REASONING
from relax.errors import ConfigError, DataError

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_BATCH = 64  # conversations per request
# Arguments that a row's chat_template_kwargs may not set, since they follow from the data.
_OWN = (
    "chat_template",
    "messages",
    "conversations",
    "tools",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "return_assistant_tokens_mask",
    "variants",
    "variants_only",
)


def require_template(tokenizer, what: str, eos_token: str | None = None) -> None:
    """Refuses conversations without a chat template, or with an end token that it does not write.

    Args:
      what: the rows, for the message.
      eos_token: the end token that is asked for.

    Raises:
      DataError: the tokenizer has no template.
      ConfigError: `eos_token` is not the tokenizer's.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{what} need a chat template and the tokenizer has none: give one with "
            "--chat_template_path (a .jinja file or a tokenizer directory)."
        )
    if eos_token and eos_token != tokenizer.eos_token:
        raise ConfigError(
            "eos_token ends plain texts; conversations end as the chat template says: "
            "give another one with --chat_template_path."
        )


class Job(NamedTuple):
    """A conversation to render.

    Attributes:
      messages: messages whose content is text.
      row: row whose `tools` and `chat_template_kwargs` are passed to the template.
      where: the row's place, for errors.
      add_generation_prompt: end with the header of the assistant's turn.
    """

    messages: list[dict]
    row: dict
    where: str
    add_generation_prompt: bool = False


class Variant(NamedTuple):
    """Another rendering of a job's conversation.

    Attributes:
      upto: number of its first messages that are rendered.
      add_generation_prompt: end with the header of the assistant's turn.
      changed: messages in place of others, by their index.
    """

    upto: int
    add_generation_prompt: bool = False
    changed: tuple[tuple[int, dict], ...] = ()


class Rendered(NamedTuple):
    """A rendered conversation.

    Attributes:
      text: the text.
      spans: the characters within {% generation %} blocks.
      variants: the text of each variant, or None where the template refuses it.
    """

    text: str
    spans: list[tuple[int, int]]
    variants: list[str | None]


class ChatRenderer:
    """Renders conversations with one tokenizer's template.

    Attributes:
      dropped: kinds of content that the template omits ("tool_calls", "tools", "reasoning_content",
        "system messages", ...), each with the places of its rows.
      ended: places of the rows whose prompt ends with a message of the assistant.
    """

    def __init__(self, tokenizer, limits: Limits = DEFAULT):
        self.tokenizer, self.limits = tokenizer, limits
        self.dropped: dict[str, set[str]] = {}
        self.ended: set[str] = set()
        self._takes_parts: bool | None = None

    def texts(self, jobs: Sequence[Job]) -> list[str]:
        """The rendered text of each job.

        Raises:
          DataError: the template refuses a conversation, or exceeds a limit.
        """
        return [rendered.text for rendered in self.render(jobs)]

    def render(
        self,
        jobs: Sequence[Job],
        *,
        spans: bool = False,
        variants: Sequence[Sequence[Variant]] = (),
    ) -> list[Rendered]:
        """As `texts`, with the spans of assistant text if `spans` is true, and each job's variants.

        Args:
          variants: those of each job, or empty.
        """
        made = []
        for first in range(0, len(jobs), _BATCH):
            some = jobs[first : first + _BATCH]
            others = variants[first : first + _BATCH] or [()] * len(some)
            requests = [self._request(*pair, spans) for pair in zip(some, others, strict=True)]
            # A job that exceeds a limit is the last one answered, and is refused.
            for i, result in enumerate(results(requests, self.limits)):
                job = some[i]
                if _wants_text_arguments(result, job):
                    (result,) = results([_with_texts(requests[i])], self.limits)
                text = _checked(result, job.where, self.limits)
                found = [_variant_text(text, other) for other in result.get("variants", ())]
                made.append(Rendered(text, [tuple(span) for span in result["spans"]], found))
                for name in _left_out(job, text):
                    self.dropped.setdefault(name, set()).add(job.where)
                if job.add_generation_prompt and job.messages[-1].get("role") == "assistant":
                    self.ended.add(job.where)
        return made

    def parts(
        self, jobs: Sequence[Job], variants: Sequence[Sequence[Variant]]
    ) -> list[list[str | None]]:
        """The text of each variant of each job, or None where the template refuses it."""
        made = []
        for first in range(0, len(jobs), _BATCH):
            some = slice(first, first + _BATCH)
            pairs = zip(jobs[some], variants[some], strict=True)
            requests = [self._request(*pair, False) | {"variants_only": True} for pair in pairs]
            for job, request, result in zip(
                jobs[some], requests, results(requests, self.limits), strict=False
            ):
                if _wants_text_arguments(result, job):
                    (result,) = results([_with_texts(request)], self.limits)
                _checked(result, job.where, self.limits)
                made.append([_variant_text("", other) for other in result["variants"]])
        return made

    def has_marks(self, job: Job) -> bool:
        """Whether the template that renders the job marks the assistant's words."""
        return _has_marks(self._template(job))

    def notes(self) -> tuple[str, ...]:
        """Warnings: content that the template omits, prompts that end with an assistant's turn."""
        ended = (
            f"the prompts of {len(self.ended):,} rows end with a message of the assistant, which "
            "is complete: a completion begins a new one"
        )
        return tuple(
            f"the chat template does not render the {name} of {len(places):,} rows: "
            f"first {min(places, key=_natural)}. They are not trained on; another template is "
            "given with --chat_template_path"
            for name, places in sorted(self.dropped.items())
        ) + (ended,) * bool(self.ended)

    def _template(self, job: Job) -> str:
        try:
            return self.tokenizer.get_chat_template(None, job.row.get("tools") or None)
        except ValueError as error:
            raise DataError(f"{job.where}: the chat template refuses the row: {error}") from error

    def _request(self, job: Job, variants: Sequence[Variant], spans: bool) -> dict:
        extra = job.row.get("chat_template_kwargs") or {}
        taken = [name for name in extra if name in _OWN]
        if taken:
            raise DataError(
                f"{job.where}: the chat template refuses the row: its chat_template_kwargs set "
                f"{taken[0]!r}, which rows cannot."
            )
        template = self._template(job)
        parts = self._parts(template)
        others = [
            (variant.upto, variant.add_generation_prompt,
             [(i, _for_template(message, parts)) for i, message in variant.changed])
            for variant in variants
        ]  # fmt: skip
        return {
            "conversations": [[_for_template(message, parts) for message in job.messages]],
            "variants": [dict(zip(("upto", "prompt", "changed"), o, strict=True)) for o in others],
            "tools": job.row.get("tools") or None,
            "chat_template": template,
            "return_assistant_tokens_mask": spans,
            "add_generation_prompt": job.add_generation_prompt,
            **self.tokenizer.special_tokens_map,
            **extra,
        }

    def _parts(self, template: str) -> bool:
        """Whether the template accepts content as parts only, like those of image models."""
        if self._takes_parts is None:
            probe = {"role": "user", "content": "PROBE"}
            common = {"chat_template": template, **self.tokenizer.special_tokens_map}
            self._takes_parts = False
            for message, means_parts in ((probe, False), (_with_parts(probe), True)):
                (result,) = results([{"conversations": [[message]], **common}], self.limits)
                if "limit" in result or "PROBE" in result.get("text", ""):
                    self._takes_parts = means_parts and "text" in result
                    break
        return self._takes_parts


def render_template(
    tokenizer,
    messages: list[dict],
    row: dict,
    where: str,
    *,
    add_generation_prompt: bool = False,
    limits: Limits = DEFAULT,
) -> str:
    """One conversation as text; see `ChatRenderer`."""
    job = Job(messages, row, where, add_generation_prompt)
    return ChatRenderer(tokenizer, limits).texts([job])[0]


@functools.lru_cache(maxsize=16)
def _has_marks(template: str) -> bool:
    return bool(_GENERATION.search(template))


def _for_template(message: dict, parts: bool) -> dict:
    # transformers treats a missing key and null alike.
    message = {name: value for name, value in message.items() if value is not None}
    return _with_parts(message) if parts else message


def _variant_text(text: str, result: int | str | dict) -> str | None:
    if isinstance(result, int):
        return text[:result]
    return result if isinstance(result, str) else None


def _with_parts(message: dict) -> dict:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def _wants_text_arguments(result: dict, job: Job) -> bool:
    """Whether the template failed because it concatenates a call's arguments with text."""
    found = [result, *(v for v in result.get("variants", ()) if isinstance(v, dict))]
    wanted = any("concatenate str" in one.get("error", "") for one in found)
    return wanted and any(m.get("tool_calls") for m in job.messages)


def _with_texts(request: dict) -> dict:
    """The request with the arguments of calls as JSON texts."""
    (messages,) = request["conversations"]
    variants = [
        variant | {"changed": [(i, _with_text_arguments(m)) for i, m in variant["changed"]]}
        for variant in request["variants"]
    ]
    messages = [_with_text_arguments(message) for message in messages]
    return request | {"conversations": [messages], "variants": variants}


def _with_text_arguments(message: dict) -> dict:
    """The message with the arguments of its calls as JSON texts, which DeepSeek expects."""

    def text(function: dict) -> dict:
        arguments = json.dumps(function.get("arguments", {}), ensure_ascii=False)
        return {**function, "arguments": arguments}

    calls = [
        {**call, "function": text(call["function"])} if "function" in call else text(call)
        for call in message.get("tool_calls") or ()
    ]
    return {**message, "tool_calls": calls} if calls else message


def _checked(result: dict, where: str, limits: Limits) -> str:
    if "text" in result:
        return result["text"]
    if "error" in result:
        raise DataError(f"{where}: the chat template refuses the row: {result['error']}")
    reason = {
        "time": f"takes longer than template_timeout_s={limits.template_timeout_s:g} seconds",
        "memory": f"needs more than template_memory_mib={limits.template_memory_mib}",
        "output": f"renders {result.get('output', 0):,} characters of {result.get('input', 0):,}, "
        f"more than template_output_ratio={limits.template_output_ratio} times as many",
    }[result["limit"]]
    flag = {"time": "timeout_s", "memory": "memory_mib", "output": "output_ratio"}[result["limit"]]
    raise DataError(
        f"{where}: the chat template {reason}: use another one (--chat_template_path), or, where "
        f"the template is to be trusted, raise --template_{flag}."
    )


def _left_out(job: Job, text: str) -> Iterable[str]:
    """Kinds of content in the conversation that the rendered text lacks."""
    names = [_name(tool) for tool in job.row.get("tools") or () if isinstance(tool, dict)]
    if any(name not in text for name in names if name):
        yield "tools"
    messages = job.messages
    kinds = {"tool_calls": [call for m in messages for call in m.get("tool_calls") or ()]}
    kinds["function_call"] = [m.get("function_call") for m in messages]
    for kind, found in kinds.items():
        calls = [call for call in found if isinstance(call, dict)]
        if any(name not in text for name in map(_name, calls) if name):
            yield kind
        elif calls and names and text.count(_name(calls[0]) or "") < 2:
            yield kind  # the name found is that of the tool
    thoughts = [m[key] for m in messages for key in REASONING if isinstance(m.get(key), str)]
    # Templates omit the thoughts of earlier turns on purpose.
    if any(map(str.strip, thoughts)) and not any(t.strip() in text for t in thoughts if t.strip()):
        yield "reasoning_content"
    for role in ("system", "developer", "user", "tool"):
        contents = [m.get("content") for m in messages if m.get("role") == role]
        if any(isinstance(c, str) and not _is_in(c.strip(), text) for c in contents):
            yield f"{role} messages"


def _is_in(content: str, text: str) -> bool:
    if content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text:
        return True
    # Templates may trim lines or reformat JSON, so only the first word is compared.
    return content.split(maxsplit=1)[0][:20].strip("{[\"'") in text if content else True


def _name(call: dict) -> str:
    function = call.get("function", call)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


def _natural(place: str) -> tuple:
    """Sorts "a.jsonl:9" before "a.jsonl:10"."""
    head, _, number = place.replace(" ", ":").rpartition(":")
    return head, int(number) if number.isdigit() else 0
