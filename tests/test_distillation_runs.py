"""Runs of `run_distill.py`: its flags, its data, its teachers, and a resume to the same bytes."""

from types import SimpleNamespace

import grpo_runs
import jax
import jax.numpy as jnp
import numpy as np
import pages
import pytest
import runs
from grpo_runs import outcome

from relax.__main__ import main as command
from relax.config import ConfigLoader, DistillConfig, GRPOConfig, cli, options
from relax.config.grpo import GRPOSection
from relax.data import arithmetic_tokenizer
from relax.engine.recipes.distill import train_distill
from relax.errors import ConfigError
from relax.models import load_pretrained, save_pretrained
from run_distill import main

OWN_FLAGS = """
beta distill_mode gamma lmbda loss_chunk_size loss_top_k teacher_logprobs
teacher_model_name_or_path teacher_weights
""".split()
GIVEN = {"dataset_name": "rows.jsonl", "teacher_model_name_or_path": ["DIR"]}
ON_POLICY = {"lmbda": 1.0, "distill_mode": "policy_gradient"}


def config(**fields) -> DistillConfig:
    return DistillConfig().replace(**GIVEN | fields)


def test_the_list_of_flags_is_frozen():
    shared = set(options(GRPOConfig)) - set(GRPOSection.__dataclass_fields__)
    shared -= {"steps_per_generation", "num_iterations"}  # of a rollout of GRPO alone
    shared -= {"agent", "agent_timeout_s", "agent_max_length", "dataset_cache_dir"}
    assert set(options(DistillConfig)) == shared | set(OWN_FLAGS)


