"""Quantised bases: the numbers, what is computed with them, what is kept, trained and written."""

import dataclasses
import io
import json
import shutil

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import bits, packed_batch
from families import tiny_family
from golden.trl_cases import write_tiny_llama
from rich.console import Console
from runs import additions, write_rows

from relax import parallel
from relax.config import PPOConfig, SFTConfig, create_default_config
from relax.engine import TrainerEngine
from relax.errors import ConfigError
from relax.models import Transformer, TransformerConfig, load_pretrained, save_pretrained
from relax.models.config import LoRA
from relax.models.huggingface.quantized import BaseQuantizer, original_weights
from relax.models.lora import merge_adapters
from relax.models.quantization import dequantize, plain, quantize, quantize_linear
from relax.models.trainable import merge, partition
from relax.optimizers import adamw
from relax.sampling import SamplingConfig, generate
from relax.trainers import SFTTrainer

KEY = jax.random.key(0)
LORA = LoRA(r=4, alpha=6.0, dropout=0.0, target_modules=("all-linear",))
BATCH = packed_batch([[([1, 2, 3, 4], [5]), ([6, 7], [8, 9, 10])]], 13)

# bitsandbytes 0.50.2, quantize_4bit(WEIGHTS, blocksize=64, quant_type="nf4") on a CPU: the codes of
# 3 outputs of 128 inputs each, row by row, and the largest magnitude of each block.
_I = np.arange(3 * 128)
WEIGHTS = (((_I * 7919) % 1009 - 500) / np.float32(4000) * (1 + _I // 64)).astype(np.float32)
CODES = (
    "0ec8521fda7410ec9531fdb7420eda631fec8521fda7410ec9531fdb7420eda6"
    "31feb8521fda7310ec9521fdb7420ed9631feb8521fda6310ec9521fdb7420ec"
    "9631feb8420fda6310ec9521fdb7410ec9631feb8420fda6310ec8521fdb7410"
    "ec9631feb8420eda6310ec8521fdb7410ec9531feb8420eda6310ec8521fda74"
    "10ec9531fdb7420eda631fec8521fda7410ec9531fdb7420eda631feb8521fda"
    "7310ec9521fdb7420ed9631feb8521fda6310ec9521fdb7420ed9631feb8420f"
)
LARGEST = (0.12625, 0.2505, 0.36975, 0.499, 0.6325, 0.747)


def test_nf4_has_the_codes_and_scales_of_bitsandbytes():
    found = quantize(jnp.asarray(WEIGHTS.reshape(3, 128).T), "nf4")
    blocks = np.asarray(found.codes).T.reshape(3, 2, 32)
    codes = np.concatenate([blocks & 15, blocks >> 4], axis=-1).reshape(-1)
    assert "".join(f"{code:x}" for code in codes) == CODES
    np.testing.assert_allclose(np.asarray(found.scales).T.reshape(-1), LARGEST, rtol=1e-6)
    error = dequantize(found) - WEIGHTS.reshape(3, 128).T
    assert abs(float(jnp.abs(error).max()) - 0.11100000143) < 1e-6
    assert abs(float(dequantize(found).sum()) - 1.98484838) < 1e-4


def test_int8_rounds_to_the_nearest_of_255_numbers_of_a_block():
    matrix = jnp.asarray([[1.27, 0.0], [0.634, 0.0], [-0.006, 0.0], [-1.27, 0.0]], jnp.float32)
    found = quantize(matrix, "int8")
    assert np.asarray(found.codes)[:4, 0].tolist() == [127, 63, -1, -127]
    np.testing.assert_allclose(found.scales, [[1.27, 0.0]])
    np.testing.assert_allclose(dequantize(found)[:, 0], [1.27, 0.63, -0.01, -1.27], rtol=1e-6)
    assert not np.asarray(dequantize(found)[:, 1]).any()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("shape", [(64, 3), (65, 3), (7, 2), (2, 130, 5)])
def test_numbers_of_a_block_stay_as_they_are_and_shapes_and_dtypes_are_kept(kind, shape):
    matrix = jax.random.normal(KEY, shape)
    once = dequantize(quantize(matrix, kind))
    assert once.shape == quantize(matrix, kind).shape == shape
    np.testing.assert_allclose(dequantize(quantize(once, kind)), once, rtol=1e-6)
    assert dequantize(quantize(matrix, kind), jnp.bfloat16).dtype == jnp.bfloat16
    bound = {"nf4": 0.152, "int8": 0.5 / 127 + 1e-6}[kind]  # half of the widest gap
    assert float(jnp.abs(once - matrix).max() / jnp.abs(matrix).max()) <= bound


def test_accelerators_choose_the_same_numbers_without_a_table(monkeypatch):
    small = quantize(jax.random.normal(KEY, (128, 8)), "nf4")
    monkeypatch.setattr(parallel, "platform", lambda: "tpu")
    chosen = dequantize(small)
    monkeypatch.undo()
    assert bits(chosen) == bits(dequantize(small))


# What is computed with them.


def trainer_of(model, params, lora=LORA):
    model = model.clone(lora=lora)
    return SFTTrainer(model, adamw(1e-2), params=params, max_grad_norm=1.0)


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        pytest.param("nf4", "qwen3_moe", id="experts"),
        pytest.param("int8", "dora", id="dora"),
        pytest.param("nf4", "gpt_oss", id="biases of experts", marks=pytest.mark.slow),
        pytest.param("nf4", "gemma4_text-shared", id="shared keys and values"),
    ],
)
def test_gradients_of_adapters_are_those_over_the_dequantised_weights(kind, family):
    model, params = tiny_family("llama" if family == "dora" else family)
    lora = dataclasses.replace(LORA, use_dora=family == "dora")
    model = model.clone(gradient_checkpointing=True)
    small = quantize_linear(params, kind)
    whole = jax.tree.map(plain, small, is_leaf=lambda leaf: leaf is not plain(leaf))
    found = []
    for weights in (small, whole):
        trainer = trainer_of(model, weights, lora)
        state = trainer.create_train_state(KEY)
        adapters = jax.tree.map(lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size)).reshape(x.shape),
                                state.params)  # B is no longer 0  # fmt: skip
        found.append(jax.jit(jax.value_and_grad(
            lambda p, t=trainer, s=state: t.compute_loss(p, BATCH, frozen=s.frozen).loss
        ))(adapters))  # fmt: skip
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(found[0][1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), *found)


