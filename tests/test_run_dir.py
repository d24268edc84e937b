"""The directory of a run: one writer, nothing deleted by surprise, no silent change of config."""

import json
import os
import signal
import subprocess
import sys

import pytest

from relax.engine.resume import check_same_config
from relax.engine.run_dir import RunDir
from relax.errors import ConfigError
from relax.files import atomic_write, list_steps, write_json

HOLD = """
import sys, time
from relax.engine.run_dir import RunDir
RunDir(sys.argv[1]).lock()
print("held", flush=True)
time.sleep(60)
"""


def make_run(path, steps=(20, 40)):
    """A directory as a run leaves it."""
    with RunDir(path) as run:
        run.prepare()
    write_json(path / "config.json", {"seed": 1})
    (path / "metrics.jsonl").write_text("{}\n")
    for step in steps:
        (path / "checkpoints" / str(step)).mkdir(parents=True)
        (path / "checkpoints" / str(step) / "relax_state.json").write_text("{}")
    return path


def prepare(path, **kwargs):
    said = []
    with RunDir(path) as run:
        return run.prepare(say=said.append, **kwargs), said


def test_a_second_live_run_is_refused_by_pid_and_a_killed_one_frees_the_directory(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"one live run.*process {holder.pid}"):
            RunDir(tmp_path / "out").lock()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with RunDir(tmp_path / "out") as run:
        assert run.prepare() is None


def test_a_second_run_in_the_same_process_is_refused_until_the_first_unlocks(tmp_path):
    first = RunDir(tmp_path).lock()
    with pytest.raises(ConfigError, match=f"locked by process {os.getpid()}"):
        RunDir(tmp_path).lock()
    first.unlock()
    RunDir(tmp_path).lock().unlock()


def test_a_directory_with_only_a_lock_is_empty(tmp_path):
    RunDir(tmp_path).lock().unlock()
    assert prepare(tmp_path) == (None, [])
    assert prepare(tmp_path) == (None, [])


def test_another_run_is_refused_with_the_three_ways_out(tmp_path):
    run = make_run(tmp_path / "out")
    with pytest.raises(ConfigError) as error:
        prepare(run)
    for words in ("--resume auto", "step 40", "--overwrite_output_dir", "--output_dir"):
        assert words in str(error.value)
    assert list_steps(run / "checkpoints") == [20, 40]


def test_resume_auto_takes_the_run_or_says_that_it_starts_fresh(tmp_path):
    assert prepare(make_run(tmp_path / "a"), resume="auto") == ("auto", [])
    start, said = prepare(tmp_path / "new", resume="auto")
    assert start is None and "starting from the beginning" in said[0]


def test_resume_takes_a_checkpoint_of_this_run_or_of_another(tmp_path):
    run = make_run(tmp_path / "a")
    checkpoint = run / "checkpoints" / "20"
    assert prepare(run, resume=str(checkpoint))[0] == checkpoint
    assert prepare(tmp_path / "b", resume=checkpoint)[0] == checkpoint


def test_a_checkpoint_of_another_run_does_not_open_a_used_directory(tmp_path):
    run, other = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    with pytest.raises(ConfigError, match="holds another run"):
        prepare(run, resume=other / "checkpoints" / "20")
    start, _ = prepare(run, resume=other / "checkpoints" / "20", overwrite=True)
    assert start == other / "checkpoints" / "20"
    assert list_steps(run / "checkpoints") == []


def test_a_resume_path_that_is_no_checkpoint_is_refused_with_the_one_meant(tmp_path):
    run = make_run(tmp_path / "a")
    with pytest.raises(ConfigError, match="Did you mean '.*a/checkpoints/40'"):
        prepare(tmp_path / "b", resume=run)
    with pytest.raises(ConfigError, match="auto, never or the path"):
        prepare(tmp_path / "b", resume="Auto")


def test_arguments_that_contradict_each_other_are_refused(tmp_path):
    run = make_run(tmp_path / "a")
    with pytest.raises(ConfigError, match="contradict"):
        prepare(run, resume="auto", overwrite=True)
    with pytest.raises(ConfigError, match="would delete"):
        prepare(run, resume=run / "checkpoints" / "20", overwrite=True)
    assert list_steps(run / "checkpoints") == [20, 40]


def test_overwrite_deletes_what_a_run_wrote_and_nothing_else(tmp_path):
    run = make_run(tmp_path / "out")
    (run / "notes.txt").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("kept")
    (run / "final").symlink_to(tmp_path / "elsewhere")
    start, said = prepare(run, overwrite=True)
    assert start is None
    assert sorted(os.listdir(run)) == [".lock", "notes.txt"]
    assert (tmp_path / "elsewhere" / "kept").read_text() == "kept"
    for name in ("config.json", "metrics.jsonl", "checkpoints", "final"):
        assert name in said[0]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_model_directory_is_never_touched_even_by_overwrite(tmp_path, overwrite):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ConfigError, match="config.json, not written by ReLax"):
        prepare(tmp_path, overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_other_files_need_overwrite_and_stay(tmp_path):
    (tmp_path / "log.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds log.txt. Pass --overwrite_output_dir"):
        prepare(tmp_path)
    # Having been refused does not make the directory a run's.
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="not written by ReLax"):
        prepare(tmp_path, overwrite=True)
    (tmp_path / "config.json").unlink()
    assert prepare(tmp_path, overwrite=True)[0] is None
    assert (tmp_path / "log.txt").read_text() == "mine"


def test_an_output_dir_that_is_a_file_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="must be a writable directory.*file"):
        RunDir(tmp_path / "file").lock()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_json(path, {"learning_rate": 0.1 + 0.2, "name": "é"})
    assert json.loads(path.read_text()) == {"learning_rate": 0.30000000000000004, "name": "é"}
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        atomic_write(path, b"half")
    assert json.loads(path.read_text())["name"] == "é"


def test_an_unchanged_configuration_resumes_and_paths_may_change():
    old = {"seed": 1, "reward_weights": [1, 2], "output_dir": "a", "save_steps": 5}
    new = {"seed": 1, "reward_weights": (1, 2), "output_dir": "b", "save_steps": 9}
    assert check_same_config(old, new) == []


def test_a_changed_configuration_is_refused_with_the_difference_and_the_way_on():
    old, new = {"seed": 1, "learning_rate": 1e-3, "gone": 1}, {"seed": 2, "learning_rate": 2e-3}
    with pytest.raises(ConfigError) as error:
        check_same_config(old, new, ["seed"])
    assert "learning_rate: 0.001 -> 0.002" in str(error.value)
    assert "gone: 1 -> (absent)" in str(error.value)
    assert "seed: 1" not in str(error.value)
    assert "--allow_config_change gone,learning_rate,seed" in str(error.value)
    allowed = check_same_config(old, new, ["seed", "learning_rate", "gone"])
    assert allowed == ["gone: 1 -> (absent)", "learning_rate: 0.001 -> 0.002", "seed: 1 -> 2"]


def test_logging_steps_may_not_change_because_it_changes_the_metrics():
    with pytest.raises(ConfigError, match="logging_steps: 1 -> 2"):
        check_same_config({"logging_steps": 1}, {"logging_steps": 2})


def test_allowing_a_field_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="got 'sed'. Did you mean seed"):
        check_same_config({"seed": 1}, {"seed": 1}, ["sed"])
