"""Runs that train adapters, or a part of the weights: from flags to files, and on from there."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import bits
from golden.trl_cases import write_tiny_llama
from rich.console import Console
from runs import additions, metrics, outcome, write_rows

from relax.config import create_default_config
from relax.engine import TrainerEngine
from relax.errors import CheckpointError, ConfigError
from relax.files import list_steps
from relax.models import load_pretrained, save_pretrained
from relax.models.huggingface.peft import base_of, load_adapter, load_merged

LORA = {"use_peft": True, "lora_r": 2, "lora_dropout": 0.2, "lora_target_modules": ["q_proj"]}
FREEZE = {"freeze": "embed|[qk]_proj|layers_1"}
ONE = {"max_steps": 1, "save_strategy": "no", "save_steps": 500}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", additions(8))


@pytest.fixture
def train(model_dir, rows):
    """Runs four updates: the result, and what was printed."""

    def train(output_dir, model=model_dir, **fields):
        defaults = {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "pad_to_multiple_of": 32,
            "save_steps": 2,
        }
        config = create_default_config(
            str(model), str(rows), str(output_dir), **(defaults | fields)
        )
        with open(output_dir.with_suffix(".txt"), "a+") as file:
            result = TrainerEngine(console=Console(file=file, width=200)).run_job(config)
            file.seek(0)
            return result, file.read()

    return train


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """One run for several tests."""
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def run(train, kept):
    if not kept.exists():
        train(kept, **LORA)
    return kept


def checkpoint_leaves(output_dir) -> dict:
    step = list_steps(output_dir / "checkpoints")[-1]
    sums = json.loads((output_dir / "checkpoints" / str(step) / "checksums.json").read_text())
    return sums["leaves"]


def test_an_adapter_is_trained_saved_and_loads_on_its_base(run, model_dir):
    said = run.with_suffix(".txt").read_text()
    model, base = load_pretrained(model_dir)
    size = sum(leaf.size for leaf in jax.tree.leaves(base))
    c = model.config
    wide = c.num_attention_heads * c.head_dim
    adapters = c.num_hidden_layers * 2 * (c.hidden_size + wide)
    assert f"training {adapters:,} of {size + adapters:,} parameters" in said
    files = {file.name for file in (run / "final").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert "config.json" not in files and "model.safetensors" not in files
    assert base_of(run / "final") == str(model_dir.resolve())
    lora, trained = load_adapter(run / "final", model, base)
    assert (lora.lora.r, lora.lora.alpha, lora.lora.dropout) == (2, 32, 0.2)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(trained))
    assert metrics(run)[-1]["step"] == 4


def test_a_checkpoint_holds_the_adapter_and_no_weight_of_the_base(run):
    names = set(checkpoint_leaves(run))
    assert {n for n in names if n.startswith("params/")} == {
        f"params/layers_{i}/q_proj/{half}" for i in range(2) for half in ("lora_a", "lora_b")
    }
    assert not any("kernel" in name or name.startswith("frozen") for name in names)


@pytest.mark.parametrize("fields", [LORA, FREEZE], ids=["lora", "freeze"])
def test_a_run_that_goes_on_from_its_middle_ends_in_the_same_bytes(fields, train, run, tmp_path):
    """With dropout, too: what is trained, the optimizer's state, the metrics, the files."""
    whole, again = run, tmp_path / "again"
    if fields is not LORA:
        train(whole := tmp_path / "whole", **fields)
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "4")
    shutil.rmtree(again / "final")
    _, said = train(again, resume="auto", **fields)
    assert "resuming after step 2" in said
    assert everything(again) == everything(whole)


def everything(output_dir):
    file = next((output_dir / "final").glob("*model.safetensors"))
    (output_dir / "final" / "model.safetensors").write_bytes(file.read_bytes())
    return outcome(output_dir)


def test_a_run_over_another_base_is_refused(train, run, model_dir, tmp_path):
    again, other = shutil.copytree(run, tmp_path / "again"), tmp_path / "other"
    shutil.copytree(model_dir, other)
    model, params = load_pretrained(other)
    params["layers_1"]["k_proj"]["kernel"] += 1e-3
    save_pretrained(other / "weights", model, params)
    shutil.move(other / "weights" / "model.safetensors", other / "model.safetensors")
    shutil.rmtree(other / "weights")
    with pytest.raises(CheckpointError, match="have changed: base/layers_1/k_proj/kernel. Restore"):
        train(
            again,
            **LORA,
            model=other,
            resume="auto",
            max_steps=6,
            allow_config_change=["model_name_or_path", "max_steps"],
        )


def test_a_merged_adapter_is_a_whole_model(train, run, tmp_path):
    result, _ = train(tmp_path / "merged", **LORA, merge_lora=True)
    assert (result.model_dir / "config.json").is_file()
    _, merged = load_pretrained(result.model_dir)
    _, expected = load_merged(run / "final")
    assert bits(merged) == bits(expected)


def test_a_directory_with_an_adapter_is_trained_from_as_the_merged_model(
    train, run, model_dir, tmp_path
):
    """All its weights, or a new adapter, which is then merged as its base lies nowhere."""
    _, merged = load_merged(run / "final")
    result, _ = train(tmp_path / "full", model=run / "final", **ONE, learning_rate=1e-12)
    _, params = load_pretrained(result.model_dir)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), params, merged)
    result, said = train(tmp_path / "new", model=run / "final", **LORA, **ONE)
    assert "the adapter will be merged: PEFT could not load its base model" in said
    _, params = load_pretrained(result.model_dir)
    assert bits(params["layers_0"]["k_proj"]) == bits(merged["layers_0"]["k_proj"])
    assert bits(params["layers_0"]["q_proj"]) != bits(merged["layers_0"]["q_proj"])


def test_frozen_weights_are_exported_as_they_were(train, model_dir, tmp_path):
    result, said = train(tmp_path / "run", **ONE, freeze="embed|q_proj")
    assert " of " in said.split("training ")[-1].split("parameters")[0]
    (_, before), (_, after) = (load_pretrained(path) for path in (model_dir, result.model_dir))
    assert bits(after["embed_tokens"]) == bits(before["embed_tokens"])
    assert bits(after["layers_1"]["q_proj"]) == bits(before["layers_1"]["q_proj"])
    assert bits(after["layers_1"]["k_proj"]) != bits(before["layers_1"]["k_proj"])


def test_a_target_or_a_regular_expression_that_fits_nothing_ends_the_run_before_it_begins(
    train, tmp_path
):
    with pytest.raises(ConfigError, match="got c_attn. This model has .*q_proj"):
        train(tmp_path / "a", use_peft=True, lora_target_modules=["c_attn"])
    with pytest.raises(ConfigError, match="'h.0' fits none of"):
        train(tmp_path / "b", freeze="h.0")
    assert not (tmp_path / "a" / "config.json").exists()
