"""Two real processes over loopback: the run of one process, a peer that dies, and a relaunch."""

import json
import os
import re
import socket
import sys
from pathlib import Path

import jax
import pytest
import runs

from relax.errors import RelaxError
from relax.files import list_steps
from relax.parallel import processes

pytestmark = pytest.mark.timeout(290)
JOB = {
    "per_device_train_batch_size": 4,
    "max_steps": 6,
    "save_steps": 2,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "heartbeat_s": 10,
    "test_size": 8.0,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "metric_for_best_model": "eval_loss",
    "load_best_model_at_end": True,
}


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    directory = tmp_path_factory.mktemp("processes")
    rows = runs.write_rows(directory / "rows.jsonl", runs.additions(40))
    return directory, JOB | {"dataset_name": rows}


def start_two(output: Path, fields: dict, *, fault: str | None = None, other=None):
    """Process 0, and process 1 which meets a fault or has other fields."""
    address = f"127.0.0.1:{port()}"
    children = []
    for number in range(2):
        own = fields | ((other or {}) if number else {})
        arguments = runs.flags(
            **own, output_dir=output, mesh="data=2", coordinator=address, num_processes=2,
            process_id=number,
        )  # fmt: skip
        children.append(runs.fork(*arguments, fault=fault if number else None))
    return children


def ended(children) -> list[int]:
    return [child.end() for child in children]


def losses(output: Path) -> list[float]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def weights(output: Path) -> bytes:
    return (output / "final" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def two(job):
    """A run of two processes."""
    directory, fields = job
    children = start_two(directory / "two", fields)
    assert ended(children) == [0, 0], [child.stderr[-2000:] for child in children]
    return directory / "two", children


def test_two_processes_make_the_losses_of_one(two, job):
    """Each of two loads and trains on half of every batch."""
    directory, fields = job
    fields = fields | {"per_device_train_batch_size": 8, "output_dir": directory / "one"}
    fields.pop("heartbeat_s")
    child = runs.fork(*runs.flags(**fields))
    assert child.end() == 0, child.stderr
    wanted, found = losses(directory / "one"), losses(two[0])
    assert len(found) == 6
    assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 1e-5


def test_the_best_state_lies_where_all_processes_find_it(two):
    output, _ = two
    saved = json.loads((output / "status.json").read_text())["last_checkpoint"]
    assert saved["step"] == 6 and Path(saved["path"]).is_dir()
    (best,) = list_steps(output / "best")
    assert sorted(p.name for p in (output / "best").iterdir()) == [str(best)]


def test_only_process_0_speaks_and_writes(two):
    _, (first, second) = two
    assert "of 2 processes" in first.stdout
    said = [line for line in second.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert said == []


def test_when_one_is_killed_the_other_ends_with_a_sentence_and_a_relaunch_goes_on_exactly(two, job):
    directory, fields = job
    first, second = start_two(directory / "killed", fields | {"save_async": True}, fault="step:5")
    assert second.end() == -9
    assert first.end() == 75
    said = [line for line in first.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "another process of the run is gone" in said[0], first.stderr
    more = {"resume": "auto", "save_async": True}
    children = start_two(directory / "killed", fields | more)
    assert ended(children) == [0, 0], [child.stderr[-2000:] for child in children]
    assert weights(directory / "killed") == weights(two[0])
    assert losses(directory / "killed") == losses(two[0])


@pytest.mark.parametrize("gone", [0, 1])
def test_a_process_that_waits_for_nobody_ends_with_a_sentence_when_another_is_gone(gone):
    program = """
import os, sys, time
from relax import distributed
number, gone, address = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
processes.start(address, 2, number, heartbeat_s=10)
if number == gone:
    os._exit(9)
time.sleep(60)
"""
    address = f"127.0.0.1:{port()}"
    children = [
        runs.Child([sys.executable, "-c", program, str(number), str(gone), address])
        for number in range(2)
    ]
    wanted = [75, 75]
    wanted[gone] = 9
    assert ended(children) == wanted
    lines = children[1 - gone].stderr.splitlines()  # the runtime's threads write there, too
    (said,) = [line for line in lines if line.startswith("error:")]
    assert "another process of the run is gone" in said


@pytest.mark.parametrize("environment", [{}, {"SLURM_JOB_ID": str(os.getpid())}])
def test_who_takes_part_is_read_from_the_environment_of_a_cluster(environment, monkeypatch):
    """Two tasks of SLURM come together; where no cluster tells, one sentence says what to do."""
    program = (
        "from relax import distributed; processes.start('auto', heartbeat_s=10); "
        "print(processes.gather(processes.index()))"
    )
    children = []
    for number in range(2 if environment else 1):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
            monkeypatch.setenv("SLURM_STEP_NODELIST", "localhost")
            monkeypatch.setenv("SLURM_NTASKS", "2")
            monkeypatch.setenv("SLURM_PROCID", str(number))
            monkeypatch.setenv("SLURM_LOCALID", str(number))
        children.append(runs.Child([sys.executable, "-c", program]))
    if environment:
        assert ended(children) == [0, 0], children[0].stderr[-2000:]
        assert all("[0, 1]" in child.stdout for child in children)
    else:
        assert ended(children) == [1]
        assert "coordinator auto is for SLURM, MPI, GKE and TPU pods" in children[0].stderr


def test_processes_with_different_options_end_with_one_sentence(job):
    directory, fields = job
    children = start_two(directory / "mixed", fields, other={"learning_rate": 0.5})
    assert ended(children) == [2, 2]
    for child in children:
        assert re.search("learning_rate is .* in process 0 and 0.5 in process 1", child.stderr)
    assert not (directory / "mixed" / "config.json").exists()


@pytest.mark.parametrize(
    "error, code",
    [
        (jax.errors.JaxRuntimeError("UNAVAILABLE: Gloo: Connection closed by peer"), 75),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), 1),
        (ConnectionResetError("Connection reset by peer"), 1),  # of a judge's web page
    ],
)
def test_only_what_the_runtime_says_of_a_peer_counts_as_one_that_is_gone(error, code):
    wrapped = RelaxError("a callback failed")
    wrapped.__cause__ = error
    assert processes._last_words(error)[1] == processes._last_words(wrapped)[1] == code
