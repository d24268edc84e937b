"""A run that is killed or stopped anywhere and started again ends as one that never was."""

import hashlib
import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from runs import (
    SCRIPT,
    TIMEOUT_S,
    Child,
    Forked,
    additions,
    call,
    end_all,
    environment,
    finish,
    flags,
    fork,
    killed,
    kills,
    metrics,
    model_bytes,
    outcome,
    start,
    write_rows,
)

from relax.engine import memory
from relax.files import list_steps
from relax.trainers import Trainer

pytestmark = pytest.mark.programs

STEPS = 36
# Log lines average over steps 4 to 6, 10 to 12, ...: windows that lie across the checkpoints.
JOB = {
    "test_size": 12,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "pad_to_multiple_of": 16,
    "learning_rate": 1e-3,
    "warmup_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 9,
    "logging_steps": 3,
    "save_steps": 5,
    "save_total_limit": 2,
}


@pytest.fixture(autouse=True)
def no_child_left():
    yield
    end_all()


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> dict:
    rows = write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", additions(84))
    return {"dataset_name": rows, **JOB}


@pytest.fixture(scope="module")
def unbroken(job, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("unbroken") / "run"
    finish(*flags(**job, output_dir=output_dir))
    return output_dir


def test_the_unbroken_run_logs_every_window_and_evaluation_once(unbroken):
    records = metrics(unbroken)
    assert [r["step"] for r in records if "loss" in r] == list(range(3, STEPS + 1, 3))
    assert [r["step"] for r in records if "eval_loss" in r] == [9, 18, 27, 36]
    assert outcome(unbroken)["steps"] == [35, 36]
    training = json.loads((unbroken / "data.json").read_text())["reports"]["training data"]
    assert records[-2]["num_tokens"] == 2 * training["num_tokens"]


# In this order, each start going on from what the one before left.
NAMED = (
    "step:3",  # before anything is saved
    "before_write:1",
    "mid_write:2",  # 5 is saved, 10 is not
    "before_checksums:1",
    "before_rename:1",
    "after_rename:1",  # 10 is saved
    "mid_retention:1",  # 15 is saved, 5 half deleted
    "step:4",
    "trained:1",  # all is trained: nothing may be lost when train() has returned
    "export:1",
)
RANDOM_KILLS = ("random",) * 5


def kill_at_named_points(arguments, output_dir: Path, points) -> list[Path]:
    for number, fault in enumerate(points):
        how = f"--save_async={number % 2 == 0}"  # every other one is written in a thread
        child = fork(*arguments, f"--output_dir={output_dir}", "--resume=auto", how, fault=fault)
        assert killed(child), (fault, child.stdout, child.stderr)
    finish(*arguments, f"--output_dir={output_dir}", "--resume=auto")
    return [output_dir]


def kill_at_random_times(arguments, root: Path, kills: int) -> list[Path]:
    """A kill at some time after the start of the process, or after its first update."""
    rng = random.Random(0)
    runs, hit = [root / "0"], 0
    while True:
        child = fork(*arguments, f"--output_dir={runs[-1]}", "--resume=auto")
        if hit < kills:
            if hit % 3:
                child.wait_for("compiled for")
            time.sleep(rng.uniform(0, 1.5))
            child.process.kill()
        if killed(child):
            hit += 1
            continue
        assert child.process.returncode == 0, child.stderr
        if hit == kills:
            return runs
        runs.append(root / str(len(runs)))


@pytest.mark.timeout(1200)  # a dozen programs, one after the other
@kills(NAMED + RANDOM_KILLS, 1, 2, 3, 5, 6, 8, 9, 10)
def test_kills_end_in_the_bytes_of_an_unbroken_run(job, unbroken, kills, tmp_path):
    """Parameters, optimizer state, position, metrics and the exported model, bit for bit."""
    arguments = flags(**job)
    points = [kill for kill in kills if kill != "random"]
    times = len(kills) - len(points)
    with ThreadPoolExecutor(2) as pool:
        chains = [
            pool.submit(kill_at_named_points, arguments, tmp_path / "named", points),
            pool.submit(kill_at_random_times, arguments, tmp_path / "random", times),
        ]
        runs = [run for chain in chains for run in chain.result()]
    expected = outcome(unbroken)
    for run in runs:
        assert outcome(run) == expected, run


def go_on(child: Child) -> Child:
    """Runs exactly the command that a stopped run printed, through a shell."""
    lines = child.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("stopped"))
    assert lines[at].endswith("To resume:"), lines[at]
    return Child(f"exec {lines[at + 1].strip()}", shell=True)


