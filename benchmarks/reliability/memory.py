"""Memory and files of a long run: `python -m benchmarks.reliability.memory --algorithm sft`.

Evaluates and saves every 20 updates, and reads the resident memory of the run and of its reward
workers, and the size of the newest checkpoint, at every save. The growth is the slope of a
straight line through the second half, where caches and allocators have filled.
"""

import json
import time
from pathlib import Path

import fire
import numpy as np

from benchmarks.reliability import jobs
from relax.files import list_steps

MB = 1e6
TINY = {
    "sft": {"per_device_train_batch_size": 2},
    "grpo": {
        "per_device_train_batch_size": 4,
        "steps_per_generation": 1,
        "max_completion_length": 4,
        "test_size": 1,
    },
}


def main(
    algorithm: str = "sft",
    steps: int = 3000,
    every: int = 20,
    processes: int = 1,
    directory: str = "",
    **fields,
) -> None:
    """Prints the growth per 1,000 updates, and writes all readings to `readings.jsonl`.

    Args:
      steps: updates of the run.
      every: updates from one evaluation and save to the next.
      processes: 1 or 2; of two, process 0 is read, which writes the files.
      directory: of the run; a new one.
      **fields: other flags of the run.
    """
    root = Path(directory or f"outputs/memory-{algorithm}").absolute()
    interval = {"max_steps": steps, "save_steps": every, "eval_steps": every}
    more = {"eval_strategy": "steps", "save_total_limit": 2, "logging_steps": every}
    job = jobs.make(algorithm, root, **TINY[algorithm] | interval | more | fields)
    start_s = time.monotonic()
    children = job.start(root / "run", faults=[None] * processes)
    readings = watch(children[0].process, root / "run" / "checkpoints")
    if any(child.end() for child in children):
        raise SystemExit("".join(child.stdout + child.stderr for child in children))
    lines = "".join(json.dumps(reading) + "\n" for reading in readings)
    (root / "readings.jsonl").write_text(lines)
    report(readings, time.monotonic() - start_s)


def watch(process, checkpoints: Path) -> list[dict]:
    """One reading at every new checkpoint, until the process has ended."""
    readings, last = [], 0
    while process.poll() is None:
        saved = list_steps(checkpoints)
        if saved and saved[-1] > last:
            last = saved[-1]
            workers = sum(map(resident_bytes, children_of(process.pid)))
            reading = {"step": last, "run": resident_bytes(process.pid), "workers": workers}
            readings.append(reading | {"checkpoint": size_of(checkpoints / str(last))})
        time.sleep(0.02)
    return readings


def children_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += map(int, task.read_text().split())
    return found


def resident_bytes(pid: int) -> int:
    """The resident memory of a process; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def size_of(directory: Path) -> int:
    """Bytes of the files in a directory; 0 where it has been removed meanwhile."""
    try:
        return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    except FileNotFoundError:
        return 0


def report(readings: list[dict], seconds: float) -> None:
    """Prints readings along the run, and the growth over its second half."""
    print(f"{'updates':>8} {'run MB':>8} {'workers MB':>11} {'checkpoint kB':>14}")
    for reading in readings[:: max(1, len(readings) // 12)] + readings[-1:]:
        sizes = reading["run"] / MB, reading["workers"] / MB, reading["checkpoint"] / 1000
        print(f"{reading['step']:>8} {sizes[0]:>8.1f} {sizes[1]:>11.1f} {sizes[2]:>14.1f}")
    half = [reading for reading in readings if 2 * reading["step"] > readings[-1]["step"]]
    at = np.array([reading["step"] for reading in half]) / 1000
    for name, unit in (("run", MB), ("workers", MB), ("checkpoint", 1000)):
        values = np.array([reading[name] for reading in half if reading[name]]) / unit
        if len(values) == len(at):
            slope = np.polyfit(at, values, 1)[0]
            print(f"{name}: {slope:+.2f} {'MB' if unit == MB else 'kB'} per 1,000 updates")
    print(f"{seconds:.0f} s")


if __name__ == "__main__":
    fire.Fire(main)
