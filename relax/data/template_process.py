"""The process that renders chat templates, which are downloaded code, within its limits."""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from relax.data.limits import Limits


def results(requests: list[dict], limits: Limits) -> list[dict]:
    """The process's result for each request, up to the first that ends it.

    Args:
      requests: arguments of `render_jinja_template` of transformers, and `variants`; see
        `relax.data.template_worker`.
    """
    templates = list(dict.fromkeys(request["chat_template"] for request in requests))
    messages = [
        _json(request | {"chat_template": templates.index(request["chat_template"])})
        for request in requests
    ]
    sent = [m for m in messages if isinstance(m, str)]
    with _lock:
        worker = _worker_of(limits)
        answers, status = worker.ask(templates, sent)
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

    def ask(self, templates: list[str], jobs: list[str]) -> tuple[list[dict], int | None]:
        """The results received, and the exit status if the process ended before the last one.

        Args:
          templates: chat templates, which jobs name by their index.
          jobs: each a JSON object.
        """
        answers: list[dict] = []
        try:
            head = json.dumps(templates)
            self._write(f'{{"templates":{head},"jobs":[{",".join(jobs)}]}}')
            while len(answers) < len(jobs) and (line := self._read()) is not None:
                answers.append(line)
        except BaseException:  # such as Ctrl-C, after which the next answer would be this one's
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
