"""Jobs in one process: what they return, leave behind and repeat; evaluation sets; profiles."""

import gc
import io
import json
import weakref
from argparse import Namespace
from pathlib import Path

import grpo_runs
import jax
import pytest
import runs
from rich.console import Console

from relax.callbacks import Callback
from relax.config import ConfigLoader, GRPOConfig, SFTConfig, create_default_config, from_dict
from relax.engine import TrainerEngine
from relax.engine.devices import compilation_cache_dir
from relax.engine.run import Run
from relax.errors import ConfigError, DataError

ROWS = runs.additions(12)
SETS = {"low": ROWS[:4], "high": ROWS[4:10]}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def fields(directory) -> dict:
    """Of an SFT job of three updates, each saved, on a tiny model."""
    model = grpo_runs.make_job(directory)["model_name_or_path"]
    return {
        "model_name_or_path": str(model),
        "dataset_name": str(runs.write_rows(directory / "sums.jsonl", ROWS)),
        "per_device_train_batch_size": 4,
        "pad_to_multiple_of": 16,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "logging_steps": 1.0,
        "save_steps": 1.0,
    }


def run(config, *rows, **options):
    """The result, and what was printed."""
    console = Console(file=io.StringIO(), width=200)
    result = TrainerEngine(console=console).run_job(config, *rows, **options)
    return result, console.file.getvalue()


def test_a_job_that_fails_is_a_result_with_its_error_where_that_is_asked_for(fields, tmp_path):
    broken = from_dict(fields | {"dataset_name": "no.jsonl", "output_dir": str(tmp_path / "a")})
    with pytest.raises(DataError, match="no.jsonl"):
        run(broken)
    result, said = run(broken, raise_errors=False)
    assert isinstance(result.error, DataError) and "failed: 'no.jsonl'" in said
    assert (result.state, result.model_dir, result.best_checkpoint) == (None, None, None)
    assert result.output_dir == tmp_path / "a"

    class Fails(Callback):
        def on_batch_end(self, event):
            if event.step == 3:
                raise OSError("the cable was pulled")

    config = from_dict(fields | {"output_dir": str(tmp_path / "b")})
    options = Run.options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "options", lambda *args: options(*args, Fails()))
        result, _ = run(config, raise_errors=False)
    assert isinstance(result.error, OSError)
    assert result.best_checkpoint == tmp_path / "b" / "checkpoints" / "2"
    result, _ = run(config.replace(resume="auto"))  # and the next job runs
    assert result.error is None and int(result.state.step) == 3


def test_the_best_checkpoint_is_the_one_with_the_lowest_evaluation_loss(fields, tmp_path):
    """Of three that are evaluated with a learning rate that makes everything worse."""
    config = from_dict(
        fields
        | {
            "output_dir": str(tmp_path / "run"),
            "learning_rate": 1.0,
            "test_size": 4.0,
            "eval_strategy": "steps",
            "eval_steps": 1.0,
        }
    )
    result, _ = run(config)
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert set(losses) == {1, 2, 3}
    best = min(losses, key=losses.get)
    assert result.best_checkpoint == tmp_path / "run" / "checkpoints" / str(best)
    assert result.metrics["eval_loss"] == losses[3]


def test_a_job_leaves_no_array_and_no_compiled_step_behind(fields, tmp_path):
    trainers = []
    train = Run.train

    def noted(self, trainer, *args, **kwargs):
        trainers.append(weakref.ref(trainer))
        return train(self, trainer, *args, **kwargs)

    counts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "train", noted)
        for n in range(3):
            config = from_dict(fields | {"output_dir": str(tmp_path / f"run{n}")})
            assert run(config)[0].error is None
            gc.collect()
            counts.append(len(jax.live_arrays()))
    assert counts[1] == counts[2]
    assert [ref() for ref in trainers] == [None] * 3


