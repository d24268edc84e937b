"""Renders chat templates, which are downloaded code, in a separate process.

Run by `relax.data.template_process`. It writes "ready", reads lines of JSON, each with the
templates and jobs of a request, and writes a line for each job. SIGALRM ends the process if a job
exceeds its time, even in a loop in C; RLIMIT_AS bounds its memory.
"""

import json
import os
import resource
import signal
import sys


def main() -> None:
    """Renders jobs until standard input ends."""
    options = json.loads(sys.argv[1])
    sys.path[:] = options["path"]
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a library may print
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory(options["memory_mib"])
    out.write('"ready"\n')
    out.flush()
    for line in sys.stdin:
        request = json.loads(line)
        for job in request["jobs"]:
            job["chat_template"] = request["templates"][job["chat_template"]]
            out.write(json.dumps(_result(render_jinja_template, job, options)) + "\n")
            out.flush()


def _limit_memory(mib: int) -> None:
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + mib * 2**20,) * 2)
    except (OSError, ValueError):
        pass  # not supported by this system: time and output are still bounded


def _result(render, job: dict, options: dict) -> dict:
    """`text`, `spans` and `variants` of a rendered job, or `error`, or `limit`, the one exceeded.

    A variant renders a part of the conversation, or one with other messages. Its result is the
    length of its text where the whole text begins with that, else the text, or its error.
    """
    variants, only = job.pop("variants", ()), job.pop("variants_only", False)
    made: dict = {"text": "", "spans": []} if only else _rendered(render, job, options)
    if "text" not in made or not variants:
        return made
    found = made["variants"] = []
    for variant in variants:
        other = _rendered(render, _varied(job, **variant), options)
        if "limit" in other:
            return other
        text = other.get("text")
        found.append(other if text is None else _shared(text, made["text"]))
    return made


def _shared(text: str, whole: str) -> int | str:
    return len(text) if whole.startswith(text) else text


def _varied(job: dict, upto: int, prompt: bool, changed: list) -> dict:
    """The job of the first `upto` messages, with `changed`, pairs of a place and a message."""
    messages = list(job["conversations"][0])
    for place, message in changed:
        messages[place] = message
    return job | {
        "conversations": [messages[:upto]],
        "add_generation_prompt": prompt,
        "return_assistant_tokens_mask": False,
    }


def _rendered(render, job: dict, options: dict) -> dict:
    signal.setitimer(signal.ITIMER_REAL, options["timeout_s"])
    try:
        texts, spans = render(**job)
        text = texts[0]
    except MemoryError:
        return {"limit": "memory"}
    except Exception as error:  # a template may raise anything
        reason = str(error) or type(error).__name__
        return {"error": reason[:500]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    ratio = options["output_ratio"]
    if len(text) > ratio * len(job["chat_template"]):  # counting the rest of the input takes longer
        given = sum(len(json.dumps(job[name], ensure_ascii=False)) for name in job)
        if len(text) > ratio * given:
            return {"limit": "output", "output": len(text), "input": given}
    return {"text": text, "spans": spans[0] if spans else []}


if __name__ == "__main__":
    main()