def test_the_demo_and_the_plainest_runs_are_valid_and_read_back(tmp_path):
    DistillConfig().replace(**DistillConfig.demo).validate()
    for fields in ({}, {"lmbda": 0.0}, ON_POLICY | {"gamma": 1.0, "num_generations": 4}):
        config(**fields).validate()
    saved = config(beta=0.1, teacher_weights=[2.0])
    (tmp_path / "config.json").write_text(saved.to_json())
    assert ConfigLoader(tmp_path / "config.json", DistillConfig).load() == saved


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"teacher_weights": [1.0, 2.0]}, "one above 0 per teacher, got [1.0, 2.0] for 1 teachers"),
        ({"teacher_logprobs": "here"}, "got loss_top_k 0 and lmbda 0.5; give"),
        ({"num_generations": 2}, "num_generations above 1 needs lmbda 1"),
        ({"distill_mode": "policy_gradient"}, "policy_gradient needs lmbda 1"),
        (ON_POLICY | {"top_k": 5}, "samples from the policy itself"),
        ({"gamma": 0.5}, "gamma has no effect: distill_mode is divergence"),
        ({"lmbda": 0.0, "max_completion_length": 9}, "the student writes nothing"),
        ({"beta": 1.5}, "beta must be at most 1"),
        ({"recompute_old_logprobs": True}, "recompute_old_logprobs has no effect"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_sentence(fields, message):
    with pytest.raises(ConfigError) as caught:
        config(**fields).validate()
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_every_option_arrives_at_the_trainer(monkeypatch):
    asked = {"lmbda": 1.0, "beta": 0.1, "loss_top_k": 5, "loss_chunk_size": 9, "temperature": 0.5}
    model = SimpleNamespace(lora=None, attn_implementation="auto", dtype=np.float32)
    monkeypatch.setattr("relax.engine.recipes.distill.find_teachers", lambda *_: [])
    monkeypatch.setattr("relax.engine.recipes.distill.load_teachers", lambda *_: [])
    trainer = pages.trainer_of(train_distill, config(**asked), model, monkeypatch)
    found = {name: getattr(trainer, name) for name in asked if name != "temperature"}
    assert found | {"temperature": trainer.sampling.temperature} == asked
    monkeypatch.setattr(f"{train_distill.__module__}.Run", pages.StubRun)
    trainer = pages.trainer_of(train_distill, config(**ON_POLICY, gamma=0.5), model, monkeypatch)
    assert (trainer.distill_mode, trainer.gamma) == ("policy_gradient", 0.5)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> dict:
    """A job on a tiny student and a teacher with other weights."""
    directory = tmp_path_factory.mktemp("distill")
    student = grpo_runs.make_job(directory)["model_name_or_path"]
    model, _ = load_pretrained(student)
    params = jax.jit(model.init)(jax.random.key(7), jnp.zeros((1, 8), jnp.int32))["params"]
    save_pretrained(directory / "teacher", model, params, arithmetic_tokenizer())
    rows = [row | {"answer": row["completion"]} for row in runs.additions(12)]
    return {
        "model_name_or_path": student,
        "teacher_model_name_or_path": directory / "teacher",
        "dataset_name": runs.write_rows(directory / "rows.jsonl", rows),
        "reward_funcs": "exact_match",
        "test_size": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "max_steps": 4,
        "save_steps": 2,
    }


def call(**fields) -> int:
    try:
        cli.run(DistillConfig, main, runs.flags(**fields))
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.timeout(300)
def test_a_run_that_is_resumed_ends_in_the_bytes_of_an_unbroken_one(job, tmp_path):
    assert call(**job, output_dir=tmp_path / "unbroken") == 0
    expected = outcome(tmp_path / "unbroken")
    assert not any("teacher" in name for name in expected["leaves"])
    last = expected["metrics"][-1]
    assert {"eval_loss", "eval_teacher_agreement", "eval_pass@1"} <= set(last)
    assert call(**job | {"max_steps": 2}, output_dir=tmp_path / "resumed") == 0
    again = {"resume": "auto", "allow_config_change": "max_steps"}
    assert call(**job, **again, output_dir=tmp_path / "resumed") == 0
    assert outcome(tmp_path / "resumed") == expected


@pytest.mark.timeout(300)
def test_stored_log_probabilities_are_read_by_the_run_that_they_were_written_for(
    job, tmp_path, capsys
):
    stored = tmp_path / "stored"
    job = {n: v for n, v in job.items() if n != "reward_funcs"}
    del job["max_completion_length"]
    same = job | {"lmbda": 0, "loss_top_k": 3, "max_steps": 2, "save_strategy": "no"}
    del same["save_steps"]
    files = {"teacher_logprobs": stored, "output_dir": tmp_path / "run"}
    assert call(**same | files | {"output_dir": tmp_path / "early"}) == 2
    assert "Write them with relax distill prepare" in capsys.readouterr().err
    assert command(["distill", "prepare", *runs.flags(**same, **files)]) == 0
    assert "of log-probabilities, 3 tokens each" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert call(**same, **files) == 0
    other = same | files | {"temperature": 0.5, "overwrite_output_dir": True}
    assert call(**other) == 2
    assert "written with temperature 1.0, and this run has 0.5" in capsys.readouterr().err
    array = np.load(stored / "training_data" / "ids.npy")
    np.save(stored / "training_data" / "ids.npy", array + 1)
    assert call(**same | files, overwrite_output_dir=True) == 2
    assert "ids.npy of the training data" in capsys.readouterr().err


def test_teachers_and_rows_that_cannot_teach_are_refused(job, tmp_path, capsys):
    other = tmp_path / "other"
    model, params = load_pretrained(job["model_name_or_path"])
    tokenizer = arithmetic_tokenizer()
    tokenizer.add_tokens(["<new>"])
    save_pretrained(other, model, params, tokenizer)
    out = {"output_dir": tmp_path / "run"}
    assert call(**job | {"teacher_model_name_or_path": other}, **out) == 2
    said = capsys.readouterr().err
    assert f"those of '{other}' 1 differ" in said and "relax sft" in said
    alone = {name: value for name, value in job.items() if not name.startswith("teacher")}
    assert call(**alone, **out) == 2
    assert "rows with the column 'teacher_prompt'" in capsys.readouterr().err
    rows = [{"prompt": "1+1=", "completion": "0" * n, "answer": "2"} for n in (1, 80)]
    long = {"dataset_name": runs.write_rows(tmp_path / "rows.jsonl", rows), "test_size": 1}
    assert call(**job | long, **out) == 2
    assert (
        "rows.jsonl:2: the row has 85 tokens, and student and teachers have 64"
        in capsys.readouterr().err
    )
