"""Runs of `run_rl.py` for the tests: the tiny model and the rewards of those of GRPO."""

from pathlib import Path

import grpo_runs
import runs

from relax.config import PPOConfig, cli

SCRIPT = runs.ROOT / "run_rl.py"
# A critic of its own, everything that is steered by what is measured, and four updates a rollout.
PPO = {
    "num_ppo_epochs": 2,
    "num_mini_batches": 2,
    "value_model": "policy",
    "critic_learning_rate": 3e-3,
    "critic_warmup_steps": 2,
    "kl_target": 0.01,
    "kl_horizon": 100.0,
    "target_kl": 0.01,
    "max_steps": 12,
}


def make_job(directory: Path) -> dict:
    """Writes a model, rows and rewards, and returns the fields of a job on them."""
    job = grpo_runs.make_job(directory) | PPO
    job.pop("steps_per_generation")
    return job


def call(**fields) -> int:
    """Runs `run_rl.py` in this process: the exit code."""
    from run_rl import main

    try:
        cli.run(PPOConfig, main, runs.flags(**fields))
    except SystemExit as stop:
        return stop.code
    return 0
