"""Faults of one of two processes: `python -m benchmarks.reliability.processes`.

Each row is a run of two processes over loopback in which one is signalled, dies, comes late, is
slow, or meets another run on its port. Printed are what is to happen and what did, and at the end
how many rows differ.
"""

import functools
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import fire
from runs import Child, end_all
from two_processes import ended, port, slow_steps, start_two, weights

from benchmarks.reliability import jobs

BOUND_S = 60  # heartbeat_s is 10
SHORT = {
    "max_steps": 6,
    "save_steps": 2,
    "eval_steps": 2,
    "eval_strategy": "steps",
    "logging_steps": 1,
    "heartbeat_s": 10,
    "grace_s": 120,  # also where other programs run
    "per_device_train_batch_size": 2,
}


class Row(NamedTuple):
    """What was tried, what is to happen, what did, and whether they agree."""

    tried: str
    expected: str
    seen: str
    right: bool


class Trial:
    """A job of two processes and the weights that it ends with.

    Args:
      job: the job.
      root: directory for its runs.
    """

    def __init__(self, job: jobs.Job, root: Path):
        self.job, self.root, self.count = job, root, 0
        children = self.start()
        assert ended(children) == [0, 0], [child.stderr for child in children]
        self.weights = weights(self.output)

    def start(self, **how) -> list[Child]:
        """Starts the run in a new directory; `how` as for `start_two`."""
        self.count += 1
        self.output = self.root / f"run-{self.count}"
        return start_two(self.output, self.job.fields, script=self.job.script, **how)

    def resumes(self) -> bool:
        """Whether the run, started again, ends with the same weights."""
        fields = self.job.fields | {"resume": "auto"}
        children = start_two(self.output, fields, script=self.job.script)
        return ended(children) == [0, 0] and weights(self.output) == self.weights


def signalled(trial: Trial, signum: signal.Signals, to: int) -> Row:
    children = trial.start(before=(slow_steps, slow_steps))
    children[0].wait_for("step 1/6")
    children[to].process.send_signal(signum)
    codes = ended(children)
    same = trial.resumes()
    return Row(
        f"{signum.name} to process {to}",
        f"both save and end with {128 + signum}; resumes to the same bytes",
        f"exit codes {codes}, {'the same' if same else 'other'} bytes",
        codes == [128 + signum] * 2 and same,
    )


def dies(trial: Trial, fault: str, victim: int) -> Row:
    faults: list[str | None] = [None, None]
    faults[victim] = fault
    children = trial.start(faults=faults)
    code = children[victim].end()
    start_s = time.monotonic()
    other = children[1 - victim]
    other_code, seconds = other.end(), time.monotonic() - start_s
    said = last_words(other)
    same = trial.resumes()
    return Row(
        f"process {victim} dies at {fault.partition(':')[0]}",
        f"the other ends with an error within {BOUND_S} s and says why; the same bytes",
        f"exit code {other_code} after {seconds:.0f} s, {said}, "
        f"{'the same' if same else 'other'} bytes",
        code == -signal.SIGKILL and other_code != 0 and seconds < BOUND_S and same,
    )


def last_words(child: Child) -> str:
    """Who said what happened: ReLax, jax's runtime, or nobody."""
    if "another process of the run" in child.stderr:
        return "a sentence of ReLax"
    return "jax's own words" if "distributed service" in child.stderr else "in silence"


def delayed(trial: Trial, where: str, before: Callable) -> Row:
    children = trial.start(before=(None, before))
    codes = ended(children)
    same = codes == [0, 0] and weights(trial.output) == trial.weights
    return Row(
        f"process 1 {where}",
        "both wait for it and finish; the same bytes",
        f"exit codes {codes}, {'the same' if same else 'other'} bytes",
        same,
    )


def late(seconds: float) -> None:
    """Starts later."""
    time.sleep(seconds)


def slow(seconds: float) -> None:
    """Takes long to load the model, with the others joined and waiting."""
    from relax.engine.run import Run

    load = Run.load_model

    def load_model(*args, **kwargs):
        time.sleep(seconds)
        return load(*args, **kwargs)

    Run.load_model = load_model


def one_port(trial: Trial) -> Row:
    address = f"127.0.0.1:{port()}"
    first = trial.start(address=address, before=(slow_steps, slow_steps))
    output = trial.output
    first[0].wait_for("step 1/6")
    second = trial.start(address=address)
    code, codes = second[0].end(), ended(first)
    second[1].process.kill()  # it would wait for its process 0
    trial.output = output
    same = trial.resumes()
    return Row(
        "a second run on the port of a first",
        "process 0 of the second is refused; the first resumes to the same bytes",
        f"exit code {code}; the first {codes}, {'the same' if same else 'other'} bytes",
        code == 2 and same,
    )


def rows(root: Path) -> Iterator[Row]:
    """Tries everything."""
    sft = Trial(jobs.make("sft", root / "sft", **SHORT), root / "sft")
    for to in (0, 1):
        yield signalled(sft, signal.SIGINT, to)
        yield signalled(sft, signal.SIGTERM, to)
        yield dies(sft, "before_write:2", to)
        yield dies(sft, "evaluation:2", to)
    yield dies(sft, "mid_write:2", 0)
    grpo = Trial(jobs.make("grpo", root / "grpo", **SHORT), root / "grpo")
    for to in (0, 1):
        yield dies(grpo, "rollout:2", to)
    yield delayed(sft, "starts 20 s late", functools.partial(late, 20))
    yield delayed(sft, "loads its model for 20 s", functools.partial(slow, 20))
    yield one_port(sft)


def main(directory: str = "") -> None:
    """Prints a table; exits with 1 if a row differs from what is expected."""
    root = Path(directory or tempfile.mkdtemp(prefix="relax-processes-"))
    print("| tried | expected | seen | |\n|---|---|---|---|", flush=True)
    wrong = 0
    try:
        for tried, expected, seen, right in rows(root):
            print(f"| {tried} | {expected} | {seen} | {'✓' if right else '✗'} |", flush=True)
            wrong += not right
    finally:
        end_all()
    if wrong:
        raise SystemExit(f"{wrong} rows differ")


if __name__ == "__main__":
    fire.Fire(main)