def test_generation_reads_the_same_numbers():
    model, params = tiny_family("qwen3_moe")
    small = quantize_linear(params, "nf4")
    whole = jax.tree.map(plain, small, is_leaf=lambda leaf: leaf is not plain(leaf))
    config = SamplingConfig(max_new_tokens=8)
    one, other = (generate(model, p, [[3, 1, 4], [1, 5]], KEY, config) for p in (small, whole))
    assert np.array_equal(one.tokens, other.tokens)
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_update_holds_no_layer_as_a_matrix_that_it_is_not_at_work_on(checkpointing):
    """By XLA's account: eight layers of 1.6 MB in float take less than three of them."""
    config = TransformerConfig(
        vocab_size=32, hidden_size=128, intermediate_size=896, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    model = Transformer(config, gradient_checkpointing=checkpointing)
    params = jax.jit(model.init)(KEY, jnp.zeros((1, 8), jnp.int32))["params"]
    layer = sum(leaf.nbytes for leaf in jax.tree.leaves(params["layers_0"]))
    assert 1.6e6 < layer < 1.7e6
    trainer = trainer_of(model, quantize_linear(params, "nf4"))
    state = trainer.create_train_state(KEY)
    account = trainer.train_step.lower(state, BATCH).compile().memory_analysis()
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    assert account.temp_size_in_bytes < 3 * layer + 4 * trained


# Reading, training and writing.


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("llama"))


FILES = ["phi3", "mixtral", "gpt_oss", "gemma4_text-shared"]


