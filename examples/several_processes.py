"""One run on two processes: `python examples/several_processes.py`.

Starts `run_sft.py` twice on this machine, each process with half of every batch. On two hosts it is
the same command on each, with the address of host 0 as the coordinator; see docs/scale.md.
"""

import argparse
import contextlib
import random
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "run_sft.py"
PROCESSES = 2


def free_port() -> int:
    """A port below those that the system itself gives to connections, this run's own among them."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    coordinator = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory, "run")
        options = {
            "mesh": f"data={PROCESSES}",
            "coordinator": coordinator,
            "num_processes": PROCESSES,
            "per_device_train_batch_size": 8,  # so an update has 16 rows
            "max_steps": steps,
            "eval_strategy": "no",
            "save_strategy": "no",
            "output_dir": output,
        }
        command = [sys.executable, SCRIPT, *(f"--{k}={v}" for k, v in options.items())]
        children = [
            subprocess.Popen([*command, f"--process_id={number}"]) for number in range(PROCESSES)
        ]
        codes = [child.wait() for child in children]
        if any(codes):
            raise SystemExit(f"the processes ended with exit codes {codes}")
        metrics = (output / "metrics.jsonl").read_text().splitlines()
        print(f"{PROCESSES} processes, {steps} updates; last line of metrics.jsonl:\n{metrics[-1]}")


if __name__ == "__main__":
    main()
