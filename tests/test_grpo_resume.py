"""A run of GRPO that is killed anywhere ends as one that never was; its workers end with it."""

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import runs
from faults import meet
from grpo_runs import SCRIPT, call, make_job, outcome, start
from runs import end_all, finish, flags, killed, kills

from relax.trainers import RLTrainer

pytestmark = pytest.mark.programs


@pytest.fixture(autouse=True)
def no_child_left():
    yield
    end_all()


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> dict:
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def unbroken(job, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("unbroken") / "run"
    assert call(**job, output_dir=output_dir) == 0
    return output_dir


# In this order, each start going on from what the one before left. An item is two updates.
NAMED = (
    "rollout:1",  # completions are drawn and not yet scored
    "reward:2",  # they are scored, and nothing of them is kept
    "mid_write:1",
    "after_rename:1",  # 4 is saved
    "rollout:2",
    "step:1",
    "export:1",
)
RANDOM_KILLS = ("random",) * 3


def kill_at_named_points(arguments, output_dir: Path, points) -> Path:
    arguments = [*arguments, f"--output_dir={output_dir}", "--resume=auto"]
    for fault in points:
        child = start(*arguments, fault=fault)
        assert killed(child), (fault, child.stdout, child.stderr)
    finish(*arguments, script=SCRIPT)
    return output_dir


def kill_at_random_times(arguments, output_dir: Path, kills: int) -> Path:
    rng, hit = random.Random(0), 0
    arguments = [*arguments, f"--output_dir={output_dir}", "--resume=auto"]
    while True:
        child = start(*arguments)
        if hit < kills:
            child.wait_for("attention:" if hit % 2 else "compiling the train step")
            time.sleep(rng.uniform(0, 1))
            child.process.kill()
        if not killed(child):
            assert child.process.returncode == 0, child.stderr
            return output_dir
        hit += 1


@pytest.mark.timeout(1200)  # a dozen programs, one after the other
@kills(NAMED + RANDOM_KILLS, 1, 3, 7)
def test_kills_end_in_the_bytes_of_an_unbroken_run(job, unbroken, kills, tmp_path):
    """Parameters, optimizer state, position, counts, metrics and completions, bit for bit."""
    arguments, expected = flags(**job), outcome(unbroken)
    assert len(expected["completions"]) == 2 and expected["steps"] == [4, 8]
    points = [kill for kill in kills if kill != "random"]
    times = len(kills) - len(points)
    with ThreadPoolExecutor(2) as pool:
        chains = [
            pool.submit(kill_at_named_points, arguments, tmp_path / "named", points),
            pool.submit(kill_at_random_times, arguments, tmp_path / "random", times),
        ]
        for chain in chains:
            assert outcome(chain.result()) == expected, chain.result()


def evaluating_for_long():
    def evaluate(self, *_):
        print("asleep at evaluation", flush=True)
        time.sleep(60)

    RLTrainer._evaluate = evaluate


def test_sigterm_in_a_rollout_or_an_evaluation_saves_at_once_and_changes_no_byte(
    job, unbroken, tmp_path
):
    """The work under way is longer than the grace time: it is dropped, and done again."""
    arguments = [*flags(**job, grace_s=20), f"--output_dir={tmp_path / 'run'}", "--resume=auto"]
    stops = (
        partial(meet, "rollout:2:sleep"),  # 2 updates are made, none of them is saved
        partial(meet, "reward:1:sleep"),  # rewards are counted, and are counted again
        evaluating_for_long,
    )
    for before in stops:
        child = runs.fork(*arguments, script=SCRIPT, before=before).wait_for("asleep at")
        assert child.end(signal.SIGTERM) == 143, child.stderr
        assert "saving now" in child.stderr and "by force" not in child.stderr, child.stderr
    finish(*arguments, script=SCRIPT)
    found, expected = outcome(tmp_path / "run"), outcome(unbroken)
    assert found.pop("steps") == [2, 4, 8] and expected.pop("steps") == [4, 8]
    assert found == expected


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (ProcessLookupError, FileNotFoundError):
        return True


@pytest.mark.parametrize("busy", [False, True], ids=["waiting", "busy"])
def test_a_reward_worker_never_outlives_its_run(job, tmp_path, busy):
    """Killed between two batches, and while a function hangs."""
    file = Path(job["reward_funcs"].split(":")[0])
    pids = file.with_suffix(".pids")
    pids.write_text("")
    functions = f"{file}:{'hangs' if busy else 'vowels'}"
    fields = job | {"reward_funcs": functions, "reward_weights": 1.0, "output_dir": tmp_path / "r"}
    child = start(*flags(**fields), fault=None if busy else "reward:1:sleep")
    deadline_s = time.monotonic() + 120
    while not pids.read_text().endswith("\n") and child.process.poll() is None:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    workers = [int(pid) for pid in pids.read_text().split()]
    assert workers, (child.stdout, child.stderr)
    child.process.send_signal(signal.SIGKILL)
    assert killed(child)
    deadline_s = time.monotonic() + 30
    while not all(map(gone, workers)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert all(map(gone, workers))
