"""Runs of the scripts for the tests: started as a user starts them, or forked from one process that
has imported what a run imports, where many must start; and compared byte for byte."""

import atexit
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path

import pytest
from faults import meet
from metric_names import undocumented

from relax.callbacks.metrics import CLOCK_FIELDS
from relax.checkpoint.storage import read_leaves
from relax.config import SFTConfig, cli
from relax.files import list_steps

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "run_sft.py"
TIMEOUT_S = 240


def write_rows(path: Path, rows) -> Path:
    """Writes rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def additions(count: int) -> list[dict]:
    """Rows of prompt and completion, a dozen tokens each."""
    pairs = [(i * 7 % 50, i * 13 % 50) for i in range(count)]
    return [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in pairs]


def flags(**fields) -> list[str]:
    return [f"--{name}={value}" for name, value in fields.items()]


def environment() -> dict[str, str]:
    """This process's environment, as a child gets it."""
    # The command that a run prints begins with `python`.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}


_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["preloaded"])
_one_at_a_time = threading.Lock()


class Forked:
    """`python script args...`, begun where its imports end: the part of Popen that `Child` needs.

    It is forked from a process without jax's threads, runs the script from its first line and dies
    for itself.

    Args:
      before: called first, to change what the script will find.
    """

    def __init__(self, script: Path, *args: str, before=None):
        _start_server()
        (out, out_end), (err, err_end) = (_forks.Pipe(duplex=False) for _ in range(2))
        self._process = _forks.Process(
            target=_become, args=(str(script), args, environment(), before, out_end, err_end)
        )
        self._process.start()
        out_end.close(), err_end.close()
        self.pid = self._process.pid
        self.stdout, self.stderr = (os.fdopen(os.dup(end.fileno())) for end in (out, err))

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def send_signal(self, signum: int) -> None:
        # One that has ended is no error, as with Popen.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout_s: float) -> int:
        self._process.join(timeout_s)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked run", timeout_s)
        return self.returncode


def _start_server() -> None:
    """Starts the process that is forked, if none runs. Before Python 3.13 it looks for what it is
    to import on PYTHONPATH alone, and says nothing if it is not there."""
    with _one_at_a_time:
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        try:
            forkserver.ensure_running()
        finally:
            del os.environ["PYTHONPATH"]
            if before is not None:
                os.environ["PYTHONPATH"] = before


def _become(script: str, args, env: dict[str, str], before, out, err) -> None:
    """What a forked process does: all that the start of a script would."""
    assert "preloaded" in sys.modules
    os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
    out.close(), err.close()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    sys.argv = [script, *args]
    if before is not None:
        before()
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a forked process would leave without


_running: list["Child"] = []


def end_all() -> None:
    """Kills what a failed test has left running."""
    for child in list(_running):
        child.end(signal.SIGKILL)


class Child:
    """A process whose output is read as it comes, so that a test can wait for a line.

    Args:
      command: to start, or a `Forked` that is running.
    """

    def __init__(self, command, shell: bool = False, cwd=ROOT):
        self.process = command
        if not isinstance(command, Forked):
            self.process = subprocess.Popen(
                command, shell=shell, cwd=cwd, env=environment(), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        _running.append(self)
        self._parts = {"stdout": [], "stderr": []}
        self._changed = threading.Condition()
        self._open = 2
        self._readers = [threading.Thread(target=self._read, args=[n]) for n in self._parts]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str) -> None:
        for line in getattr(self.process, name):
            with self._changed:
                self._parts[name].append(line)
                self._changed.notify_all()
        with self._changed:
            self._open -= 1
            self._changed.notify_all()

    @property
    def stdout(self) -> str:
        return "".join(self._parts["stdout"])

    @property
    def stderr(self) -> str:
        return "".join(self._parts["stderr"])

    def wait_for(self, text: str) -> "Child":
        """Waits until the output has some text."""
        with self._changed:
            came = self._changed.wait_for(
                lambda: text in self.stdout + self.stderr or not self._open, TIMEOUT_S
            )
        assert came and text in self.stdout + self.stderr, (text, self.stdout, self.stderr)
        return self

    def end(self, signum: int | None = None) -> int:
        """Sends a signal, if one is named, and returns the exit code."""
        if signum is not None:
            self.process.send_signal(signum)
        try:
            code = self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired as late:
            raise AssertionError(f"{late}; it has said: {self.stderr[-2000:]}") from late
        finally:
            self.process.kill()
            _running.remove(self)
            for reader in self._readers:
                reader.join(TIMEOUT_S)
            self.process.stdout.close()
            self.process.stderr.close()
        return code


def start(*args: str, script: Path = SCRIPT) -> Child:
    """Starts `python run_sft.py ...`."""
    return Child([sys.executable, str(script), *args])


def fork(*args: str, fault: str | None = None, script: Path = SCRIPT, before=None) -> Child:
    """The same in a forked process, which starts in a moment.

    Args:
      fault: where it dies, sleeps or meets a full disk; see `faults.meet`.
      before: called first, to change what the script will find.
    """
    assert fault is None or before is None
    return Child(Forked(script, *args, before=functools.partial(meet, fault) if fault else before))


def finish(*args: str, script: Path = SCRIPT) -> str:
    """Runs `python run_sft.py ...` to its end and returns what it printed."""
    child = start(*args, script=script)
    assert child.end() == 0, child.stdout + child.stderr
    return child.stdout


def killed(child: Child) -> bool:
    """Whether a process ended by SIGKILL."""
    return child.end() == -signal.SIGKILL


def call(*args: str) -> int:
    """The same in this process, for what ends before or soon after jax is used: the exit code."""
    from run_sft import main

    try:
        cli.run(SFTConfig, main, args)
    except SystemExit as stop:
        return stop.code
    return 0


def metrics(output_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what depends on the clock; each name is documented."""
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert not undocumented(records)
    return [timeless(record) for record in records]


def timeless(record: dict) -> dict:
    return {name: value for name, value in record.items() if name not in CLOCK_FIELDS}


def model_bytes(output_dir: Path) -> str:
    return hashlib.sha256((output_dir / "final" / "model.safetensors").read_bytes()).hexdigest()


def outcome(output_dir: Path) -> dict:
    """All that must be the same after a run, whatever happened to it on the way."""
    steps = list_steps(output_dir / "checkpoints")
    newest = output_dir / "checkpoints" / str(steps[-1])
    specs = json.loads((newest / "checksums.json").read_text())["leaves"]
    arrays = dict(zip(specs, read_leaves(newest, specs), strict=True))
    assert all(array is not None for array in arrays.values())
    info = json.loads((newest / "relax_state.json").read_text())
    log = info["progress"]["callbacks"]["MetricsLog.0"]
    log["window"] = [timeless(record) for record in log["window"]]
    return {
        "steps": steps,
        "leaves": {n: hashlib.sha256(a.tobytes()).hexdigest() for n, a in sorted(arrays.items())},
        "progress": info["progress"],
        "metrics": metrics(output_dir),
        "model": model_bytes(output_dir),
        "files": sorted(p.name for p in (output_dir / "final").iterdir()),
        "left behind": [p.name for p in output_dir.rglob("*tmp*")],
    }


def kills(all_of_them: Sequence, *few: int):
    """Parametrises a test by its kills: the ones at the places `few`, and, in the slow tests, all.

    Each kill is a start of a program, and most of the time of a test.
    """
    some = [all_of_them[i] for i in few]
    slow = pytest.param(list(all_of_them), marks=pytest.mark.slow, id=f"all_{len(all_of_them)}")
    return pytest.mark.parametrize("kills", [pytest.param(some, id=f"{len(few)}"), slow])
