"""The table of docs/scale.md: `python benchmarks/shapes/table.py DIRECTORY [MODEL-DEVICES ...]`.

Makes the plans that are not in the directory yet (minutes each; libtpu must be installed), and
prints a row for each.
"""

import re
import subprocess
import sys
from pathlib import Path

SHAPES = Path(__file__).parent
SLICES = {8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
# Devices along tensor: as many as a copy of the weights for rollouts needs.
MODELS = {"llama-3.1-8b": 4, "qwen3-32b": 8, "mixtral-8x7b": 8}
NUMBER = r" +([\d.]+ [MG]B)"


def plan(model: str, devices: int, tensor: int, directory: Path) -> str:
    """What the command prints."""
    file = directory / f"{model}-{devices}.txt"
    if not file.exists():
        command = [sys.executable, "-m", "relax.parallel", "plan"]
        command += ["--model_name_or_path", str(SHAPES / f"{model}.json")]
        command += ["--topology", f"v5e:{SLICES[devices]}"]
        command += ["--mesh", f"fsdp={devices // tensor},tensor={tensor}", "--quick"]
        run = subprocess.run(command, capture_output=True, text=True, cwd=SHAPES.parents[1])
        if run.returncode:
            raise SystemExit(run.stderr[-2000:])
        file.write_text(run.stdout)
    return file.read_text()


def row(model: str, devices: int, tensor: int, text: str) -> str:
    """A line of the table."""
    update, decode = (part.split("\n\n")[0] for part in text.split("\n\n")[1:3])
    cells = [model, str(devices), f"fsdp={devices // tensor},tensor={tensor}"]
    for part in (update, decode):
        if "does not fit" in part and "together" not in part:
            cells += [re.search(r"does not fit.*", part)[0], ""]
            continue
        cells.append(re.search(rf"together{NUMBER}", part)[1])
        cells[-1] += "" if ": fits" in part else ", does not fit"
        cells.append("{} ms, {}".format(*re.search(r"about (\S+) ms, by (\w+)", part).groups()))
    return f"| {' | '.join(cell.strip() for cell in cells)} |"


def main(directory: str, *chosen: str) -> None:
    """All rows, or those of plans that are named, such as llama-3.1-8b-16."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    for model, tensor in MODELS.items():
        for devices in SLICES:
            if not chosen or f"{model}-{devices}" in chosen:
                text = plan(model, devices, tensor, Path(directory))
                print(row(model, devices, tensor, text), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
