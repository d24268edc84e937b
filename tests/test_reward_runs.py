"""Runs of run_reward.py: what is said, saved and refused, and that a kill changes nothing."""

import json

import pytest
from golden.trl_cases import write_tiny_llama
from grpo_runs import call as call_grpo
from runs import ROOT, end_all, finish, flags, fork, killed, kills, metrics, outcome, write_rows

from relax.config import RewardModelConfig, cli
from relax.models.huggingface.classifiers import load_classifier

SCRIPT = ROOT / "run_reward.py"
STEPS = 8
JOB = {
    "test_size": 4,
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "pad_to_multiple_of": 16,
    "learning_rate": 1e-3,
    "center_rewards_coefficient": 0.01,
    "gradient_checkpointing": "false",
    "eval_strategy": "steps",
    "eval_steps": 4,
    "logging_steps": 2,
    "save_steps": 2,
    "save_total_limit": 2,
}
# In this order, each start going on from what the one before left.
KILLS = (
    "data:1",
    "step:2",
    "mid_write:1",
    "before_checksums:1",
    "before_rename:1",
    "after_rename:1",  # 2 is saved
    "step:1",
    "mid_retention:1",  # 6 is saved, 2 half deleted
    "trained:1",
    "export:1",
)


@pytest.fixture(autouse=True)
def no_child_left():
    yield
    end_all()


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("job")
    sums = [(i * 7 % 50, i * 13 % 50) for i in range(20)]
    pairs = [
        {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1), "margin": a % 3}
        for a, b in sums
    ]
    rows = write_rows(root / "rows.jsonl", pairs)
    return JOB | {"dataset_name": rows, "model_name_or_path": write_tiny_llama(root / "model")}


def call(**fields) -> int:
    """`run_reward.py` in this process: the exit code."""
    from run_reward import main

    try:
        cli.run(RewardModelConfig, main, flags(**fields))
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="module")
def unbroken(job, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("unbroken") / "run"
    finish(*flags(**job), f"--output_dir={output_dir}", script=SCRIPT)
    return output_dir


def test_a_run_logs_what_trl_logs_and_its_model_is_trained_on(job, unbroken, tmp_path, capsys):
    first, *_, last = metrics(unbroken)
    names = {"loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward", "num_tokens"}
    assert names <= set(first) and {f"eval_{name}" for name in names - {"num_tokens"}} <= set(last)
    reports = json.loads((unbroken / "data.json").read_text())["reports"]
    assert reports["training pairs"]["dropped"] == {}
    _, params = load_classifier(unbroken / "final")
    fields = job | {"model_name_or_path": unbroken / "final", "max_steps": 1, "use_peft": "true"}
    assert call(**fields, output_dir=tmp_path / "again") == 0
    assert "new score head" not in capsys.readouterr().out
    _, again = load_classifier(tmp_path / "again" / "final")
    # One small update away from where it began: the head was read, and is among what is saved.
    change = abs(again["score"]["kernel"] - params["score"]["kernel"]).max()
    assert 0 < change <= 1.1e-3


def test_a_language_model_gets_a_head_and_the_run_says_so(job, tmp_path, capsys):
    assert call(**job | {"max_steps": 1, "output_dir": tmp_path / "run"}) == 0
    assert "new score head" in capsys.readouterr().out


def test_several_labels_are_refused_before_anything_runs(job, unbroken, tmp_path, capsys):
    fields = json.loads((unbroken / "final" / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(fields | {"id2label": {"0": "bad", "1": "good"}})
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((unbroken / "final" / name).read_bytes())
    fields = job | {"model_name_or_path": tmp_path, "output_dir": tmp_path / "run"}
    assert call(**fields) == 2
    assert "has 2 labels" in capsys.readouterr().err


def test_the_model_is_a_reward_function_of_grpo(job, unbroken, tmp_path):
    """Weighted with a Python function; its mean and that of the sum are logged."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{a}+1="} for a in range(4)])
    model = unbroken / "final"
    code = call_grpo(
        model_name_or_path=job["model_name_or_path"],
        dataset_name=rows,
        reward_funcs=f"model:{model},think_format_reward",
        reward_weights="2,0.5",
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        max_steps=1,
        logging_steps=1,
        gradient_checkpointing="false",
        output_dir=tmp_path / "run",
    )
    assert code == 0
    (record,) = metrics(tmp_path / "run")
    rewards = [record[f"rewards/{name}/mean"] for name in ("final", "think_format_reward")]
    assert rewards[0] != 0
    assert abs(record["reward"] - 2 * rewards[0] - 0.5 * rewards[1]) < 1e-5


@pytest.mark.programs
@pytest.mark.timeout(1200)  # a dozen programs, one after the other
@kills(KILLS, 5, 8)
def test_kills_end_in_the_bytes_of_an_unbroken_run(job, unbroken, kills, tmp_path):
    """Parameters, optimizer state, position, metrics and the exported model, bit for bit."""
    arguments = [*flags(**job), f"--output_dir={tmp_path / 'broken'}", "--resume=auto"]
    for fault in kills:
        child = fork(*arguments, fault=fault, script=SCRIPT)
        assert killed(child), (fault, child.stdout, child.stderr)
    finish(*arguments, script=SCRIPT)
    assert outcome(tmp_path / "broken") == outcome(unbroken)