def test_stopped_runs_print_the_command_that_goes_on_to_the_same_bytes(job, unbroken, tmp_path):
    """By Ctrl-C (exit code 130), then by SIGTERM (143); both finish the step and save it."""
    child = start(*flags(**job, output_dir=tmp_path / "run")).wait_for("step 6/36")
    assert child.end(signal.SIGINT) == 130
    assert "finishing this step, then saving" in child.stderr
    assert "stopped by SIGINT" in child.stderr and "Traceback" not in child.stderr
    step = list_steps(tmp_path / "run" / "checkpoints")[-1]
    assert f"stopped; step {step} is saved." in child.stdout

    child = go_on(child).wait_for(f"resuming after step {step}").wait_for("compiled for")
    assert child.end(signal.SIGTERM) == 143
    assert "stopped by SIGTERM" in child.stderr

    child = go_on(child)
    assert child.end() == 0, child.stderr
    found, expected = outcome(tmp_path / "run"), outcome(unbroken)
    found.pop("steps"), expected.pop("steps")  # the stops left their own
    assert found == expected


# What a test does to the program where no fault point is: a minute spent in native code, as in
# XLA's compiler, where no signal handler runs; or in an evaluation.
def compiling():
    def update(self, state, batch):
        hashlib.pbkdf2_hmac("sha256", b"", b"", 400_000_000)

    Trainer.update = update


def evaluating():
    def evaluate(self, *_):
        print("evaluating", flush=True)
        time.sleep(60)

    Trainer._evaluate = evaluate


# Where the process hangs -> (the fault or the change; what tells that it is there).
PHASES = {
    "data": ("data:1:sleep", None),
    "compile": (compiling, "compiling the train step"),
    "step": ("step:1:sleep", "made one step"),
    "evaluate": (evaluating, "evaluating"),
    "export": ("export:1:sleep", "evaluation loss"),
}


@pytest.fixture(scope="module")
def short_job(job) -> dict:
    steps = {"max_steps": 2, "eval_steps": 2, "save_steps": 1, "warmup_steps": 0}
    return {name: v for name, v in job.items() if name != "num_train_epochs"} | steps


def hang(phase: str, arguments: list[str], output_dir: Path) -> Child:
    """Starts a run that stays in one phase, and waits until it is there."""
    way, sign = PHASES[phase]
    way = {"before": way} if callable(way) else {"fault": way}
    child = fork(*arguments, f"--output_dir={output_dir}", **way)
    if sign is None:
        while not (output_dir / ".lock").exists():
            time.sleep(0.05)
        time.sleep(0.5)
    else:
        child.wait_for(sign)
        time.sleep(0.5)
    return child


def test_sigterm_in_any_phase_ends_with_143_within_the_grace_time(short_job, tmp_path):
    arguments = flags(**short_job, grace_s=2)

    def stop(phase: str) -> tuple[int, float, Child]:
        child = hang(phase, arguments, tmp_path / phase)
        start_s = time.monotonic()
        return child.end(signal.SIGTERM), time.monotonic() - start_s, child

    with ThreadPoolExecutor(3) as pool:
        ends = dict(zip(PHASES, pool.map(stop, PHASES), strict=True))
    for phase, (code, seconds, child) in ends.items():
        assert code == 143, (phase, child.stderr)
        assert seconds < 30, phase  # each would last a minute
        assert "Traceback" not in child.stderr
    assert "rerun the same command to start over" in ends["data"][2].stdout
    assert "step 2 is saved. To resume:" in ends["export"][2].stdout
    for phase in ("compile", "step"):
        assert "did not end within 2 s after SIGTERM" in ends[phase][2].stderr
    # An evaluation is dropped: the state is whole, and saved at once.
    assert "saving now: the work in progress is abandoned" in ends["evaluate"][2].stderr
    assert list_steps(tmp_path / "evaluate" / "checkpoints") == [1, 2]


def test_two_ctrl_c_end_at_once_and_a_second_run_is_refused_meanwhile(short_job, tmp_path, capsys):
    arguments = flags(**short_job)
    child = hang("step", arguments, tmp_path / "run")
    assert call(*arguments, f"--output_dir={tmp_path / 'run'}", "--resume=auto") == 2
    assert f"is locked by process {child.process.pid}" in capsys.readouterr().err
    child.process.send_signal(signal.SIGINT)
    child.wait_for("press Ctrl-C again to stop at once")
    time.sleep(0.3)
    assert child.end(signal.SIGINT) == 130
    assert "stopped at once; earlier checkpoints are intact" in child.stderr
    assert list_steps(tmp_path / "run" / "checkpoints") == [1]


