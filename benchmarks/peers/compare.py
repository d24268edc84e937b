"""A step of ReLax beside those of TRL and Tunix, which live in environments of their own:

    python3.11 -m venv trl && trl/bin/pip install trl==1.16.0
    python3.12 -m venv tunix && tunix/bin/pip install google-tunix==0.1.7
    python benchmarks/peers/compare.py MODEL_DIR --trl trl/bin/python --tunix tunix/bin/python
    python benchmarks/peers/compare.py MODEL_DIR --work gkd --trl trl/bin/python

`--work grpo` is a rollout of sums, its rewards and its update; `--work gkd` an update of
distillation on four full rows of the data, the model itself being the teacher. The packages run one
after the other on the CPU, and a table with ratios is printed. A package whose interpreter is not
given is left out.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import fire

HERE = Path(__file__).resolve().parent


def measured(python: str, program: str, model_dir: str, steps: int) -> dict:
    """Runs a program and reads its last line."""
    command = [python, str(HERE / program), os.path.abspath(model_dir), str(steps)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(
    model_dir: str,
    work: str = "grpo",
    trl: str | None = None,
    tunix: str | None = None,
    steps: int = 11,
) -> None:
    """Prints the table.

    Args:
      model_dir: a Hugging Face directory of the Llama family.
      work: `grpo`, or `gkd`, which Tunix does not take part in.
      trl, tunix: interpreters of the environments that have these packages.
      steps: of each package; the first three are not counted.
    """
    if work not in ("grpo", "gkd") or (work == "gkd" and tunix):
        sys.exit(f"work is grpo, or gkd without tunix, got {work}")
    programs = {"relax": sys.executable, "trl": trl, "tunix": tunix}
    results = [
        measured(python, f"{name}_{work}.py", model_dir, steps)
        for name, python in programs.items()
        if python
    ]
    print("| program | seconds per step | fastest | ratio | tokens per row |")
    print("|---|---|---|---|---|")
    for result in results:
        ratio = result["median_s"] / results[0]["median_s"]
        print(
            f"| {result['program']} | {result['median_s']:.1f} | {result['fastest_s']:.1f} "
            f"| {ratio:.1f} | {result['tokens']} |"
        )


if __name__ == "__main__":
    fire.Fire(main)
