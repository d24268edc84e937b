"""GRPO with ReLax: `python benchmarks/peers/relax_grpo.py MODEL_DIR`; see compare.py."""

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import task

SCRIPT = Path(__file__).resolve().parents[2] / "run_grpo.py"


def main(model_dir: str, steps: int = 8) -> None:
    """Runs the command that a user would and reads its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        data, output = Path(folder, "rows.jsonl"), Path(folder, "run")
        rows = task.rows(task.PROMPTS * steps)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {
            "model_name_or_path": model_dir,
            "dataset_name": data,
            "reward_funcs": "last_number_match",
            "num_generations": task.COMPLETIONS,
            "per_device_train_batch_size": task.PROMPTS * task.COMPLETIONS,
            "max_completion_length": task.NEW_TOKENS,
            "learning_rate": task.LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "max_steps": steps,
            "logging_steps": 1,
            "save_strategy": "no",
            "output_dir": output,
        }
        flags = [f"--{name}={value}" for name, value in options.items()]
        subprocess.run([sys.executable, SCRIPT, *flags], check=True, stdout=sys.stderr)
        lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        steps_logged = [line for line in lines if "step_time" in line]
    version = importlib.metadata.version("relax-trainers")
    seconds = [line["step_time"] for line in steps_logged]
    lengths = [line["completions/mean_length"] for line in steps_logged]
    task.report(f"ReLax {version}", seconds, lengths)


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