def compiling_in_xla():
    """As for a large model: before the first update, for longer than until the signal."""

    def update_sizes(trainer, state, batch):
        def unrolled(x):
            for i in range(200):
                x = jnp.sin(x) @ x + i
            return x

        jax.config.update("jax_enable_compilation_cache", False)
        jax.config.update("jax_disable_most_optimizations", False)
        lowered = jax.jit(unrolled).lower(jnp.ones((64, 64)))
        print("XLA is at work", flush=True)
        lowered.compile()
        raise AssertionError("compiled before the signal came")

    memory.update_sizes = update_sizes


def test_ctrl_c_while_xla_compiles_ends_with_130_and_nothing_is_torn_down_under_it(
    short_job, tmp_path
):
    """The end of an interpreter destroys what the compiler's threads still use (signal 11)."""
    arguments = flags(**short_job, output_dir=tmp_path / "run")
    child = fork(*arguments, before=compiling_in_xla).wait_for("XLA is at work")
    time.sleep(0.3)
    assert child.end(signal.SIGINT) == 130, child.stderr
    assert "compiled before" not in child.stderr
    assert "--resume auto" in child.stdout


@pytest.fixture(scope="module")
def short_run(short_job, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("short") / "run"
    assert call(*flags(**short_job, output_dir=output_dir)) == 0
    return output_dir


def test_a_run_goes_on_when_the_reader_of_its_output_goes_away(short_job, short_run, tmp_path):
    """`| head`, or a `| tee` that dies."""
    process = Forked(SCRIPT, *flags(**short_job, output_dir=tmp_path / "run"))
    process.stdout.readline()
    process.stdout.close()
    with process.stderr:
        said = process.stderr.read()
    assert process.wait(TIMEOUT_S) == 0, said
    assert said.count("standard output is gone (Broken pipe): the run continues without it") == 1
    assert outcome(tmp_path / "run") == outcome(short_run)


def test_a_run_whose_terminal_closes_saves_and_ends(short_job, tmp_path):
    terminal, end = pty.openpty()
    many = {"max_steps": 5000, "eval_steps": 5000, "save_steps": 5000}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *flags(**short_job | many, output_dir=tmp_path / "run")],
        stdout=end, stderr=end, stdin=end, env=environment(), cwd=SCRIPT.parent,
    )  # fmt: skip
    os.close(end)
    said = b""
    while b"made one step" not in said:
        said += os.read(terminal, 1000)
    os.close(terminal)
    process.send_signal(signal.SIGHUP)
    try:
        assert process.wait(TIMEOUT_S) == 128 + signal.SIGHUP
    finally:
        process.kill()
    (step,) = list_steps(tmp_path / "run" / "checkpoints")
    assert 0 < step < 5000


def copy(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to / "run"))


def test_resume_takes_the_path_of_a_checkpoint_into_another_directory(
    short_job, short_run, tmp_path, capsys
):
    checkpoint = short_run / "checkpoints" / "1"
    arguments = flags(**short_job, output_dir=tmp_path / "other", resume=checkpoint)
    assert call(*arguments) == 0
    assert "resuming after step 1" in capsys.readouterr().out
    assert model_bytes(tmp_path / "other") == model_bytes(short_run)
    assert outcome(tmp_path / "other")["leaves"] == outcome(short_run)["leaves"]


def test_a_path_that_is_no_checkpoint_is_refused_with_the_one_that_was_meant(
    short_job, short_run, tmp_path, capsys
):
    assert call(*flags(**short_job, output_dir=tmp_path / "other", resume=short_run)) == 2
    said = capsys.readouterr().err
    assert f"holds no relax_state.json. Did you mean '{short_run}/checkpoints/2'?" in said


def test_a_changed_field_is_refused_with_the_difference_until_it_is_allowed(
    short_job, short_run, tmp_path, capsys
):
    run = copy(short_run, tmp_path)
    arguments = flags(**short_job | {"learning_rate": 5e-4}, output_dir=run, resume="auto")
    assert call(*arguments) == 2
    said = capsys.readouterr().err
    assert "learning_rate: 0.001 -> 0.0005" in said
    assert "--allow_config_change learning_rate" in said
    assert outcome(run) == outcome(short_run)
    assert call(*arguments, "--allow_config_change=learning_rate") == 0
    assert (
        "changed since the run started: learning_rate: 0.001 -> 0.0005" in capsys.readouterr().out
    )


