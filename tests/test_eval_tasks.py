"""`--eval_tasks`: tasks of `relax eval` with every evaluation of a run."""

import io
import json

import grpo_runs
import pytest
import runs
from rich.console import Console

from relax.callbacks import Callback
from relax.config import from_dict
from relax.engine import TrainerEngine
from relax.engine.run import Run
from relax.errors import ConfigError
from relax.tools.evaluate.config import EvalConfig
from relax.tools.evaluate.evaluate import evaluate


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("eval_tasks")


@pytest.fixture(scope="module")
def tasks(directory):
    """Choices, texts, and prompts that a reward scores."""
    choices = [
        {"prompt": f"{i}+1=", "choices": [str(i + 1), "33"], "answer": i % 2} for i in range(4)
    ]
    texts = directory / "texts.txt"
    texts.write_text("1+1=2\n2+2=4\n")
    sums = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(3)]
    return [
        str(runs.write_rows(directory / "choices.jsonl", choices)),
        str(texts),
        str(runs.write_rows(directory / "sums.jsonl", sums)),
    ]


@pytest.fixture(scope="module")
def fields(directory, tasks):
    """Of an SFT job of three updates on a tiny model, without evaluation rows."""
    model = grpo_runs.make_job(directory)["model_name_or_path"]
    return {
        "model_name_or_path": str(model),
        "dataset_name": str(runs.write_rows(directory / "train.jsonl", runs.additions(12))),
        "per_device_train_batch_size": 4,
        "pad_to_multiple_of": 16,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "logging_steps": 1.0,
        "save_steps": 1.0,
        "eval_strategy": "steps",
        "eval_steps": 1.0,
        "eval_tasks": tasks,
        "eval_reward_funcs": ["exact_match"],
        "max_new_tokens": 4,
    }


def run(config, **options):
    console = Console(file=io.StringIO(), width=200)
    return TrainerEngine(console=console).run_job(config, **options)


def lines_of(output_dir):
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith(("eval_", "step"))} for line in lines
            if any(k.startswith("eval_") for k in line)]  # fmt: skip


def test_tasks_are_measured_at_eval_steps_as_relax_eval_measures_them(fields, tmp_path, tasks):
    """The last numbers are those of the exported model; a killed run repeats all to the bit."""
    config = from_dict(fields | {"output_dir": str(tmp_path / "a")})
    result = run(config)
    assert result.error is None
    lines = lines_of(tmp_path / "a")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert not runs.undocumented(lines)
    names = {"choices/acc", "texts/token_perplexity", "sums/exact_match"}
    assert {f"eval_tasks/{name}" for name in names} < set(lines[0])
    assert "eval_tasks/choices/acc_stderr" in lines[0] and "eval_loss" not in lines[0]

    again = EvalConfig().replace(
        model_name_or_path=str(result.model_dir), tasks=tasks, reward_funcs=["exact_match"],
        max_new_tokens=4, eval_batch_size=8,
    )  # fmt: skip
    found = evaluate(again)
    for name in names:
        task, metric = name.split("/")
        (one,) = [r for path, r in found.items() if f"/{task}." in path]
        expected = one.metrics[metric].value
        assert lines[-1][f"eval_tasks/{name}"] == pytest.approx(expected, rel=1e-5)

    class Stops(Callback):
        def on_batch_end(self, event):
            if event.step == 3:
                raise OSError("the cable was pulled")

    config = from_dict(fields | {"output_dir": str(tmp_path / "b")})
    options = Run.options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "options", lambda *args: options(*args, Stops()))
        run(config, raise_errors=False)
    assert run(config.replace(resume="auto")).error is None
    assert lines_of(tmp_path / "b") == lines
    weights = [(tmp_path / one / "final" / "model.safetensors").read_bytes() for one in "ab"]
    assert weights[0] == weights[1]

    # Tasks change nothing in the training.
    plain = {k: v for k, v in fields.items() if not k.startswith(("eval_", "max_new"))}
    run(from_dict(plain | {"output_dir": str(tmp_path / "c")}))
    assert (tmp_path / "c" / "final" / "model.safetensors").read_bytes() == weights[0]


def test_grpo_measures_tasks_with_its_own_rewards(directory, tmp_path, tasks):
    job = grpo_runs.make_job(directory)
    job |= {name: str(job[name]) for name in ("model_name_or_path", "dataset_name")}
    job |= {"reward_funcs": job["reward_funcs"].split(","), "reward_weights": [0.7, 0.3]}
    job |= {"eval_tasks": [tasks[0], tasks[2]], "eval_tasks_limit": 2, "max_steps": 2}
    job |= {"eval_steps": 2.0, "test_size": 2.0, "logging_steps": 2.0, "save_steps": 2.0}
    job |= {"output_dir": str(tmp_path / "run")}
    result = run(from_dict({"algorithm": "grpo"} | job))
    assert result.error is None
    (line,) = lines_of(tmp_path / "run")
    # The other reward does not apply to these prompts.
    assert {"eval_tasks/choices/acc", "eval_tasks/sums/digits", "eval_reward"} < set(line)
    assert line["eval_tasks/choices/acc"] in (0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"eval_tasks": ["no.jsonl"]}, "there is no task 'no.jsonl'"),
        ({"eval_tasks": [], "eval_tasks_limit": 3}, "eval_tasks_limit has no effect"),
        ({"eval_reward_funcs": []}, "need reward_funcs"),
        ({"eval_reward_funcs": ["exact_mtch"]}, "unknown reward 'exact_mtch'"),
        ({"eval_reward_funcs": ["accuracy_reward"]}, "needs the column 'solution'"),
        ({"algorithm": "reward"}, "a reward model scores"),
    ],
)
def test_tasks_that_cannot_be_measured_are_refused_before_the_run(fields, changed, words, tmp_path):
    job = fields | {"output_dir": str(tmp_path / "run")} | changed
    if job.get("algorithm") == "reward":
        del job["pad_to_multiple_of"]
    with pytest.raises(ConfigError, match=words):
        config = from_dict(job)
        config.check()
        run(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
