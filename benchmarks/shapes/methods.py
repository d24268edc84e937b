"""The table of docs/memory.md: `python benchmarks/shapes/methods.py DIRECTORY [MODEL ...]`.

What an update of one row of 2,048 tokens needs on one device, by the compiler for TPUs (libtpu must
be installed): all weights trained, adapters, and adapters over a base in nf4. Plans that are in the
directory already are not made again.
"""

import re
import subprocess
import sys
from pathlib import Path

SHAPES = Path(__file__).parent
MODELS = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "llama-3.1-8b")
METHODS = {
    "full": (),
    "full, `--optim adamw_8bit`": ("--optim", "adamw_8bit"),
    "LoRA": ("--use_peft",),
    "QLoRA, nf4": ("--use_peft", "--quantize_base", "nf4"),
}
# Four chips that hold all weights each, with a row each: the same as one chip with one row.
SAME = ("--topology", "v5p:2x2x1", "--mesh", "data=4", "--slots", "0", "--max_length", "2048",
        "--param_dtype", "bfloat16")  # fmt: skip
DEVICES_GB = (16, 24, 40, 80)


def plan(model: str, method: str, directory: Path) -> str:
    """What the command prints."""
    file = directory / f"{model}-{re.sub('[^a-z0-9]+', '-', method.lower())}.txt"
    if not file.exists():
        command = [sys.executable, "-m", "relax", "plan"]
        command += ["--model_name_or_path", str(SHAPES / f"{model}.json"), *SAME, *METHODS[method]]
        run = subprocess.run(command, capture_output=True, text=True, cwd=SHAPES.parents[1])
        if run.returncode:
            raise SystemExit(run.stderr[-2000:])
        file.write_text(run.stdout)
    return file.read_text()


def gigabytes(text: str, name: str) -> float:
    """The size in a line of a plan; 0 where it has none."""
    found = re.search(rf"^  {name} +([\d.]+) ([kMGT]?)B", text, re.MULTILINE)
    if found is None:
        return 0.0
    return float(found[1]) * {"": 1e-9, "k": 1e-6, "M": 1e-3, "G": 1.0, "T": 1e3}[found[2]]


def row(model: str, method: str, directory: Path) -> str:
    """A line of the table."""
    text = plan(model, method, directory)
    names = ("parameters", "frozen", "gradients", "optimizer", "activations", "total")
    sizes = {name: gigabytes(text, name) for name in names}
    cells = [f"{sizes['parameters'] + sizes['frozen']:.2f}", f"{sizes['optimizer']:.2f}"]
    cells += [f"{sizes['gradients'] + sizes['activations']:.2f}", f"{sizes['total']:.2f}"]
    least = next((str(size) for size in DEVICES_GB if sizes["total"] <= size / 1.05), "more")
    return f"| {model} | {method} | {' | '.join(cells)} | {least} |"


def main() -> None:
    """Prints the table."""
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    print("| model | method | weights | optimizer | gradients, activations | GB | fits into |")
    print("|---|---|---|---|---|---|---|")
    for model in sys.argv[2:] or MODELS:
        for method in METHODS:
            print(row(model, method, directory), flush=True)


if __name__ == "__main__":
    main()
