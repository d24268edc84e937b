"""A DPO run that is killed anywhere and started again ends as one that never was."""

import pytest
from golden.trl_cases import write_tiny_llama
from runs import ROOT, end_all, finish, flags, fork, killed, kills, metrics, outcome, write_rows

pytestmark = pytest.mark.programs

SCRIPT = ROOT / "run_dpo.py"
STEPS = 12
JOB = {
    "test_size": 4,
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "pad_to_multiple_of": 16,
    "learning_rate": 1e-3,
    "precompute_ref_log_probs": "true",
    "gradient_checkpointing": "false",
    "eval_strategy": "steps",
    "eval_steps": 4,
    "logging_steps": 2,
    "save_steps": 3,
    "save_total_limit": 2,
}
# In this order, each start going on from what the one before left.
KILLS = (
    "reference:3",  # while the reference's log-probabilities are computed
    "step:2",
    "before_write:1",
    "mid_write:1",
    "before_checksums:1",
    "before_rename:1",
    "after_rename:1",  # 3 is saved
    "step:2",
    "mid_retention:1",  # 9 is saved, 3 half deleted
    "export:1",
)


@pytest.fixture(autouse=True)
def no_child_left():
    yield
    end_all()


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("job")
    pairs = [
        {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1 + a % 3)}
        for a, b in ((i * 7 % 50, i * 13 % 50) for i in range(24))
    ]
    rows = write_rows(root / "rows.jsonl", pairs)
    model = write_tiny_llama(root / "model")
    return flags(**JOB, dataset_name=rows, model_name_or_path=model)


@pytest.mark.timeout(1200)  # a dozen programs, one after the other
@kills(KILLS, 0, 6, 7)
def test_kills_end_in_the_bytes_of_an_unbroken_run(job, kills, tmp_path):
    """Parameters, optimizer state, position, metrics and the exported model, bit for bit."""
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    finish(*job, f"--output_dir={unbroken}", script=SCRIPT)
    records = metrics(unbroken)
    assert abs(records[0]["loss"] - 0.6931) < 0.05 and "eval_rewards/accuracies" in records[-1]
    assert [r["step"] for r in records if "loss" in r] == list(range(2, STEPS + 1, 2))
    arguments = [*job, f"--output_dir={broken}", "--resume=auto"]
    for fault in kills:
        child = fork(*arguments, fault=fault, script=SCRIPT)
        assert killed(child), (fault, child.stdout, child.stderr)
    printed = finish(*arguments, script=SCRIPT)
    assert "reference log-probabilities of training pairs: read from" in printed
    assert outcome(broken) == outcome(unbroken)
