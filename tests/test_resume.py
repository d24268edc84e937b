"""A run that is killed or stopped anywhere and started again ends as one that never was."""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from runs import (
    additions,
    finish,
    flags,
    killed,
    metrics,
    outcome,
    start,
    write_rows,
)

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
RANDOM_KILLS = 5


def kill_at_named_points(arguments, output_dir: Path) -> list[Path]:
    for fault in NAMED:
        child = start(*arguments, f"--output_dir={output_dir}", "--resume=auto", fault=fault)
        assert killed(child), (fault, child.stdout, child.stderr)
    finish(*arguments, f"--output_dir={output_dir}", "--resume=auto")
    return [output_dir]


def kill_at_random_times(arguments, root: Path, kills: int) -> list[Path]:
    """A kill at some time after the start of the process, or after its first update."""
    rng = random.Random(0)
    runs, hit = [root / "0"], 0
    while True:
        child = start(*arguments, f"--output_dir={runs[-1]}", "--resume=auto")
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


def test_fifteen_kills_end_in_the_bytes_of_an_unbroken_run(job, unbroken, tmp_path):
    """Parameters, optimizer state, position, metrics and the exported model, bit for bit."""
    arguments = flags(**job)
    with ThreadPoolExecutor(2) as pool:
        chains = [
            pool.submit(kill_at_named_points, arguments, tmp_path / "named"),
            pool.submit(kill_at_random_times, arguments, tmp_path / "random", RANDOM_KILLS),
        ]
        runs = [run for chain in chains for run in chain.result()]
    assert len(NAMED) + RANDOM_KILLS == 15
    expected = outcome(unbroken)
    for run in runs:
        assert outcome(run) == expected, run