@pytest.mark.parametrize("name", FILES)
def test_a_directory_is_read_as_its_quantised_weights(name, tmp_path):
    """Tensors that hold several matrices, and one of several experts."""
    model, params = tiny_family(name)
    directory = save_pretrained(tmp_path / "model", model, params)
    reader = BaseQuantizer("int8")
    _, found = load_pretrained(directory, quantize=reader)
    assert bits(found) == bits(quantize_linear(params, "int8"))
    flat = flax.traverse_util.flatten_dict(params)
    errors = {
        path: np.square(np.asarray(leaf - dequantize(quantize(leaf, "int8")), np.float64)).sum()
        for path, leaf in flat.items()
        if path in reader.errors
    }
    assert len(errors) == len(reader.errors) > 6
    for path, error in errors.items():
        np.testing.assert_allclose(reader.errors[path][0], error, rtol=1e-3)
    said = reader.report()
    assert said.startswith(f"int8: {len(errors)} matrices quantised to ") and "(layers_" in said


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", additions(8))


def train(model_dir, rows, output_dir, **fields):
    defaults = {
        "max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 2,
        "learning_rate": 1e-2, "pad_to_multiple_of": 32, "use_peft": True, "lora_r": 2,
        "lora_dropout": 0.0, "quantize_base": "nf4",
    }  # fmt: skip
    config = create_default_config(
        str(model_dir), str(rows), str(output_dir), **(defaults | fields)
    )
    console = Console(file=io.StringIO(), width=200)
    return TrainerEngine(console=console).run_job(config), console.file.getvalue()


@pytest.fixture(scope="module")
def run(model_dir, rows, tmp_path_factory):
    return train(model_dir, rows, tmp_path_factory.mktemp("run") / "run")


def test_a_run_tells_the_rounding_error_and_goes_on_from_its_middle_with_nothing_but_the_base(
    run, model_dir, rows, tmp_path
):
    result, said = run
    assert (
        "nf4: 14 matrices quantised to " in said and "‖W − Q(W)‖ / ‖W‖ per layer from 0.0" in said
    )
    again = shutil.copytree(result.output_dir, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "4")
    shutil.rmtree(again / "final")
    resumed, said = train(model_dir, rows, again, resume="auto")
    assert "resuming after step 2" in said
    files = (r.model_dir / "adapter_model.safetensors" for r in (result, resumed))
    assert len({file.read_bytes() for file in files}) == 1
    sums = json.loads((again / "checkpoints" / "4" / "checksums.json").read_text())["leaves"]
    assert not any(name.startswith("frozen") for name in sums)


@pytest.mark.parametrize("name", FILES)
def test_what_is_merged_is_merged_into_the_weights_of_the_file(name, tmp_path):
    model, params = tiny_family(name)
    directory = save_pretrained(tmp_path / "model", model, params)
    reader = BaseQuantizer("nf4")
    model, small = load_pretrained(directory, quantize=reader)
    adapters, _ = partition(model.clone(lora=LORA), params, KEY)
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    weights = original_weights(merge(adapters, {"base": small}), reader)
    path = save_pretrained(tmp_path / "merged", model, merge_adapters(weights, LORA))
    expected = merge_adapters(merge(adapters, {"base": params}), LORA)
    assert bits(load_pretrained(path)[1]) == bits(expected)


def test_what_cannot_be_quantised_is_refused(run, rows, tmp_path):
    result, _ = run
    with pytest.raises(ConfigError, match="quantize_base has no effect: use_peft is"):
        SFTConfig().replace(quantize_base="nf4", model_name_or_path="x").check()
    with pytest.raises(ConfigError, match="the demo model is made here"):
        SFTConfig().replace(quantize_base="nf4", use_peft=True).check()
    with pytest.raises(ConfigError, match="holds an adapter. Merge it into its base first"):
        train(result.model_dir, rows, tmp_path / "run")


def test_a_critic_that_copies_quantised_weights_is_refused():
    fields = {"model_name_or_path": "x", "reward_funcs": ["exact_match"], "use_peft": True}
    config = PPOConfig().replace(**fields, quantize_base="nf4", value_model="policy")
    with pytest.raises(ConfigError, match="value_model policy trains all weights of a copy"):
        config.check()
