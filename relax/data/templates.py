"""Chat templates: render conversations as text, within limits; the only place that does so.

transformers renders in its sandbox; a separate process bounds time, memory and output, which no
sandbox does (`relax.data.template_worker`).
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from relax.data.limits import DEFAULT, Limits
from relax.errors import ConfigError, DataError

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
)
_REASONING = ("reasoning_content", "reasoning", "thinking")


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


class Rendered(NamedTuple):
    """A rendered conversation; `spans` are the characters within {% generation %} blocks."""

    text: str
    spans: list[tuple[int, int]]


class ChatRenderer:
    """Renders conversations with one tokenizer's template.

    Attributes:
      dropped: kinds of content that the template omits ("tool_calls", "tools", "reasoning_content",
        "system messages", ...), each with the places of its rows.
    """

    def __init__(self, tokenizer, limits: Limits = DEFAULT):
        self.tokenizer, self.limits = tokenizer, limits
        self.dropped: dict[str, set[str]] = {}
        self._takes_parts: bool | None = None

    def texts(self, jobs: Sequence[Job]) -> list[str]:
        """The rendered text of each job.

        Raises:
          DataError: the template refuses a conversation, or exceeds a limit.
        """
        return [rendered.text for rendered in self.render(jobs)]

    def render(self, jobs: Sequence[Job], *, spans: bool = False) -> list[Rendered]:
        """As `texts`, with the spans of assistant text if `spans` is true."""
        made = []
        for first in range(0, len(jobs), _BATCH):
            some = jobs[first : first + _BATCH]
            requests = [self._request(job, spans) for job in some]
            # A job that exceeds a limit is the last one answered, and is refused.
            for job, result in zip(some, _results(requests, self.limits), strict=False):
                if "text" not in result and _wants_text_arguments(result, job):
                    request = self._request(_with_text_arguments(job), spans)
                    (result,) = _results([request], self.limits)
                text = _checked(result, job.where, self.limits)
                made.append(Rendered(text, [tuple(span) for span in result["spans"]]))
                for name in _left_out(job, text):
                    self.dropped.setdefault(name, set()).add(job.where)
        return made

    def notes(self) -> tuple[str, ...]:
        """A warning for each kind of content that the template omits."""
        return tuple(
            f"the chat template does not render the {name} of {len(places):,} rows: "
            f"first {min(places, key=_natural)}. They are not trained on; another template is "
            "given with --chat_template_path"
            for name, places in sorted(self.dropped.items())
        )

    def _request(self, job: Job, spans: bool) -> dict:
        extra = job.row.get("chat_template_kwargs") or {}
        taken = [name for name in extra if name in _OWN]
        if taken:
            raise DataError(
                f"{job.where}: the chat template refuses the row: its chat_template_kwargs set "
                f"{taken[0]!r}, which rows cannot."
            )
        tools = job.row.get("tools") or None
        try:
            template = self.tokenizer.get_chat_template(None, tools)
        except ValueError as error:
            raise DataError(f"{job.where}: the chat template refuses the row: {error}") from error
        # transformers treats a missing key and null alike.
        messages = [{k: v for k, v in m.items() if v is not None} for m in job.messages]
        if self._parts(template):
            messages = [_with_parts(message) for message in messages]
        return {
            "conversations": [messages],
            "tools": tools,
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
                (result,) = _results([{"conversations": [[message]], **common}], self.limits)
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


def _with_parts(message: dict) -> dict:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def _wants_text_arguments(result: dict, job: Job) -> bool:
    """Whether the template failed because it concatenates a call's arguments with text."""
    error = result.get("error", "")
    return "concatenate str" in error and any(m.get("tool_calls") for m in job.messages)


