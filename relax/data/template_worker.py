"""Renders chat templates, which are downloaded code, in a separate process.

Run by `relax.data.templates`. It writes "ready", reads lines of JSON, each a list of jobs, and
writes a line for each job. SIGALRM ends the process if a job exceeds its time, even in a loop in C;
RLIMIT_AS bounds its memory.
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
        for job in json.loads(line):
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
    """`text` and `spans` of a rendered job, or `error`, or `limit`, the limit that was exceeded."""
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
    given = sum(len(json.dumps(job[name], ensure_ascii=False)) for name in job)
    if len(text) > options["output_ratio"] * given:
        return {"limit": "output", "output": len(text), "input": given}
    return {"text": text, "spans": spans[0] if spans else []}


if __name__ == "__main__":
    main()
