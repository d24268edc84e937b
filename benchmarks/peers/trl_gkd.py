"""Distillation with TRL: `python benchmarks/peers/trl_gkd.py MODEL_DIR`; see compare.py.

Float32, no gradient checkpointing (faster here), completions from the data.
"""

import sys
import tempfile
import time

import task
import torch
import transformers
import trl
from datasets import Dataset
from trl.experimental.gkd import GKDConfig, GKDTrainer


class Times(transformers.TrainerCallback):
    """Seconds of every step."""

    def __init__(self):
        self.seconds, self.begun = [], 0.0

    def on_step_begin(self, *args, **kwargs):
        self.begun = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self.begun)


def main(model_dir: str, steps: int = 8) -> None:
    """Trains a few steps of `task.DIALOGUES` rows; the teacher is the model itself."""
    times = Times()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    student, teacher = (
        transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        for _ in range(2)
    )
    rows = task.dialogues(task.DIALOGUES * steps)
    with tempfile.TemporaryDirectory() as folder:
        config = GKDConfig(
            output_dir=folder,
            per_device_train_batch_size=task.DIALOGUES,
            lmbda=0.0,
            beta=0.5,
            max_length=512,
            learning_rate=task.LEARNING_RATE,
            lr_scheduler_type="constant",
            max_steps=steps,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        )
        trainer = GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=config,
            train_dataset=Dataset.from_list([{"messages": row} for row in rows]),
            processing_class=tokenizer,
            callbacks=[times],
        )
        trainer.train()
    task.report(f"TRL {trl.__version__}", times.seconds, task.lengths(tokenizer, rows))


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
