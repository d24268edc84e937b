"""A dry run of every algorithm: what the run will need, all that is wrong, and nothing written."""

import importlib
import json
import re
import shutil
from types import SimpleNamespace

import grpo_runs
import ppo_runs
import pytest
import runs

from relax.config import ConfigLoader, cli
from relax.config.settings import ALGORITHMS

SHARED = {"learning_rate": 1e-3, "max_steps": 6, "save_steps": 3, "dry_run": True}
ROWS = runs.additions(12)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict[str, dict]:
    """Flags of a job of each algorithm, on a tiny model."""
    directory = tmp_path_factory.mktemp("jobs")
    (directory / "ppo").mkdir()
    grpo = grpo_runs.make_job(directory)
    model = {"model_name_or_path": grpo["model_name_or_path"]} | SHARED
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": "0"} for row in ROWS
    ]
    pairs = runs.write_rows(directory / "pairs.jsonl", pairs)
    rows = runs.write_rows(directory / "sums.jsonl", ROWS)
    batch = {"per_device_train_batch_size": 4}
    return {
        "sft": model | batch | {"dataset_name": rows},
        "dpo": model | batch | {"dataset_name": pairs, "precompute_ref_log_probs": True},
        "reward": model | batch | {"dataset_name": pairs},
        "grpo": grpo | SHARED,
        "ppo": ppo_runs.make_job(directory / "ppo") | SHARED,
    }


@pytest.fixture
def run(tmp_path, capsys):
    """Runs a script in this process: the exit code, what it printed, and the lines of errors."""

    def run(algorithm, **fields):
        script = ALGORITHMS[algorithm].script or f"run_{algorithm}.py"
        main = importlib.import_module(script.removesuffix(".py")).main
        fields = {"output_dir": tmp_path / "run"} | fields
        code = 0
        try:
            cli.run(ALGORITHMS[algorithm], main, runs.flags(**fields))
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return code, said.out, said.err.splitlines()

    return run


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "reward", "grpo", "ppo"])
def test_a_dry_run_says_what_the_run_will_need_and_writes_nothing(algorithm, jobs, run, tmp_path):
    code, out, errors = run(algorithm, **jobs[algorithm])
    assert (code, errors) == (0, [])
    assert list(tmp_path.iterdir()) == []
    lines = dict(re.findall(r"^  (data|memory|steps|one step|disk) +(\S.*)$", out, re.MULTILINE))
    assert set(lines) == {"data", "memory", "steps", "one step", "disk"}
    # A rollout of PPO is four updates here.
    assert lines["steps"].startswith("8 updates" if algorithm == "ppo" else "6 updates")
    assert ("max_steps 6 becomes 8: a rollout is 4 updates" in out) == (algorithm == "ppo")
    # One pair is none: both of its answers are 0. Two prompts are held out.
    rows = {"sft": 12, "dpo": 11, "reward": 11, "grpo": 10, "ppo": 10}[algorithm]
    assert lines["data"].startswith(f"{rows} rows of ")
    # After 3 and 6, and room for one that is being written.
    assert lines["disk"].startswith("3 checkpoints of ")
    assert out.endswith("dry run passed; remove --dry_run to start\n")


def test_all_that_is_wrong_is_told_at_once(jobs, run, tmp_path):
    wrong = {
        "model_name_or_path": tmp_path / "no_model",
        "dataset_name": tmp_path / "no_rows.jsonl",
        "reward_funcs": "no_such_reward,exact_match",
    }
    code, out, errors = run("grpo", **jobs["grpo"] | wrong)
    assert code == 2 and "compiling" not in out
    assert [line.split(":")[0] for line in errors] == ["error"] * 3
    for part in ("no_model", "no_rows.jsonl", "unknown reward 'no_such_reward'"):
        assert sum(part in line for line in errors) == 1, part
    assert not (tmp_path / "run").exists()


def test_a_model_and_data_that_do_not_fit_are_told_with_every_reason(jobs, run, tmp_path):
    """A token that the model lacks, a row that is too long, and a broken file beside it."""
    rows = [{"input_ids": [5, 261]}, {"input_ids": [5] * 80}]
    train = runs.write_rows(tmp_path / "rows.jsonl", rows)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"input_ids": [5, 6]}\n{"input_ids": "five"}\n')
    fields = {"dataset_name": train, "eval_dataset_name": held_out, "dry_run": False}
    code, out, errors = run("sft", **jobs["sft"] | fields)
    assert code == 2 and "compiling" not in out
    assert len(errors) == 3
    assert errors[0].startswith(f"error: {train}:1: token id 261 is outside of the model's")
    assert errors[1].startswith(f"error: {held_out}:2: 'input_ids' must be a list of 32-bit")
    assert errors[2].startswith("error: training data: batches are up to 80 tokens long, and the")


def test_an_end_token_that_the_model_does_not_have_is_told(jobs, run, tmp_path):
    model = shutil.copytree(jobs["sft"]["model_name_or_path"], tmp_path / "model")
    generation = {"eos_token_id": [1, 300]}
    (model / "generation_config.json").write_text(json.dumps(generation))
    code, _, errors = run("sft", **jobs["sft"] | {"model_name_or_path": model, "dry_run": False})
    assert code == 2
    assert len(errors) == 1
    assert "eos_token_id must be a token id below vocab_size 261" in errors[0]
    assert "got [1, 300]" in errors[0]


def test_a_disk_and_a_directory_that_will_not_do_are_told_with_exit_code_2(
    jobs, run, tmp_path, monkeypatch
):
    usage = SimpleNamespace(total=10**9, used=0, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    code, _, errors = run("sft", **jobs["sft"], output_dir=tmp_path / "used")
    assert code == 2
    assert any("output_dir must be empty" in line for line in errors)
    code, _, errors = run("sft", **jobs["sft"])
    assert code == 2 and len(errors) == 1 and "and '" in errors[0] and "free" in errors[0]


def test_a_dry_run_asked_for_in_a_file_is_the_same(jobs, tmp_path):
    file = tmp_path / "config.json"
    plain = {name: str(value) for name, value in jobs["sft"].items() if "name" in name}
    file.write_text(json.dumps(plain | {"debug": {"dry_run": True}, "max_steps": 6}))
    assert ConfigLoader(file).load().debug.dry_run
