"""No kill and no full disk loses a committed checkpoint.

Children die here. To pay for few imports of jax, one driver imports it and forks a child per case.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from relax.checkpoint.checkpointer import Checkpointer

pytestmark = pytest.mark.programs

PATHS = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
DRIVER = r"""
import json, os, resource, signal, sys, time
import jax, numpy as np
from faults import meet
from relax.checkpoint import Checkpointer
from relax.errors import CheckpointError

def state(step, size):
    return {"w": np.full(size, step, np.float32), "noise": np.random.default_rng(step).random(size)}

def saves(directory, first, last, size=1000, limit=2, asynchronous=False):
    checkpointer = Checkpointer(directory, save_total_limit=limit, asynchronous=asynchronous)
    checkpointer.sweep()
    for step in range(first, last):
        checkpointer.save(step, state(step, size), {"at": step})
        checkpointer.wait()
        os.write(1, f"{step}\n".encode())  # all of the line or none: a kill may come at any moment

def in_child(run):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return pid
"""

KILLS = (
    DRIVER
    + r"""
root, how, faults = sys.argv[1], sys.argv[2] == "True", sys.argv[3:]
def faulty(text):
    name = text.replace(":", "-")
    meet(text)
    if "mid_replace" in text:
        saves(f"{root}/{name}", 0, 2, asynchronous=how)
        saves(f"{root}/{name}", 1, 2, asynchronous=how)
    saves(f"{root}/{name}", 0, 6, asynchronous=how)
ends = {text: os.waitpid(in_child(lambda: faulty(text)), 0)[1] for text in faults}
print("ends", json.dumps(ends), flush=True)
"""
)

RANDOM_KILLS = (
    DRIVER
    + r"""
root, size, delays_s = sys.argv[1], 500_000, json.loads(sys.argv[2])
def verify():
    for step in Checkpointer(root).steps():
        got, progress, _ = Checkpointer(root).restore(state(0, size), step=step)
        assert progress == {"at": step}
        assert all((got[k] == v).all() for k, v in state(step, size).items())
for delay_s in delays_s:
    first = max(Checkpointer(root).steps(), default=-1) + 1
    pid = in_child(lambda: saves(root, first, first + 1000, size))
    while first not in Checkpointer(root).steps():
        time.sleep(0.005)
    time.sleep(delay_s)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    newest = max(Checkpointer(root).steps(), default=-1)
    print(json.dumps([first, newest, sorted(os.listdir(root))]), flush=True)
    assert newest >= first
    assert os.waitpid(in_child(verify), 0)[1] == 0
"""
)

FULL = (
    DRIVER
    + r"""
root, limit_bytes = sys.argv[1], int(sys.argv[2])
def full():
    if limit_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    try:
        saves(root, 0, 1, 1000)
        saves(root, 1, 2, 8_000_000, limit=1)
    except CheckpointError as error:
        print(error, flush=True)
        sys.exit()
assert os.waitpid(in_child(full), 0)[1] == 256
print(json.dumps([Checkpointer(root).restore(state(0, 1000))[1], os.listdir(root)]))
"""
)


def drive(code, *args):
    """Runs a driver. It forks only before its first array: jax has no threads until then."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(PATHS), "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


POINTS = (
    "before_write",
    "mid_write",
    "before_checksums",
    "before_rename",
    "mid_replace",
    "after_rename",
    "mid_retention",
)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_kill_at_any_named_point_loses_no_committed_checkpoint(tmp_path, asynchronous):
    """Each point on the first and on the third save (the retention first deletes at the third)."""
    faults = [
        f"{point}:{n}" for point in POINTS for n in (1, 3) if point != "mid_replace" or n == 1
    ]
    *saved, ends = drive(KILLS, tmp_path, asynchronous, *faults)
    assert json.loads(ends.removeprefix("ends ")) == dict.fromkeys(faults, signal.SIGKILL)
    committed = {}
    for text in faults:
        checkpointer = Checkpointer(tmp_path / text.replace(":", "-"), save_total_limit=2)
        checkpointer.sweep()
        steps = checkpointer.steps()
        committed[text] = steps
        for step in steps:
            template = {"w": np.zeros(1000, np.float32), "noise": np.zeros(1000)}
            state, progress, _ = checkpointer.restore(template, step=step)
            assert progress == {"at": step} and (state["w"] == step).all()
        checkpointer.save(9, {"w": np.ones(1)}, {})
        assert not [name for name in os.listdir(checkpointer.directory) if "tmp" in name]
    for text, steps in committed.items():
        point, n = text.split(":")
        at_1, at_3 = {
            "after_rename": ([0], [0, 1, 2]),  # committed, the oldest not yet deleted
            "mid_retention": ([1, 2], [3, 4]),  # the n-th deletion, of step n - 1, follows n + 1
            "mid_replace": ([0, 1], None),
        }.get(point, ([], [0, 1]))
        assert steps == (at_1 if n == "1" else at_3), text


def test_a_kill_at_any_moment_leaves_the_previous_checkpoint(tmp_path):
    delays_s = np.random.default_rng(0).uniform(0, 0.2, size=12).round(3).tolist()
    rounds = [json.loads(line) for line in drive(RANDOM_KILLS, tmp_path, json.dumps(delays_s))]
    rounds = [line for line in rounds if isinstance(line, list)]
    assert len(rounds) == 12
    assert any(name.startswith("tmp-") for line in rounds for name in line[2])  # some cut short


@pytest.fixture(params=["file size limit", "full file system"])
def full_disk(request, tmp_path):
    if request.param == "file size limit":
        yield tmp_path, 10_000_000
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "none", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield tmp_path, 0
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_names_the_numbers_and_keeps_what_was_saved(full_disk):
    directory, limit_bytes = full_disk
    _, message, last = drive(FULL, directory, limit_bytes)
    assert message.startswith("checkpoint 1 does not fit on the disk: it needs about 96 MB")
    assert "MB free" in message or "GB free" in message
    assert "checkpoint 0 is intact" in message
    assert json.loads(last) == [{"at": 0}, ["0"]]