def test_the_compilation_cache_of_a_job_is_not_that_of_the_next(fields, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    cache, rows = str(tmp_path / "cache"), {"dataset_name": "no.jsonl"}
    config = from_dict(
        fields | rows | {"output_dir": str(tmp_path / "run"), "compilation_cache_dir": cache}
    )
    run(config, raise_errors=False)
    assert jax.config.jax_compilation_cache_dir == before


def test_compiled_steps_are_kept_in_the_users_cache_unless_jax_is_told_where(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compilation_cache_dir("auto") is None  # the tests' own directory is set
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        found = compilation_cache_dir("auto")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert found.parent == tmp_path / "relax" and found.name.startswith(f"jax-{jax.__version__}-")
    assert compilation_cache_dir(None) is None
    assert compilation_cache_dir("here") == Path("here")


def test_a_saved_configuration_repeats_the_run_byte_for_byte(fields, tmp_path):
    run(from_dict(fields | {"output_dir": str(tmp_path / "first"), "seed": 5}))
    saved = ConfigLoader(tmp_path / "first" / "config.json")
    again = saved.merge_with_cli_args(
        Namespace(output_dir=str(tmp_path / "second"), learning_rate=None)
    )
    assert again.hyperparams.seed == 5
    run(again)
    first, second = (runs.outcome(tmp_path / name) for name in ("first", "second"))
    assert first == second


def test_a_file_says_of_which_algorithm_it_is(tmp_path):
    file = tmp_path / "config.json"
    for config in (SFTConfig(), GRPOConfig().replace(reward_funcs=["exact_match"])):
        file.write_text(config.to_json())
        assert ConfigLoader(file).load() == config
    file.write_text('{"algorithm": "none"}')
    with pytest.raises(ConfigError, match="unknown algorithm 'none'. There are distill, dpo, "):
        ConfigLoader(file).load()
    with pytest.raises(ConfigError, match="batch_size is not a field here"):
        create_default_config(batch_size=4)


# Several evaluation sets.


def test_evaluation_sets_are_named_on_the_command_line_and_in_python(fields, directory, tmp_path):
    files = {n: runs.write_rows(directory / f"{n}.jsonl", rows) for n, rows in SETS.items()}
    named = ",".join(f"{name}={path}" for name, path in files.items())
    shared = fields | {"save_strategy": "no", "save_steps": 500.0}
    results = {}
    config = from_dict(shared | {"eval_dataset_name": named, "output_dir": str(tmp_path / "files")})
    results["files"], said = run(config)
    assert "evaluation data (low)" in said
    config = from_dict(
        {n: v for n, v in shared.items() if n != "dataset_name"}
        | {"output_dir": str(tmp_path / "python")}
    )
    results["python"], _ = run(config, ROWS, SETS)
    files, python = (result.metrics for result in results.values())
    assert files == {n: v for n, v in python.items()}
    low, high = (files[f"eval_{name}_loss"] for name in SETS)
    tokens = [sum(len(r["completion"]) + 1 for r in rows) for rows in SETS.values()]
    together = (low * tokens[0] + high * tokens[1]) / sum(tokens)
    assert files["eval_loss"] == pytest.approx(together, rel=1e-5)
    broken = shared | {"eval_dataset_name": "low=a.jsonl,low=b.jsonl"}
    with pytest.raises(ConfigError, match="distinct names that are words"):
        run(from_dict(broken | {"output_dir": str(tmp_path / "broken")}))


# Profiles in runs.


def test_a_profile_reaches_the_tokens_that_are_trained(fields, tmp_path):
    rows = [{"prompt": "1+1=", "completion": "2"}] * 4
    config = from_dict(
        {n: v for n, v in fields.items() if n != "dataset_name"}
        | {"model_name_or_path": None, "profile": "regime3", "system_prompt": "Be kind."}
        | {"max_steps": 1, "output_dir": str(tmp_path / "run"), "save_strategy": "no"}
        | {"save_steps": 500.0}
    )
    _, said = run(config, rows)
    assert "<system>Be kind.\n\nYou reason in numbered steps" in said
    assert "«Answer: 2<eos>»" in said
    said = run(
        config.replace(profile="auto", output_dir=str(tmp_path / "auto")),
        [{"prompt": "1+1=", "completion": "Step 1: Add.\n\nAnswer: 2"}] * 4,
    )[1]
    assert "profile auto takes regime3: 4 of 4 rows have answers in steps" in said
    assert r"note: 4 of 4 completions contain the stop sequence '\n\n' before their end" in said


def test_a_profile_is_refused_on_the_embedded_task(tmp_path):
    config = create_default_config(output_dir=str(tmp_path / "run"), profile="regime3")
    with pytest.raises(ConfigError, match="profile regime3 needs a dataset"):
        run(config)


def test_stop_sequences_of_a_profile_reach_the_sampler(fields, tmp_path, directory):
    rewards = directory / "texts.py"
    rewards.write_text(
        "def length(completion_ids, completions):\n"
        "    return [float(len(ids)) for ids in completion_ids]\n"
    )
    left_out = ("dataset_name", "save_steps", "pad_to_multiple_of")
    job = {n: v for n, v in fields.items() if n not in left_out} | {
        "reward_funcs": [f"{rewards}:length"],
        "num_generations": 4,
        "max_completion_length": 12,
        "max_steps": 1,
        "save_strategy": "no",
        "profile": "emoji_think",
        "chat_template_path": str(directory / "short.jinja"),
    }
    (directory / "short.jinja").write_text("{{ messages[-1]['content'][:8] }}<assistant>")
    stopped = {}
    for name, more in {
        "own": {},
        "given": {"stop_sequences": [chr(c) for c in range(33, 127)]},
    }.items():
        config = from_dict(job | more | {"output_dir": str(tmp_path / name)}, GRPOConfig)
        _, said = run(config, [{"prompt": "1+1=?"}] * 4)
        assert ("completions also end at '\\n\\n', '<think>'" in said) == (name == "own")
        lines = next((tmp_path / name / "completions").iterdir()).read_text().splitlines()
        stopped[name] = [json.loads(line)["finish"] for line in lines]
    assert "stop" in stopped["given"] and "stop" not in stopped["own"]
