"""Loss curves and state of optimizers on the embedded task, sums, from one initialisation.

    python benchmarks/optimizers.py [--steps 200] [OPTIM ...]

For each optimizer the bytes of its state and the mean loss of every quarter of the run; and for all
but the first how far its losses are from those of the first, in windows of ten updates.
"""

import argparse
import io
import json
import tempfile

import jax
import numpy as np
from rich.console import Console

from relax.config import SFTConfig
from relax.engine import TrainerEngine


def run(optim: str, steps: int, **fields) -> tuple[np.ndarray, int, float]:
    """Losses of all updates, bytes of the optimizer's state, share of sums that are right."""
    with tempfile.TemporaryDirectory() as directory:
        config = SFTConfig().replace(
            **SFTConfig.demo,
            optim=optim,
            output_dir=f"{directory}/run",
            save_strategy="no",
            **fields,
        )
        config = config.replace(max_steps=steps, num_train_epochs=3, logging_steps=1.0)
        result = TrainerEngine(console=Console(file=io.StringIO())).run_job(config)
        lines = (result.output_dir / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(result.state.opt_state))
    return np.array(losses), size, result.metrics.get("exact_match", float("nan"))


def main() -> None:
    """Prints a line per optimizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("optim", nargs="*", default=["adamw", "adamw_8bit"])
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    first = None
    for optim in options.optim:
        losses, size, right = run(optim, options.steps)
        quarters = " ".join(f"{part.mean():.4f}" for part in np.array_split(losses, 4))
        line = f"{optim:20} state {size / 1e6:6.2f} MB  losses {quarters}  right {right:.3f}"
        smooth = losses[: len(losses) // 10 * 10].reshape(-1, 10).mean(axis=1)
        if first is not None:
            off = np.abs(smooth / first - 1)
            line += f"  off by {off.mean():.2%} in the mean, {off.max():.2%} at most"
        first = smooth if first is None else first
        print(line, flush=True)


if __name__ == "__main__":
    main()
