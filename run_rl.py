"""PPO from the command line: `python run_rl.py --help`."""

import os

from relax.config import PPOConfig
from relax.config.cli import run


def main(config: PPOConfig) -> None:
    # It would say that PyTorch is missing, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from relax.parallel.cpu import prepare_cpu

    prepare_cpu()  # before jax starts its threads
    from relax.engine.engine import TrainerEngine

    TrainerEngine().run_job(config)


if __name__ == "__main__":
    run(PPOConfig, main)
