"""The table of docs/scale.md: `python benchmarks/shapes/table.py DIRECTORY [MODEL-DEVICES ...]`.

Makes the plans that are not in the directory yet (libtpu must be installed), and prints a row for
each. A quick plan tells whether the state fits at all, and what else is needed at most; where the
state fits, another is made without `--quick`, which takes some minutes.
"""

import re
import subprocess
import sys
from pathlib import Path

SHAPES = Path(__file__).parent
SLICES = {8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
# Devices along tensor: as many as a copy of the weights for rollouts needs.
MODELS = {"llama-3.1-8b": 4, "qwen3-32b": 8, "mixtral-8x7b": 8}
MEMORY_GB = 16


def plan(model: str, devices: int, tensor: int, directory: Path, *flags: str) -> str:
    """What the command prints."""
    file = directory / f"{model}-{devices}{''.join(flags)}.txt"
    if not file.exists():
        command = [sys.executable, "-m", "relax", "plan"]
        command += ["--model_name_or_path", str(SHAPES / f"{model}.json")]
        command += ["--topology", f"v5e:{SLICES[devices]}"]
        command += ["--mesh", f"fsdp={devices // tensor},tensor={tensor}", *flags]
        run = subprocess.run(command, capture_output=True, text=True, cwd=SHAPES.parents[1])
        if run.returncode:
            raise SystemExit(run.stderr[-2000:])
        file.write_text(run.stdout)
    return file.read_text()


def gigabytes(part: str, name: str) -> float:
    """The size in a line of a plan."""
    number, unit = re.search(rf"^  {name} +([\d.]+) ([MG])B", part, re.MULTILINE).groups()
    return float(number) / (1 if unit == "G" else 1000)


def row(model: str, devices: int, tensor: int, directory: Path) -> str:
    """A line of the table."""

    def parts(*flags):
        return plan(model, devices, tensor, directory, *flags).split("\n\n")[1:3]

    cells = [model, str(devices), f"fsdp={devices // tensor},tensor={tensor}"]
    (update, decode), bound = parts("--quick"), "at most "
    if "not compiled" not in update:
        state = sum(gigabytes(update, n) for n in ("parameters", "gradients", "optimizer"))
        if state <= MEMORY_GB:
            (update, decode), bound = parts(), ""
        cells.append(f"{state:.1f} GB")
    for part in (update, decode):
        refused = re.search(r"does not fit, and was not compiled", part)
        cells.append("does not fit" if refused else _needed(part, bound))
    return f"| {' | '.join(cells)} |"


def _needed(part: str, bound: str) -> str:
    total = gigabytes(part, "total")
    how_long = re.search(r"at least (\S+) ms, by (\w+)", part)
    if total > MEMORY_GB:
        return "does not fit"
    return f"{bound}{total:.1f} GB, {how_long[1]} ms ({how_long[2]})"


def main(directory: str, *chosen: str) -> None:
    """All rows, or those of plans that are named, such as llama-3.1-8b-16."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    for model, tensor in MODELS.items():
        for devices in SLICES:
            if not chosen or f"{model}-{devices}" in chosen:
                print(row(model, devices, tensor, Path(directory)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
