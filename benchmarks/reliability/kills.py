"""Kills of a run: `python -m benchmarks.reliability.kills --algorithm sft --processes 2`.

Each start of the run is killed with SIGKILL, in either of two processes, at a named point (in a
rollout, an evaluation, each part of a save, the export) or after a random time, and is resumed by
the next start. What it has when it finishes is compared with a run that was never killed: the
exported weights, every array of the checkpoints, the position in the data, the metrics and the
completions, bit for bit. Then the next run begins, until all kills are made.
"""

import collections
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import fire
from runs import end_all

from benchmarks.reliability import jobs

SHORT = {
    "sft": {
        "max_steps": 12,
        "save_steps": 3,
        "eval_steps": 4,
        "logging_steps": 2,
        "metric_for_best_model": "eval_loss",
    },
    "grpo": {
        "max_steps": 8,
        "save_steps": 2,
        "eval_steps": 4,
        "logging_steps": 3,
        "metric_for_best_model": "eval_reward",
    },
}
COMMON = {"eval_strategy": "steps", "save_total_limit": 2}
# The point, and how often a whole run passes it.
POINTS = {
    "step": 8,
    "evaluation": 3,
    "before_write": 4,
    "mid_write": 4,
    "before_checksums": 4,
    "before_rename": 4,
    "after_rename": 4,
    "mid_retention": 2,
    "trained": 1,
    "export": 1,
}
IN_ROLLOUTS = {"rollout": 4, "reward": 4}
# Process 0 alone writes: process 1 passes those that are before or after the writing.
OF_ALL = ("step", "evaluation", "before_write", "trained", "rollout", "reward")


def main(
    algorithm: str = "sft", kills: int = 20, processes: int = 1, seed: int = 0, directory: str = ""
) -> None:
    """Prints every kill and the number of finished runs that differ; exits with 1 if any does.

    Args:
      algorithm: sft, or a kind of GRPO: grpo, async, tools or agent.
      processes: 1 or 2.
      directory: for the runs; a temporary one, which is kept if a run differs.
    """
    root = Path(directory or tempfile.mkdtemp(prefix="relax-kills-"))
    fields = {"heartbeat_s": 10} if processes == 2 else {}
    short = SHORT.get(algorithm, SHORT["grpo"])
    job = jobs.make(algorithm, root, **COMMON | short | jobs.rows(processes) | fields)
    campaign = Campaign(job, root, processes, random.Random(seed))
    start_s = time.monotonic()
    try:
        differing = campaign.run(kills)
    finally:
        end_all()
    made, finished = sum(campaign.places.values()), campaign.finished
    print(f"{algorithm}, {processes} process{'es'[: 2 * (processes - 1)]}: {made} kills, ", end="")
    print(f"{finished} finished runs, {differing} with other bytes; ", end="")
    print(f"{time.monotonic() - start_s:.0f} s")
    for place, count in sorted(campaign.places.items()):
        print(f"  {place}: {count}")
    if campaign.seconds:
        print(f"  the other process ended after {max(campaign.seconds):.0f} s at most")
    if differing:
        raise SystemExit(f"the runs are in '{root}'")
    shutil.rmtree(root)


class Campaign:
    """Kills of one job.

    Attributes:
      places: number of kills by process and place.
      seconds: from each kill to the end of the other process.
      finished: number of runs that were killed at least once and finished.
    """

    def __init__(self, job: jobs.Job, root: Path, processes: int, rng: random.Random):
        self.job, self.root, self.processes, self.rng = job, root, processes, rng
        self.points = POINTS | (IN_ROLLOUTS if job.has_rollouts else {})
        self.places: collections.Counter[str] = collections.Counter()
        self.seconds: list[float] = []
        self.finished = 0
        self.run_s = 0.0  # of an unbroken run

    def run(self, kills: int) -> int:
        """Makes the kills; the number of finished runs that differ from an unbroken one."""
        start_s = time.monotonic()
        self.go_on(self.root / "unbroken")
        self.run_s = time.monotonic() - start_s
        expected, differing = self.job.outcome(self.root / "unbroken"), 0
        while sum(self.places.values()) < kills:
            output = self.root / f"run-{self.finished}"
            while sum(self.places.values()) < kills and self.kill(output):
                pass
            self.go_on(output)
            found = self.job.outcome(output)
            names = [name for name in expected if found[name] != expected[name]]
            differing += bool(names)
            self.finished += 1
            print(f"{output.name} {'differs in ' + ', '.join(names) if names else 'is equal'}")
        return differing

    def go_on(self, output: Path) -> None:
        """Begins or resumes a run, and lets it finish."""
        children = self.job.start(output, faults=[None] * self.processes, resume="auto")
        codes = [child.end() for child in children]
        assert not any(codes), (codes, [child.stderr for child in children])

    def kill(self, output: Path) -> bool:
        """Begins or resumes a run, and kills a process of it; whether that came before its end."""
        victim = self.rng.randrange(self.processes)
        faults: list[str | None] = [None] * self.processes
        place = f"process {victim} at a random time"
        if self.rng.random() < 0.6:
            name = self.rng.choice([n for n in self.points if victim == 0 or n in OF_ALL])
            faults[victim] = f"{name}:{self.rng.randint(1, self.points[name])}"
            place = f"process {victim} at {name}"
        children = self.job.start(output, faults=faults, resume="auto")
        others = [child for number, child in enumerate(children) if number != victim]
        if faults[victim] is None:
            if others:  # a process waits 300 s for another that never came
                children[0].wait_for("of 2 processes")
            time.sleep(self.rng.uniform(0, self.run_s))
            children[victim].process.kill()
        code, killed_s = children[victim].end(), time.monotonic()
        codes = [child.end() for child in others]
        if code != -signal.SIGKILL:
            assert not any([code, *codes]), [child.stderr for child in children]
            return False
        # A process that is killed when all is done leaves the other nothing to miss.
        exported = (output / "final" / "model.safetensors").exists()
        assert all(codes) or exported, [child.stdout for child in others]
        self.places[place] += 1
        self.seconds += [time.monotonic() - killed_s] * len(others)
        print(f"{sum(self.places.values())}: killed {place}", flush=True)
        return True


if __name__ == "__main__":
    fire.Fire(main)
