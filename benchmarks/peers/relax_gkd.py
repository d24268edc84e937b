"""Distillation with ReLax: `python benchmarks/peers/relax_gkd.py MODEL_DIR`; see compare.py."""

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import task
import transformers

SCRIPT = Path(__file__).resolve().parents[2] / "run_distill.py"


def main(model_dir: str, steps: int = 8) -> None:
    """Runs the command that a user would and reads its metrics."""
    rows = task.dialogues(task.DIALOGUES * steps)
    with tempfile.TemporaryDirectory() as folder:
        data, output = Path(folder, "rows.jsonl"), Path(folder, "run")
        data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
        options = {
            "model_name_or_path": model_dir,
            "teacher_model_name_or_path": model_dir,
            "dataset_name": data,
            "lmbda": 0,
            "beta": 0.5,
            "per_device_train_batch_size": task.DIALOGUES,
            "gradient_checkpointing": False,
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
        ends = [line["elapsed_s"] for line in lines if "elapsed_s" in line and "loss" in line]
    seconds = [end - begin for begin, end in zip([0.0, *ends], ends, strict=False)]
    version = importlib.metadata.version("relax-trainers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    task.report(f"ReLax {version}", seconds, task.lengths(tokenizer, rows))


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
