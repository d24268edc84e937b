"""Runs of two processes over loopback, as the tests and the campaigns start them."""

import contextlib
import json
import random
import socket
import time
from pathlib import Path

import runs

from relax.parallel import processes
from relax.trainers import Trainer

SFT = {
    "per_device_train_batch_size": 4,
    "max_steps": 6,
    "save_steps": 2,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "heartbeat_s": 10,
    "grace_s": 120,  # a save may take long where many tests run at once
    "test_size": 8.0,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "metric_for_best_model": "eval_loss",
    "load_best_model_at_end": True,
}


def port() -> int:
    """A port of loopback that nobody uses, and that the system gives to nobody who asks for any.

    The ports that it gives out (32768 and up) are also those of the connections between processes:
    one of another test could take the port before process 0 listens there.
    """
    while True:
        number = random.randrange(10_000, 32_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", number))
            return number


def start_two(
    output: Path,
    fields: dict,
    *,
    faults=(None, None),
    before=(None, None),
    other: dict | None = None,
    script: Path = runs.SCRIPT,
    address: str | None = None,
) -> list[runs.Child]:
    """Starts processes 0 and 1 of a run.

    Args:
      faults, before: of each process, see `runs.fork`.
      other: fields that are different in process 1.
      address: of the coordinator; None: a free port.
    """
    address = address or f"127.0.0.1:{port()}"
    children = []
    for number in range(2):
        own = fields | ((other or {}) if number else {})
        arguments = runs.flags(
            **own, output_dir=output, mesh="data=2", coordinator=address, num_processes=2,
            process_id=number,
        )  # fmt: skip
        how = {"fault": faults[number], "before": before[number]}
        children.append(runs.fork(*arguments, script=script, **how))
    return children


def slow_steps():
    """Leaves time for a signal between two steps."""
    train_on = Trainer.make_batches

    def make_batches(self, state, item):
        time.sleep(1)
        return train_on(self, state, item)

    Trainer.make_batches = make_batches


def slow_steps_and_last_words():
    """As `slow_steps`, and comes to its end later than the other process."""
    slow_steps()
    last_words = processes._last_words

    def late(error):
        time.sleep(3)
        return last_words(error)

    processes._last_words = late


def ended(children) -> list[int]:
    """The exit codes."""
    return [child.end() for child in children]


def losses(output: Path) -> list[float]:
    """The losses that a run has logged."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def weights(output: Path) -> bytes:
    """The file of the exported weights."""
    return (output / "final" / "model.safetensors").read_bytes()
