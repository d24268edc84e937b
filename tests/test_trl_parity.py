"""ReLax against what TRL logged on the same model, rows and flags.

`benchmarks/record_trl.py` made the records. They pin, at once: template, masks, truncation, the
end token, the normaliser of the loss, the backward pass, clipping, AdamW and the schedule.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from golden.trl_cases import (
    GSM_ROWS,
    HERE,
    SMOLLM2,
    TINY,
    gsm_rows,
    write_rows,
    write_tiny_llama,
)
from rich.console import Console

from relax.config import create_default_config
from relax.engine import RunResult, TrainerEngine
from relax.models import load_pretrained

# The issue asks for 0.2 % of the loss and 1 % of the gradient norm on a real model; the tiny one
# agrees to 1e-5, and 1e-4 also sees a normaliser that is off by one token.
TINY_TOLERANCE = {"loss": 1e-4, "grad_norm": 1e-4, "entropy": 1e-4}
# SmolLM2 pads with <|im_end|>, and torch's embedding gives the padding token no gradient even where
# it stands in the text, so TRL's norm is off by 1e-4 there. ReLax has the gradient of the loss.
REAL_TOLERANCE = {"loss": 2e-3, "grad_norm": 1e-2, "entropy": 1e-2}
RATE_TOLERANCE = 1e-6  # relative
ACCURACY_TOLERANCE = 3e-3  # absolute: a tie of two tokens may fall either way
# TRL averages these over micro-batches as if each had as many trained tokens; ReLax weights them
# by tokens, as the loss.
UNWEIGHTED = ("entropy", "mean_token_accuracy")

slow = pytest.mark.slow
minutes = pytest.mark.timeout(1800)
needs_smollm2 = pytest.mark.skipif(
    "RELAX_SMOLLM2" not in os.environ, reason="RELAX_SMOLLM2 names no model directory"
)


def run(model_dir, rows, output_dir, **fields) -> tuple[RunResult, list[dict]]:
    """Runs a job in this process: its result and the lines of metrics.jsonl."""
    config = create_default_config(str(model_dir), str(rows), str(output_dir), **fields)
    with open(os.devnull, "w") as null:
        result = TrainerEngine(console=Console(file=null)).run_job(config)
    lines = (Path(output_dir) / "metrics.jsonl").read_text().splitlines()
    return result, [json.loads(line) for line in lines]


def recorded(file: str, name: str) -> dict:
    return json.loads((HERE / file).read_text())["cases"][name]


def assert_equal_logs(case: dict, ours: list[dict], tolerance: dict[str, float]) -> None:
    theirs, ours = case["logged"], {name: [r[name] for r in ours] for name in case["logged"]}
    assert ours["num_tokens"] == theirs["num_tokens"]
    np.testing.assert_allclose(ours["learning_rate"], theirs["learning_rate"], rtol=RATE_TOLERANCE)
    accumulates = case["settings"].get("gradient_accumulation_steps", 1) > 1
    for name, relative in tolerance.items():
        if not (accumulates and name in UNWEIGHTED):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=relative, err_msg=name)
    if not accumulates:
        name = "mean_token_accuracy"
        np.testing.assert_allclose(ours[name], theirs[name], atol=ACCURACY_TOLERANCE, err_msg=name)


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.mark.parametrize("name", TINY)
def test_every_update_of_a_tiny_llama_logs_what_trl_logs(name, tiny_llama, tmp_path):
    case = recorded("trl_sft.json", name)
    rows = write_rows(tmp_path / "rows.jsonl", case["rows"])
    _, ours = run(tiny_llama, rows, tmp_path / "run", **case["settings"])
    assert_equal_logs(case, ours, TINY_TOLERANCE)


@slow
@minutes
@needs_smollm2
@pytest.mark.parametrize("name", SMOLLM2)
def test_every_update_of_smollm2_on_real_rows_logs_what_trl_logs(name, tmp_path):
    case = recorded("trl_smollm2.json", name)
    model_dir = os.environ["RELAX_SMOLLM2"]
    _, ours = run(model_dir, GSM_ROWS, tmp_path / "run", **case["settings"])
    assert_equal_logs(case, ours, REAL_TOLERANCE)


@slow
@minutes
@needs_smollm2
def test_twenty_updates_on_real_rows_lower_the_held_out_loss_and_transformers_loads_the_model(
    tmp_path,
):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    result, records = run(
        os.environ["RELAX_SMOLLM2"],
        GSM_ROWS,
        tmp_path / "run",
        max_steps=20,
        test_size=20,
        eval_strategy="steps",
        eval_steps=20,
        eval_on_start=True,
        per_device_train_batch_size=4,
        max_length=512,
        save_strategy="no",
    )
    before, after = [r["eval_loss"] for r in records if "eval_loss" in r]
    assert after < before - 0.05, (before, after)

    reference, info = transformers.AutoModelForCausalLM.from_pretrained(
        result.model_dir, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.model_dir)
    row = gsm_rows()[0]
    text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
    ids = np.array([tokenizer(text)["input_ids"]])
    model, params = load_pretrained(result.model_dir)
    ours = model.apply({"params": params}, ids.astype(np.int32))
    in_memory = model.apply({"params": result.state.params}, ids.astype(np.int32))
    with torch.no_grad():
        theirs = reference(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=1e-3)
    np.testing.assert_array_equal(np.asarray(in_memory), np.asarray(ours))
