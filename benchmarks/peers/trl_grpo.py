"""GRPO with TRL: `python benchmarks/peers/trl_grpo.py MODEL_DIR`; see compare.py.

Float32, no gradient checkpointing (faster here), generation by transformers.
"""

import sys
import tempfile
import time

import task
import torch
import transformers
import trl
from datasets import Dataset


def right(completions, answer, **columns):
    texts = [completion[0]["content"] for completion in completions]
    return [task.reward(text, a) for text, a in zip(texts, answer, strict=True)]


class Times(transformers.TrainerCallback):
    """Seconds of every step, and the mean length of its completions."""

    def __init__(self):
        self.seconds, self.lengths, self.begun = [], [], 0.0

    def on_step_begin(self, *args, **kwargs):
        self.begun = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self.begun)

    def on_log(self, args, state, control, logs, **kwargs):
        if "completions/mean_length" in logs:
            self.lengths.append(logs["completions/mean_length"])


def main(model_dir: str, steps: int = 8) -> None:
    """Trains for a few steps; a step is a rollout, its rewards and its update."""
    times = Times()
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=task.PROMPTS * task.COMPLETIONS,
            num_generations=task.COMPLETIONS,
            max_completion_length=task.NEW_TOKENS,
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
        model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        trainer = trl.GRPOTrainer(
            model=model,
            args=config,
            reward_funcs=[right],
            train_dataset=Dataset.from_list(task.rows(task.PROMPTS * steps)),
            processing_class=transformers.AutoTokenizer.from_pretrained(model_dir),
            callbacks=[times],
        )
        trainer.train()
    task.report(f"TRL {trl.__version__}", times.seconds, times.lengths)


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