def test_changed_data_is_refused(short_job, short_run, tmp_path, capsys):
    run, rows = copy(short_run, tmp_path), Path(short_job["dataset_name"])
    before = rows.read_bytes()
    try:
        write_rows(rows, [*additions(83), {"prompt": "1+1=", "completion": "3"}])
        assert call(*flags(**short_job, output_dir=run, resume="auto")) == 2
    finally:
        rows.write_bytes(before)
    said = capsys.readouterr()
    assert "a resumed run must train on the same data as before" in said.err
    assert "compiling" not in said.out


DAMAGES = {
    "empty": b"",
    "cut": b'{"digest": "0',
    "list": b"[1]",
    "number": b"7",
    "no key": b"{}",
    "wrong value": b'{"digest": 7, "seed": [], "crc32": 1, "files": 3, "leaves": "x"}',
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "no text": b"\xff\xfe\0",
    "directory": None,
}


@pytest.mark.filterwarnings("always")  # as outside of tests
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_of_a_run_is_named_with_what_to_do(
    how, short_job, short_run, tmp_path, capsys
):
    """data.json and config.json refuse, a checkpoint falls back to the one before it."""
    run = copy(short_run, tmp_path)
    arguments = flags(**short_job, output_dir=run, resume="auto")

    def damage(name: str) -> None:
        (run / name).unlink()
        if DAMAGES[how] is None:
            (run / name).mkdir()
        else:
            (run / name).write_bytes(DAMAGES[how])

    def resumed(code: int, *more: str) -> str:
        assert call(*arguments, *more) == code
        said = capsys.readouterr()
        assert "Traceback" not in said.err and "compiling" not in said.out
        return " ".join((said.out + said.err).split())

    damage("data.json")
    said = resumed(2)
    assert f"'{run}/data.json' cannot be read" in said
    assert f"--config {run}/config.json --resume auto --allow_config_change dataset_name" in said
    if how == "directory":
        (run / "data.json").rmdir()
    assert "resuming after step 2" in resumed(0, "--allow_config_change=dataset_name")

    damage("config.json")
    if how not in ("no key", "directory"):  # {} is a configuration of defaults
        said = resumed(2)
        assert "the configuration of the run to resume cannot be read" in said
        assert f"{run}/config.json: " in said and "--resume auto" in said
    shutil.rmtree(run)
    copy(short_run, tmp_path)
    damage("checkpoints/2/checksums.json")
    damage("checkpoints/1/relax_state.json")
    said = resumed(2)
    assert f"checkpoint '{run}/checkpoints/2' is damaged: file checksums.json" in said
    assert f"checkpoint '{run}/checkpoints/1' is damaged: file relax_state.json" in said
    assert "no intact checkpoint" in said and "Start a new run" in said


@pytest.mark.filterwarnings("always")
def test_missing_files_of_a_run_are_reported_and_damaged_metrics_and_status_lose_no_run(
    short_job, short_run, tmp_path, capsys
):
    run = copy(short_run, tmp_path)
    (run / "data.json").unlink()
    (run / "config.json").unlink()
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join([b"[1\xff\n", *lines[1:]]))
    for damage in (b"{", b"[" * 100_000, b'{"warnings": 1, "results": [], "seconds": {"a": "b"}}'):
        (run / "status.json").write_bytes(damage)
        assert call(*flags(**short_job, output_dir=run, resume="auto")) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "status.json' cannot be read" in said or b"seconds" in damage
        assert "metrics.jsonl' is damaged in line 1, which reports leave out" in said
        if damage == b"{":
            assert "config.json' is missing: it is not checked that the run resumes with" in said
            assert "data.json' is missing: it is not checked that the run resumes with" in said
    assert model_bytes(run) == model_bytes(short_run)


def test_a_finished_run_that_is_resumed_stays_as_it_is(short_job, short_run, tmp_path, capsys):
    run = copy(short_run, tmp_path)
    assert call(*flags(**short_job, output_dir=run, resume="auto")) == 0
    assert "compiling" not in capsys.readouterr().out
    assert outcome(run) == outcome(short_run)


def test_resume_auto_in_an_empty_directory_begins(short_job, short_run, tmp_path, capsys):
    assert call(*flags(**short_job, output_dir=tmp_path / "new", resume="auto")) == 0
    assert "no checkpoint in" in capsys.readouterr().out
    assert outcome(tmp_path / "new") == outcome(short_run)
