"""`run_grpo.py` as a user runs it: what it leaves, what it refuses before anything is compiled."""

import json
import shutil
from pathlib import Path

import grpo_runs
import pytest
from grpo_runs import call, make_job, questions
from metric_names import undocumented
from runs import write_rows

from relax.config import GRPOConfig
from relax.engine import TrainerEngine
from relax.models import load_pretrained


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> dict:
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def run(job, tmp_path_factory) -> tuple[Path, dict]:
    """A run that was asked for all that is shown."""
    output_dir = tmp_path_factory.mktemp("run") / "out"
    assert call(**job, output_dir=output_dir, log_completions=True, eval_on_start=True) == 0
    return output_dir


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_metrics_completions_and_a_model(run):
    records = lines(run / "metrics.jsonl")
    assert [r["step"] for r in records if "reward" in r] == [3, 6, 8]
    assert not undocumented(records)
    evaluations = [r for r in records if "eval_reward" in r]
    assert [r["step"] for r in evaluations] == [0, 4, 8]
    assert {"eval_pass@1", "eval_pass@2", "eval_rewards/vowels/mean"} <= set(evaluations[0])
    kept = sorted(p.name for p in (run / "completions").iterdir())
    assert kept == ["step_000003.jsonl", "step_000005.jsonl"]  # 3 and 4; 5 and 6
    rows = lines(run / "completions" / kept[0])
    assert len(rows) == 8 and set(rows[0]["rewards"]) == {"vowels", "digits"}
    for row in rows:
        assert row["reward"] == pytest.approx(
            0.7 * row["rewards"]["vowels"] + 0.3 * row["rewards"]["digits"]
        )
    load_pretrained(run / "final")
    report = json.loads((run / "data.json").read_text())["reports"]
    assert report["training prompts"]["num_rows"] == 10
    assert report["evaluation prompts"]["columns"] == ["prompt", "answer"]


def test_the_seconds_of_a_step_are_those_of_its_phases(run):
    for record in lines(run / "metrics.jsonl"):
        if "step_time" in record:
            phases = [v for name, v in record.items() if name.startswith("time/")]
            assert len(phases) == 5 and sum(phases) == pytest.approx(record["step_time"])


def test_the_run_from_python_ends_in_the_same_numbers(job, run, tmp_path):
    fields = {n: str(v) if isinstance(v, Path) else v for n, v in job.items()}
    for name, kind in (("reward_funcs", str), ("reward_weights", float)):
        fields[name] = [kind(part) for part in fields[name].split(",")]
    config = GRPOConfig().replace(**fields, output_dir=str(tmp_path / "out"), eval_on_start=True)
    TrainerEngine().run_job(config)
    assert grpo_runs.outcome(tmp_path / "out") == grpo_runs.outcome(run)


def test_overwriting_a_run_deletes_its_completions(job, run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "completions" / "step_000099.jsonl").write_text("")
    assert call(**job | {"max_steps": 2}, output_dir=copy, overwrite_output_dir=True) == 0
    assert "completions" in capsys.readouterr().out
    assert not (copy / "completions").exists()  # its two updates hold no multiple of 3


def test_a_resumed_run_must_see_the_answers_that_it_began_with(job, run, tmp_path, capsys):
    copy, rows = shutil.copytree(run, tmp_path / "run"), job["dataset_name"]
    before = rows.read_bytes()
    try:
        write_rows(rows, [row | {"answer": "0"} for row in questions(12)])
        code = call(**job, output_dir=copy, resume="auto", log_completions=True, eval_on_start=True)
    finally:
        rows.write_bytes(before)
    assert code == 2
    assert "must train on the same data as before" in capsys.readouterr().err


REFUSED = [
    ({"reward_funcs": "exact_mach", "reward_weights": None}, "unknown reward 'exact_mach'",
     "Did you mean exact_match"),
    ({"reward_funcs": "nowhere.py:f", "reward_weights": None}, "no Python file 'nowhere.py'"),
    ({"reward_funcs": "REWARDS:solved", "reward_weights": None}, "column 'solution'", "'answer'"),
    ({"reward_funcs": "REWARDS:by_position", "reward_weights": None}, "by position only"),
    ({"reward_kwargs": '{"exact_match": {}}'}, "none of the reward_funcs"),
    ({"reward_weights": "1.0"}, "got 1 for 2"),
    ({"num_generations": 1}, "num_generations must be at least 2"),
    ({"num_generations": 5}, "num_generations 5", "per_device_train_batch_size 4 x 2", "5 would"),
    ({"max_completion_length": 64}, "max_completion_length 64 leaves no room", "64 positions"),
    ({"max_completion_length": 60}, "tokens, and with max_completion_length there is room for 4"),
    ({"per_device_train_batch_size": 32}, "a rollout needs 16 prompts and the data set has 10"),
    ({"dataset_name": "ROWS"}, "rows.jsonl:4: column 'prompt' is missing"),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=[" ".join(map(str, c[0].values())) for c in REFUSED])
def test_bad_input_is_refused_in_one_sentence_before_anything_compiles(case, job, tmp_path, capsys):
    fields, *parts = case
    rows = write_rows(tmp_path / "rows.jsonl", [*questions(3), {"answer": "1"}])
    where = {"REWARDS": job["reward_funcs"].split(":")[0], "ROWS": str(rows)}
    for name, text in where.items():
        fields = {k: str(v).replace(name, text) if v else v for k, v in fields.items()}
    given = {k: v for k, v in (job | fields).items() if v is not None}
    assert call(**given, output_dir=tmp_path / "run") == 2
    said = capsys.readouterr()
    assert "compiling" not in said.out
    assert said.err.startswith("error: ") and len(said.err.splitlines()) <= 2, said.err
    assert all(part in said.err for part in parts), said.err


@pytest.mark.filterwarnings("default::UserWarning")
def test_failures_are_told_and_too_many_stop_the_run_with_their_message(job, tmp_path, capsys):
    file = job["reward_funcs"].split(":")[0]
    fields = job | {"reward_funcs": f"{file}:one_fails", "reward_weights": 1.0, "max_steps": 2}
    assert call(**fields, output_dir=tmp_path / "one") == 0
    said = capsys.readouterr().out
    assert "warning: reward functions failed on 1 of 8 completions; reward 'one_fails'" in said
    evaluated, trained = lines(tmp_path / "one" / "metrics.jsonl")
    assert trained["reward_errors"] == 1 and evaluated["eval_reward_errors"] == 1
    assert call(**fields, max_reward_errors=0.001, output_dir=tmp_path / "none") == 1
    said = capsys.readouterr().err
    assert "reward 'one_fails' has failed on 1 of 8" in said and "max_reward_errors=0.001" in said


@pytest.mark.slow
@pytest.mark.parametrize("seed", [42, 43, 44])
def test_the_run_with_no_flags_lifts_held_out_accuracy_over_95_percent(seed, tmp_path):
    result = TrainerEngine().run_job(
        GRPOConfig().replace(**GRPOConfig.demo, seed=seed, output_dir=str(tmp_path / "run"))
    )
    before = next(r for r in lines(tmp_path / "run" / "metrics.jsonl") if "eval_pass@1" in r)
    assert before["eval_pass@1"] < 0.7 and result.metrics["eval_pass@1"] > 0.95
