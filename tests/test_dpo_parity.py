"""DPO against what TRL logged on the same model, pairs and flags (`benchmarks/record_trl_dpo.py`).

The records pin template, implied prompt, truncation, end token, log-probabilities of policy and
reference, the losses, the backward pass, clipping and AdamW.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from golden.trl_cases import HERE, write_tiny_llama
from golden.trl_dpo_cases import SMOLLM2, TINY, write_pairs
from rich.console import Console

from relax.config import DPOConfig, create_default_config
from relax.engine import TrainerEngine

# The issue asks for 0.2 %, 1 % and 0.2 % on a real model.
TOLERANCE = {"loss": 2e-3, "grad_norm": 1e-2, "logps/chosen": 2e-3, "logps/rejected": 2e-3}
TINY_TOLERANCE = dict.fromkeys(TOLERANCE, 1e-4)
REWARD = 1e-4  # absolute, times the size of the log-probabilities they are differences of
# TRL averages these over micro-batches as if each had as many tokens.
UNWEIGHTED = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")


def run(model_dir, rows, output_dir, settings) -> list[dict]:
    """Runs a job in this process: the lines of metrics.jsonl."""
    fields = settings | {"shuffle_dataset": False}
    if isinstance(fields.get("loss_type"), str):
        fields["loss_type"] = [fields["loss_type"]]
    config = create_default_config(
        str(model_dir), str(rows), str(output_dir), config_class=DPOConfig, **fields
    )
    with open(os.devnull, "w") as null:
        TrainerEngine(console=Console(file=null)).run_job(config)
    lines = (Path(output_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_equal_logs(case: dict, records: list[dict], tolerance: dict[str, float]) -> None:
    theirs = {name: np.array(values) for name, values in case["logged"].items()}
    ours = {name: np.array([record[name] for record in records]) for name in theirs}
    assert ours["num_tokens"].tolist() == theirs["num_tokens"].tolist()
    for name, relative in tolerance.items():
        np.testing.assert_allclose(ours[name], theirs[name], rtol=relative, err_msg=name)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0.01, atol=1e-3, err_msg=name)
    # The first update's margins are rounding noise in TRL, and exactly 0 here.
    accuracy = "rewards/accuracies"
    np.testing.assert_allclose(ours[accuracy][1:], theirs[accuracy][1:], atol=1e-6)
    if case["settings"].get("gradient_accumulation_steps", 1) == 1:
        for name in UNWEIGHTED:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=3e-3, atol=1e-3, err_msg=name)


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.mark.parametrize("name", TINY)
def test_every_update_of_a_tiny_llama_logs_what_trl_logs(name, tiny_llama, tmp_path):
    case = json.loads((HERE / "trl_dpo.json").read_text())["cases"][name]
    rows = write_pairs(tmp_path / "rows.jsonl", case["rows"], count=100)
    one_shape = {"pad_to_multiple_of": 320}  # so that the step is compiled once
    ours = run(tiny_llama, rows, tmp_path / "run", case["settings"] | one_shape)
    assert_equal_logs(case, ours, TINY_TOLERANCE)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    "RELAX_SMOLLM2" not in os.environ, reason="RELAX_SMOLLM2 names no model directory"
)
@pytest.mark.parametrize("name", SMOLLM2)
def test_every_update_of_smollm2_on_real_pairs_logs_what_trl_logs(name, tmp_path):
    case = json.loads((HERE / "trl_dpo_smollm2.json").read_text())["cases"][name]
    rows = write_pairs(tmp_path / "rows.jsonl", case["rows"], count=100)
    ours = run(os.environ["RELAX_SMOLLM2"], rows, tmp_path / "run", case["settings"])
    assert_equal_logs(case, ours, TOLERANCE)
