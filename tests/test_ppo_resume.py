"""A run of PPO that is killed anywhere ends as one that never was, its critic included."""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from grpo_runs import outcome
from ppo_runs import SCRIPT, call, make_job
from runs import end_all, finish, flags, fork, killed, kills

pytestmark = pytest.mark.programs


@pytest.fixture(autouse=True)
def no_child_left():
    yield
    end_all()


# In this order, each start going on from what the one before left. An item is four updates.
NAMED = (
    "rollout:1",  # completions are drawn and not yet scored
    "reward:1",  # they are scored, and nothing of them is kept
    "mid_write:1",
    "after_rename:1",  # 4 is saved
    "rollout:2",
    "step:1",
    "export:1",
)
RANDOM_KILLS = ("random",) * 3


def kill_at_named_points(arguments, output_dir, points):
    arguments = [*arguments, f"--output_dir={output_dir}", "--resume=auto"]
    for fault in points:
        child = fork(*arguments, fault=fault, script=SCRIPT)
        assert killed(child), (fault, child.stdout, child.stderr)
    finish(*arguments, script=SCRIPT)
    return output_dir


def kill_at_random_times(arguments, output_dir, kills: int):
    rng = random.Random(0)
    arguments = [*arguments, f"--output_dir={output_dir}", "--resume=auto"]
    for hit in range(kills):
        child = fork(*arguments, script=SCRIPT)
        child.wait_for("attention:" if hit % 2 else "compiling the train step")
        time.sleep(rng.uniform(0, 1))
        child.process.kill()
        if not killed(child):
            assert child.process.returncode == 0, child.stderr
    finish(*arguments, script=SCRIPT)
    return output_dir


@pytest.mark.timeout(1200)  # a dozen programs, one after the other
@kills(NAMED + RANDOM_KILLS, 1, 3)
def test_kills_end_in_the_bytes_of_an_unbroken_run(kills, tmp_path):
    """Policy, critic, both optimizers, the KL coefficient, metrics and completions, bit for bit."""
    job = make_job(tmp_path)
    assert call(**job, output_dir=tmp_path / "unbroken") == 0
    arguments, expected = flags(**job), outcome(tmp_path / "unbroken")
    assert expected["steps"] == [4, 8, 12]
    points = [kill for kill in kills if kill != "random"]
    times = len(kills) - len(points)
    with ThreadPoolExecutor(2) as pool:
        chains = [pool.submit(kill_at_named_points, arguments, tmp_path / "named", points)]
        if times:
            chains += [pool.submit(kill_at_random_times, arguments, tmp_path / "random", times)]
        for chain in chains:
            assert outcome(chain.result()) == expected, chain.result()
