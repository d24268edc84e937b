"""Experts of gpt-oss in MXFP4 are read as transformers reads them, and written in bfloat16."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import bits
from families import IDS, logits_of, tiny_family
from safetensors.numpy import load_file, save_file

from relax.errors import ModelLoadError
from relax.models import load_pretrained, save_pretrained
from relax.models.huggingface import mxfp4
from relax.models.huggingface.quantized import BaseQuantizer
from relax.models.huggingface.shards import INDEX, SINGLE
from relax.models.quantization import quantize_linear
from relax.tools.merge.sources import find_source

E, D, F = 3, 64, 32
SIZES = {
    "vocab_size": 61,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": E,
    "num_experts_per_tok": 2,
    "sliding_window": 5,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "pad_token_id": None,
}
QUANTIZED = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.embed_tokens", "lm_head"],
}


def packed(rng, width, outputs):
    """Blocks and scales of a weight `[E, width, outputs]`; all bytes, and exponents around 0."""
    blocks = rng.integers(0, 256, (E, outputs, width // 32, 16)).astype(np.uint8)
    return blocks, rng.integers(121, 126, blocks.shape[:-1]).astype(np.uint8)


def test_every_byte_and_scale_is_the_number_of_the_specification():
    """1.5 is 0b0011 and -4 is 0b1110; the lower half of a byte is the first number."""
    blocks = np.zeros((1, 1, 2, 16), np.uint8)
    blocks[0, 0, 1, 0] = 0b1110_0011
    scales = np.array([[[127, 130]]], np.uint8)
    expected = np.zeros(64)
    expected[32], expected[33] = 1.5 * 8, -4.0 * 8
    numbers = mxfp4.unpack(blocks, scales)
    assert numbers.shape == (1, 64, 1) and numbers.dtype == jnp.bfloat16
    np.testing.assert_array_equal(numbers[0, :, 0].astype(np.float32), expected)


def test_numbers_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, _ = packed(np.random.default_rng(0), 96, 5)
    scales = np.random.default_rng(1).integers(1, 252, blocks.shape[:-1]).astype(np.uint8)
    theirs = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
    ours = mxfp4.unpack(blocks, scales)
    np.testing.assert_array_equal(ours.astype(np.float32), theirs.float().numpy())


def test_a_part_is_read_from_the_blocks_that_it_touches():
    blocks, scales = packed(np.random.default_rng(2), 96, 6)
    stored, touched = {"w_blocks": blocks, "w_scales": scales}, []

    def read(name, bounds):
        touched.append(bounds[2])
        return stored[name][tuple(slice(*bound) for bound in bounds)]

    part = mxfp4.unpack_part(read, "w", ((1, 3), (40, 64), (2, 5)))
    np.testing.assert_array_equal(part, mxfp4.unpack(blocks, scales)[1:3, 40:64, 2:5])
    assert touched == [(1, 2), (1, 2)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model whose blocks and scales lie in different files, as real ones may."""
    transformers, torch = (pytest.importorskip(name) for name in ("transformers", "torch"))
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("gpt_oss", **SIZES)
    path = tmp_path_factory.mktemp("packed")
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        path
    )
    tensors, rng = load_file(path / SINGLE), np.random.default_rng(0)
    parts = [{}, {}]
    for name, array in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales = packed(rng, *array.shape[1:])
            parts[0][name + mxfp4.BLOCKS], parts[1][name + mxfp4.SCALES] = blocks, scales
        else:
            parts[0][name] = array
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for file, part in zip(files, parts, strict=True):
        save_file(part, path / file, metadata={"format": "pt"})
    (path / SINGLE).unlink()
    weights = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(fields | {"quantization_config": QUANTIZED}))
    return path


def test_a_model_is_read_as_transformers_reads_it_and_written_in_bfloat16(directory, tmp_path):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    model, params = load_pretrained(directory, param_dtype=jnp.bfloat16)
    path = save_pretrained(tmp_path / "plain", model, params)
    fields, saved = json.loads((path / "config.json").read_text()), load_file(path / SINGLE)
    assert "quantization_config" not in fields and fields["dtype"] == "bfloat16"
    assert {array.dtype.name for array in saved.values()} == {"bfloat16"}
    expected = {name: tensor.float().numpy() for name, tensor in theirs.state_dict().items()}
    assert saved.keys() == expected.keys()
    for name, array in saved.items():
        np.testing.assert_array_equal(array.astype(np.float32), expected[name], name)
    wide, params = load_pretrained(directory)
    ours = wide.apply({"params": params}, IDS[:1])
    np.testing.assert_allclose(ours, logits_of(theirs.float(), IDS[:1]), atol=2e-5)


def test_weights_are_quantised_again_as_their_numbers_are(directory):
    _, params = load_pretrained(directory)
    _, small = load_pretrained(directory, quantize=BaseQuantizer("nf4"))
    assert bits(small) == bits(quantize_linear(params, "nf4"))


def test_what_does_not_fit_is_refused_by_name(directory, tmp_path):
    with pytest.raises(ModelLoadError, match="holds experts in MXFP4, which are neither merged"):
        find_source(str(directory))
    file = directory / "model-00002-of-00002.safetensors"
    before, scales = file.read_bytes(), load_file(file)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    save_file(scales | {name: scales[name][:, :-1]}, file, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=rf"{name} has shape \(3, 63, 1\), expected \(3, 64,"):
        load_pretrained(directory)
    save_file(scales | {name: scales[name].astype(np.float32)}, file, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=rf"{name} has dtype F32, expected one of \['U8'\]"):
        load_pretrained(directory)
    whole = scales[name].copy()
    whole[0, 0] = 255  # the specification's NaN
    save_file(scales | {name: whole}, file, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="holds numbers that are NaN or infinite"):
        load_pretrained(directory)
    file.write_bytes(before)


def test_other_quantizations_are_refused():
    from relax.models.families import FAMILIES

    fields = FAMILIES["gpt_oss"].to_hugging_face(tiny_family("gpt_oss")[0].config)
    for settings in ({"quant_method": "awq"}, QUANTIZED | {"bits": 4}, {}):
        with pytest.raises(ModelLoadError, match="quantization_config must be settings of mxfp4"):
            FAMILIES["gpt_oss"].from_hugging_face(fields | {"quantization_config": settings})
