"""Two real processes over loopback: the run of one process, a peer that dies, and a relaunch."""

import functools
import json
import os
import re
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
import runs
from golden.trl_cases import write_tiny_llama
from two_processes import (
    SFT,
    ended,
    losses,
    port,
    slow_steps,
    slow_steps_and_last_words,
    start_two,
    weights,
)

from relax import files
from relax.errors import ConfigError
from relax.files import list_steps
from relax.parallel import processes

pytestmark = [pytest.mark.timeout(290), pytest.mark.programs]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    directory = tmp_path_factory.mktemp("processes")
    rows = runs.write_rows(directory / "rows.jsonl", runs.additions(40))
    return directory, SFT | {"dataset_name": rows}


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


def test_when_one_is_killed_the_other_ends_with_an_error_and_a_relaunch_goes_on_exactly(two, job):
    directory, fields = job
    first, second = start_two(
        directory / "killed", fields | {"save_async": True}, faults=(None, "step:5")
    )
    assert second.end() == -9
    assert first.end() != 0
    more = {"resume": "auto", "save_async": True}
    children = start_two(directory / "killed", fields | more)
    assert ended(children) == [0, 0], [child.stderr[-2000:] for child in children]
    assert weights(directory / "killed") == weights(two[0])
    assert losses(directory / "killed") == losses(two[0])


@pytest.mark.parametrize(
    "signum, to",
    [
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGTERM, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_any_process_saves_and_ends_all_and_a_relaunch_goes_on_exactly(
    two, job, signum, to
):
    directory, fields = job
    output = directory / f"stopped by {signum} to {to}"
    children = start_two(output, fields, before=(slow_steps, slow_steps_and_last_words))
    children[0].wait_for("step 1/6")
    children[to].process.send_signal(signum)
    assert ended(children) == [128 + signum] * 2, [child.stderr[-2000:] for child in children]
    assert list_steps(output / "checkpoints")[-1] < 6
    children = start_two(output, fields | {"resume": "auto"})
    assert ended(children) == [0, 0], [child.stderr[-2000:] for child in children]
    assert weights(output) == weights(two[0]) and losses(output) == losses(two[0])


@pytest.mark.parametrize("gone", [0, 1])
def test_a_process_that_waits_for_nobody_ends_with_an_error_when_another_is_gone(gone):
    program = """
import os, sys, time
from relax.parallel import processes
number, gone, address = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
processes.start(address, 2, number, heartbeat_s=10, timeout_s=60)
if number == gone:
    os._exit(9)
time.sleep(60)
"""
    address = f"127.0.0.1:{port()}"
    children = [
        runs.Child([sys.executable, "-c", program, str(number), str(gone), address])
        for number in range(2)
    ]
    codes = ended(children)
    assert codes[gone] == 9 and codes[1 - gone] != 0, [child.stderr for child in children]


def test_a_port_where_another_program_listens_is_refused_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"{address}, and another .* answers there already"):
            processes.start(address, num_processes=2, process_id=0)


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_waits_for_the_others_says_so_at_once_and_again(number):
    program = f"""
from relax.parallel import processes
processes._SAY_EVERY_S = 0.5
processes.start("127.0.0.1:{port()}", 2, {number}, timeout_s=60)
"""
    child = runs.Child([sys.executable, "-c", program])
    child.wait_for(f"process {number} of 2 waits for the others at 127.0.0.1:")
    child.wait_for("so far")
    assert child.end(signal.SIGKILL) == -9


@pytest.mark.parametrize("environment", [{}, {"SLURM_JOB_ID": str(os.getpid())}])
def test_who_takes_part_is_read_from_the_environment_of_a_cluster(environment, monkeypatch):
    """Two tasks of SLURM come together; where no cluster tells, one sentence says what to do."""
    program = (
        "from relax.parallel import processes; processes.start('auto', heartbeat_s=10); "
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


@pytest.mark.parametrize("which", ["rows", "model"])
def test_processes_whose_files_differ_under_one_name_end_with_one_sentence(job, tmp_path, which):
    """Each host has its own disk: here the second process finds other bytes at the same path."""
    directory, fields = job
    if which == "model":
        model = write_tiny_llama(tmp_path / "model")
        fields, name = fields | {"model_name_or_path": model}, "model.safetensors"
    else:
        name = "rows.jsonl"
    children = start_two(directory / which, fields, before=(None, functools.partial(other, name)))
    assert ended(children) == [2, 2], [child.stderr[-2000:] for child in children]
    for child in children:
        assert re.search(f"the content of .*{which[:4]}.* in process 0 and .* in p", child.stderr)
    assert not (directory / which / "config.json").exists()


def other(name: str) -> None:
    """Reads another last byte in files of a name."""
    file_crc = files.file_crc
    files.file_crc = lambda path: file_crc(path) + (path.name == name)


def test_tokens_that_differ_between_processes_end_with_one_sentence(job):
    """Rows from Python have no file: what they become is compared."""
    directory, fields = job
    children = start_two(directory / "tokens", fields, before=(None, other_tokens))
    assert ended(children) == [2, 2], [child.stderr[-2000:] for child in children]
    for child in children:
        assert "the tokens of training and evaluation is" in child.stderr


def other_tokens() -> None:
    from relax.engine.recipes import sft

    crc32 = sft.zlib.crc32
    sft.zlib = SimpleNamespace(crc32=lambda data, crc=0: crc32(data, crc) ^ 1)


def test_processes_with_different_options_end_with_one_sentence(job):
    directory, fields = job
    children = start_two(directory / "mixed", fields, other={"learning_rate": 0.5})
    assert ended(children) == [2, 2]
    for child in children:
        assert re.search("learning_rate is .* in process 0 and 0.5 in process 1", child.stderr)
    assert not (directory / "mixed" / "config.json").exists()


@pytest.mark.parametrize(
    "error, words",
    [
        (jax.errors.JaxRuntimeError("UNAVAILABLE: ..."), "start all of them again"),
        (
            ValueError("UNKNOWN: Gloo AllGather failed: ... reset by peer"),
            "start all of them again",
        ),
        (ConnectionResetError("reset by peer"), "ConnectionResetError"),  # of a judge's web page
    ],
)
def test_an_error_in_one_process_ends_it_with_its_traceback_and_an_error_code(error, words):
    line, code = processes._last_words(error)
    assert code == 1 and words in line and type(error).__name__ in line
    assert ("another process of the run" in line) == (type(error) is not ConnectionResetError)