def _with_text_arguments(job: Job) -> Job:
    """The job with the arguments of calls as JSON texts, which DeepSeek's templates expect."""

    def text(function: dict) -> dict:
        arguments = json.dumps(function.get("arguments", {}), ensure_ascii=False)
        return {**function, "arguments": arguments}

    messages = []
    for message in job.messages:
        calls = [
            {**call, "function": text(call["function"])} if "function" in call else text(call)
            for call in message.get("tool_calls") or ()
        ]
        messages.append({**message, "tool_calls": calls} if calls else message)
    return job._replace(messages=messages)


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
    calls = [c for m in messages for c in m.get("tool_calls") or () if isinstance(c, dict)]
    if any(name not in text for name in map(_name, calls) if name):
        yield "tool_calls"
    elif calls and names and text.count(_name(calls[0]) or "") < 2:
        yield "tool_calls"  # the name found is that of the tool
    thoughts = [m[key] for m in messages for key in _REASONING if isinstance(m.get(key), str)]
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


def _results(requests: list[dict], limits: Limits) -> list[dict]:
    """The worker's result for each request, up to the first that ends it."""
    messages = [_json(request) for request in requests]
    sent = [m for m in messages if isinstance(m, str)]
    with _lock:
        worker = _worker_of(limits)
        answers, status = worker.ask(sent)
    if len(answers) < len(sent):
        answers.append({"limit": "time" if status == -signal.SIGALRM else "memory"})
    given = iter(answers)
    results = []
    for message in messages:
        result = next(given, None) if isinstance(message, str) else message
        if result is None:
            break
        results.append(result)
    return results


def _json(request: dict) -> str | dict:
    try:
        return json.dumps(request)
    except (TypeError, ValueError, RecursionError) as error:
        return {"error": f"it contains a value that is not JSON: {error}"}


class _Worker:
    """The rendering process, started at the first conversation and restarted whenever it ends."""

    def __init__(self, limits: Limits):
        options = {
            "path": [os.path.abspath(path) for path in sys.path],
            "timeout_s": limits.template_timeout_s,
            "memory_mib": limits.template_memory_mib,
            "output_ratio": limits.template_output_ratio,
        }
        program = str(Path(__file__).with_name("template_worker.py"))
        self.process = subprocess.Popen(
            [sys.executable, "-I", program, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # the parent handles Ctrl-C
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        if self._read() != "ready":
            raise RuntimeError(
                "the process that renders chat templates did not start, exit code "
                f"{self.close()}: is transformers installed correctly?"
            )

    def ask(self, jobs: list[str]) -> tuple[list[dict], int | None]:
        """The results received, and the exit status if the process ended before the last one.

        Args:
          jobs: each a JSON object.
        """
        answers: list[dict] = []
        try:
            self._write("[" + ",".join(jobs) + "]")
            while len(answers) < len(jobs) and (line := self._read()) is not None:
                answers.append(line)
        except (
            BaseException
        ):  # after Ctrl-C between request and answer, the next answer would be the wrong one
            self.close()
            raise
        return answers, None if len(answers) == len(jobs) else self.close()

    def _write(self, line: str) -> None:
        try:
            self.stdin.write(line.encode() + b"\n")
            self.stdin.flush()
        except BrokenPipeError:
            pass  # the process has ended, which reading will show

    def _read(self):
        line = self.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def close(self) -> int:
        """Ends the process; returns its exit status, negative for a signal."""
        for pipe in (self.stdin, self.stdout):
            try:
                pipe.close()
            except OSError:
                pass  # unwritten data has no reader any more
        try:
            return self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


_lock = threading.Lock()  # one request at a time, from any thread
_workers: dict[tuple, _Worker] = {}


def _worker_of(limits: Limits) -> _Worker:
    """The worker of this process with these limits."""
    key = (
        os.getpid(),
        limits.template_timeout_s,
        limits.template_memory_mib,
        limits.template_output_ratio,
    )
    worker = _workers.get(key)
    if worker is None or worker.process.poll() is not None or worker.stdin.closed:
        worker = _workers[key] = _Worker(limits)
    return worker


@atexit.register
def _close_workers() -> None:
    for (pid, *_), worker in _workers.items():
        if pid == os.getpid():
            worker.close()
