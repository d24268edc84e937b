"""Runs of `run_grpo.py` for the tests: a tiny model, rewards in a file, a job of a few updates."""

import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import runs

from relax.config import GRPOConfig, cli
from relax.data import arithmetic_tokenizer
from relax.models import Transformer, TransformerConfig, save_pretrained

SCRIPT = runs.ROOT / "run_grpo.py"
# Two functions of a file, so that they run in a worker: it says who it is.
REWARDS = """
import os, time
from pathlib import Path

PIDS = Path(__file__).with_suffix(".pids")

def tell():
    with PIDS.open("a") as file:
        print(os.getpid(), os.getppid(), file=file)

def hangs(completions):
    tell()
    time.sleep(600)

def vowels(completions, **kwargs):
    tell()
    return [float(sum(ord(c) % 2 for c in completion)) for completion in completions]

def digits(completions, answer):
    return [None if a is None else float(a in c) for c, a in zip(completions, answer)]

def solved(completions, solution):
    return [0.0] * len(completions)

def one_fails(completions):
    return [float("nan")] + [1.0] * (len(completions) - 1)

def by_position(completions, /):
    return [0.0] * len(completions)
"""
JOB = {
    "per_device_train_batch_size": 4,
    "steps_per_generation": 2,
    "num_generations": 4,
    "max_completion_length": 8,
    "reward_weights": "0.7,0.3",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 3,
    "max_steps": 8,
    "save_steps": 4,
    "test_size": 2,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "num_generations_eval": 2,
}


def make_job(directory: Path) -> dict:
    """Writes a model, rows and rewards, and returns the fields of a job on them."""
    shape = TransformerConfig(
        vocab_size=261,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = Transformer(shape)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    rewards = directory / "rewards.py"
    rewards.write_text(REWARDS)
    return {
        "model_name_or_path": save_pretrained(
            directory / "tiny", model, params, arithmetic_tokenizer()
        ),
        "dataset_name": runs.write_rows(directory / "rows.jsonl", questions(12)),
        "reward_funcs": f"{rewards}:vowels,{rewards}:digits",
        **JOB,
    }


def questions(count: int) -> list[dict]:
    return [{"prompt": row["prompt"], "answer": row["completion"]} for row in runs.additions(count)]


def start(*args: str, fault: str | None = None) -> runs.Child:
    """Starts `run_grpo.py ...` in a forked process."""
    return runs.fork(*args, fault=fault, script=SCRIPT)


def call(**fields) -> int:
    """The same in this process: the exit code."""
    from run_grpo import main

    try:
        cli.run(GRPOConfig, main, runs.flags(**fields))
    except SystemExit as stop:
        return stop.code
    return 0


def outcome(output_dir: Path) -> dict:
    """All that must be the same after a run; the seconds of its phases are not."""
    found = without_times(runs.outcome(output_dir))
    found["completions"] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (output_dir / "completions").iterdir()
    }
    return found


def without_times(tree):
    if isinstance(tree, dict):
        return {k: without_times(v) for k, v in tree.items() if not k.startswith("time/")}
    return [without_times(x) for x in tree] if isinstance(tree, list) else tree
