"""Completions from the command line: `python -m relax.sampling --help`."""

import os

from relax.config.cli import run
from relax.tools.sample.config import SampleConfig


def main(config: SampleConfig) -> None:
    # It would say that PyTorch is missing, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from relax.parallel.cpu import prepare_cpu

    prepare_cpu()  # before jax starts its threads
    from relax.tools.sample.sample import sample

    sample(config)


if __name__ == "__main__":
    run(SampleConfig, main)
