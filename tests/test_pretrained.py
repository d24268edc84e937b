"""Hugging Face directories are read strictly and written whole; each refusal is one sentence."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from relax import files
from relax.data import arithmetic_tokenizer
from relax.errors import ModelLoadError, RelaxError
from relax.models import (
    RopeScaling,
    Transformer,
    TransformerConfig,
    load_pretrained,
    read_generation_config,
    read_pretrained_config,
    save_pretrained,
)
from relax.models.huggingface import pretrained
from relax.models.huggingface import shards as shard_files

pytestmark = pytest.mark.timeout(60)  # a pipe that is opened would hang

CONFIG = TransformerConfig(
    vocab_size=11,
    hidden_size=12,
    intermediate_size=10,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=6,
    max_position_embeddings=32,
    rope_theta=321.0,
    rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 16),
    attention_bias=True,
    output_bias=True,
)
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def tiny():
    model = Transformer(CONFIG)
    ids = jnp.zeros((1, 2), jnp.int32)
    return model, jax.jit(model.init)(jax.random.key(0), ids)["params"]


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    return save_pretrained(tmp_path_factory.mktemp("saved") / "model", *tiny)


@pytest.fixture
def directory(saved, tmp_path):
    """A copy of the tiny model to damage."""
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def sharded(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_files, "SHARD_BYTES", 2000)
    return save_pretrained(tmp_path / "sharded", *tiny)


def edit(file, change):
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def edit_tensors(directory, change, file="model.safetensors"):
    tensors = load_file(directory / file)
    change(tensors)
    save_file(tensors, directory / file)


def assert_refused(path, *parts):
    """Loading fails with one sentence that holds these parts."""
    with pytest.raises(ModelLoadError) as caught:
        load_pretrained(path)
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    assert "\n" not in message and len(message) < 600, message


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# --- round trips ---------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(tiny, saved):
    model, params = load_pretrained(saved)
    assert model.config == CONFIG == read_pretrained_config(saved)
    assert_same(params, tiny[1])
    assert sorted(f.name for f in saved.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_shards_hold_what_the_single_file_holds(tiny, sharded):
    index = json.loads((sharded / shard_files.INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert sorted(f.name for f in sharded.glob("*.safetensors")) == shards
    sizes = [sum(x.nbytes for x in load_file(sharded / shard).values()) for shard in shards]
    assert max(sizes) <= 2000 and index["metadata"]["total_size"] == sum(sizes)
    assert_same(load_pretrained(sharded)[1], tiny[1])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [2000, 10**9])
def test_transformers_model_comes_back_with_the_same_logits_bit_for_bit(
    tmp_path, monkeypatch, tied, shard_bytes
):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = pretrained.family_of("llama").to_hugging_face(CONFIG)
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**fields | {"tie_word_embeddings": tied})).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    monkeypatch.setattr(shard_files, "SHARD_BYTES", shard_bytes)
    path = save_pretrained(tmp_path / "ours", *load_pretrained(tmp_path / "theirs"))
    back, report = LlamaForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    assert back.config.rope_parameters == theirs.config.rope_parameters
    ids = torch.arange(11)[None]
    with torch.no_grad():
        assert torch.equal(back(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files_are_read_and_written(tiny, tmp_path, dtype):
    model, params = tiny
    path = save_pretrained(tmp_path / "model", model, params, dtype=dtype)
    assert json.loads((path / "config.json").read_text())["dtype"] == dtype
    assert {x.dtype.name for x in load_file(path / "model.safetensors").values()} == {dtype}
    rounded = jax.tree.map(lambda x: x.astype(dtype), params)
    assert_same(load_pretrained(path, param_dtype=dtype)[1], rounded)
    model, params = load_pretrained(path, jnp.bfloat16)
    assert_same(params, jax.tree.map(lambda x: x.astype(jnp.float32), rounded))
    assert (model.dtype, model.param_dtype) == (jnp.bfloat16, jnp.float32)


def test_leaves_of_several_dtypes_are_saved_in_one_that_holds_them_exactly(tiny, tmp_path):
    model, params = tiny
    params = params | {"embed_tokens": params["embed_tokens"].astype(jnp.bfloat16)}
    path = save_pretrained(tmp_path / "model", model, params)
    assert json.loads((path / "config.json").read_text())["dtype"] == "float32"
    assert_same(load_pretrained(path)[1], jax.tree.map(lambda x: x.astype(jnp.float32), params))


def test_the_model_that_is_loaded_checkpoints_gradients_when_told(saved):
    assert load_pretrained(saved, gradient_checkpointing=True)[0].gradient_checkpointing
    assert not load_pretrained(saved)[0].gradient_checkpointing


# --- config.json ---------------------------------------------------------------------------------

LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_3 = LLAMA_2 | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "rope_scaling": LLAMA_3_ROPE,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
SMOLLM2 = LLAMA_2 | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": None,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "vocab_size": 49152,
}
# The fields of every configuration of transformers 4, with their defaults.
TRANSFORMERS_4 = {
    **dict.fromkeys(
        """
        architectures bad_words_ids begin_suppress_tokens bos_token_id cross_attention_hidden_size
        decoder_start_token_id eos_token_id exponential_decay_length_penalty finetuning_task
        forced_bos_token_id forced_eos_token_id pad_token_id prefix problem_type sep_token_id
        suppress_tokens task_specific_params tokenizer_class torch_dtype rope_scaling
        """.split()
    ),
    **dict.fromkeys(
        """
        add_cross_attention do_sample early_stopping is_decoder is_encoder_decoder
        output_attentions output_hidden_states output_scores remove_invalid_values
        return_dict_in_generate tf_legacy_loss tie_encoder_decoder torchscript use_bfloat16
        """.split(),
        False,
    ),
    **dict.fromkeys("temperature top_p typical_p length_penalty repetition_penalty".split(), 1.0),
    **dict.fromkeys("num_beams num_beam_groups num_return_sequences".split(), 1),
    **dict.fromkeys("min_length no_repeat_ngram_size encoder_no_repeat_ngram_size".split(), 0),
    "_name_or_path": "",
    "chunk_size_feed_forward": 0,
    "diversity_penalty": 0.0,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "max_length": 20,
    "pruned_heads": {},
    "return_dict": True,
    "top_k": 50,
    "use_cache": True,
}
REAL = {
    "Llama 2 7B": (LLAMA_2, {"head_dim": 128, "rope_theta": 1e4, "rms_norm_eps": 1e-5}),
    "Llama 2 7B, first upload": (
        {k: v for k, v in LLAMA_2.items() if k not in ("num_key_value_heads", "rope_scaling")}
        | {
            "_name_or_path": "meta",
            "max_length": 4096,
            "pad_token_id": 0,
            "max_sequence_length": 2,
        },
        {"num_key_value_heads": 32, "rope_scaling": None},
    ),
    "Llama 3.1 8B": (
        LLAMA_3,
        {
            "num_key_value_heads": 8,
            "rope_theta": 5e5,
            "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        },
    ),
    "Llama 3.2 1B": (
        LLAMA_3
        | {
            "head_dim": 64,
            "hidden_size": 2048,
            "rope_scaling": LLAMA_3_ROPE | {"factor": 32.0},
            "tie_word_embeddings": True,
        },
        {
            "head_dim": 64,
            "rope_scaling": RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
            "tie_word_embeddings": True,
        },
    ),
    "Llama 3.1 8B, saved by transformers 5": (
        {k: v for k, v in LLAMA_3.items() if k not in ("rope_scaling", "rope_theta", "torch_dtype")}
        | {"rope_parameters": LLAMA_3_ROPE | {"rope_theta": 500000.0}, "dtype": "bfloat16"},
        {"rope_theta": 5e5, "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)},
    ),
    "SmolLM2": (SMOLLM2, {"head_dim": 64, "rope_theta": 1e5, "tie_word_embeddings": True}),
    "TinyLlama": (
        LLAMA_2 | {"hidden_size": 2048, "num_key_value_heads": 4, "max_position_embeddings": 2048},
        {"num_key_value_heads": 4, "head_dim": 64},
    ),
    "Vicuna 1.5 16k": (
        LLAMA_2 | {"pad_token_id": 0, "rope_scaling": {"factor": 4.0, "type": "linear"}},
        {"rope_scaling": RopeScaling("linear", 4.0)},
    ),
    "DeepSeek Coder": (
        LLAMA_2 | {"rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000},
        {"rope_scaling": RopeScaling("linear", 4.0), "rope_theta": 1e5},
    ),
    "every field of transformers 4": (TRANSFORMERS_4 | LLAMA_2, {"vocab_size": 32000}),
}


def read(directory, fields):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields))
    return read_pretrained_config(directory)


@pytest.mark.parametrize("name", REAL)
def test_configurations_of_real_models_are_read(tmp_path, name):
    fields, expected = REAL[name]
    config = read(tmp_path, fields)
    assert {name: getattr(config, name) for name in expected} == expected


def test_every_field_that_transformers_writes_is_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(num_key_value_heads=8)
    ours = read(tmp_path, config.to_dict())
    assert ours.num_key_value_heads == 8
    written = pretrained.family_of("llama").to_hugging_face(ours)
    for name in ("architectures", "rope_theta"):  # transformers 4's place of the base
        written.pop(name)
    assert {name: config.to_dict()[name] for name in written} == written


def test_absent_fields_have_the_defaults_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    required = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}
    required |= {"num_attention_heads", "model_type"}
    fields = {name: LLAMA_2[name] for name in required}
    theirs = transformers.LlamaConfig(**fields)
    ours = read(tmp_path, fields)
    for name in (
        "num_key_value_heads head_dim max_position_embeddings rms_norm_eps tie_word_embeddings "
        "attention_bias mlp_bias initializer_range"
    ).split():
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope_scaling is None
    nulls = dict.fromkeys({*LLAMA_3, "head_dim", "rope_parameters"} - required)
    assert read(tmp_path, fields | nulls) == ours


def test_llama3_scaling_without_its_original_length_takes_the_longest(tmp_path):
    rope = {k: v for k, v in LLAMA_3_ROPE.items() if k != "original_max_position_embeddings"}
    config = read(tmp_path, LLAMA_3 | {"rope_scaling": rope})  # as transformers does
    assert config.rope_scaling.original_max_position_embeddings == 131072


BAD_FIELDS = [
    ({"model_type": "gpt2"}, "unknown architecture: model_type is 'gpt2'. Known: apertus, "),
    ({"model_type": None}, "model_type is None"),
    ({"model_type": ["llama"]}, "model_type is ['llama']"),
    ({"qk_norm": True, "clip_qkv": 8}, "does not support: clip_qkv, qk_norm"),
    ({"model_type": "gemma3"}, "'gemma3', so text_config must be an object, got None"),
    ({"model_type": "mistral3"}, "'mistral3', so text_config must be an object, got None"),
    (
        {"hidden_act": "relu"},
        "hidden_act must be silu, gelu, gelu_pytorch_tanh or relu2, got 'relu'",
    ),
    ({"attention_dropout": 1}, "attention_dropout must be a number from 0 to below 1, got 1"),
    ({"sliding_window": 512}, "sliding_window is 512, which is not implemented; only its absence"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
    ({"auto_map": {"AutoModel": "m.M"}}, "auto_map is {'AutoModel': 'm.M'}"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder is True"),
    ({"add_cross_attention": True}, "add_cross_attention is True"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_interleaved": True}, "rope_interleaved is True"),
    ({"pruned_heads": {"0": [1]}}, "pruned_heads is {'0': [1]}"),
    ({"vocab_size": None}, "missing fields: vocab_size"),
    ({"hidden_size": None, "num_hidden_layers": None}, "fields: hidden_size, num_hidden_layers"),
    ({"vocab_size": "11"}, "vocab_size must be an integer from 1 to 16777215, got '11'"),
    ({"vocab_size": 0}, "vocab_size must be an integer from 1 to 16777215, got 0"),
    ({"hidden_size": -12}, "hidden_size must be an integer from 1"),
    ({"intermediate_size": 10.0}, "intermediate_size must be an integer"),
    ({"intermediate_size": True}, "intermediate_size must be an integer"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer from 1 to 4095"),
    ({"max_position_embeddings": 10**30}, "max_position_embeddings must be an integer"),
    ({"num_attention_heads": 0}, "num_attention_heads must be an integer"),
    (
        {"num_attention_heads": 5, "head_dim": None},
        "must divide hidden_size where there is no head",
    ),
    ({"num_key_value_heads": 2}, "num_key_value_heads must divide num_attention_heads"),
    ({"num_key_value_heads": 0}, "num_key_value_heads must be an integer from 1"),
    ({"head_dim": 7}, "even head_dim, got 7"),
    ({"head_dim": [6]}, "head_dim must be an integer"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a finite number above 0, got '1e-5'"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number above 0, got nan"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, got 'false'"),
    ({"attention_bias": 1}, "attention_bias must be true or false, got 1"),
    ({"rope_parameters": [1]}, "rope_parameters must be an object, got [1]"),
    ({"rope_parameters": {"rope_type": "axial"}}, "rope_type is 'axial', which is not implemented"),
    ({"rope_parameters": {"rope_type": "x" * 999}}, "rope_type is 'xxx"),
    ({"rope_parameters": {"rope_type": []}}, "rope_type is [], which is not implemented"),
    ({"rope_parameters": None, "rope_scaling": {"type": "dyn"}}, "rope_type is 'dyn'"),
    ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta must be a finite number above 0"),
    ({"rope_parameters": {"rope_theta": 10**400}}, "rope_theta must be a finite number above 0"),
    ({"rope_parameters": {"factor": 2.0}}, "not support for rope_type 'default': factor"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    (
        {"rope_parameters": {"rope_type": "linear"}},
        "factor must be a finite number above 0, got no",
    ),
    ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor must be a finite number"),
    (
        {"rope_parameters": {"rope_type": "linear", "factor": 2, "attention_factor": 2}},
        "not support for rope_type 'linear': attention_factor",
    ),
    (
        {"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1}},
        "high_freq_factor must be a finite number above 0, got none",
    ),
    (
        {"rope_parameters": LLAMA_3_ROPE | {"high_freq_factor": 1.0}},
        "low_freq_factor must be below high_freq_factor, got 1.0 and 1.0",
    ),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS, ids=[m[:50] for _, m in BAD_FIELDS])
def test_a_field_that_we_do_not_compute_is_refused(directory, fields, message):
    def change(config):
        for name in ("rope_theta", "rope_scaling"):  # which say the same as rope_parameters
            config.pop(name)
        config.update(fields)

    edit(directory / "config.json", change)
    assert_refused(directory, "config.json: ", message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not readable as JSON: Expecting value"),
        (b'{"model_type": ', "not readable as JSON"),
        (b"[1]", "must hold an object, got list"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not readable as JSON"),
    ],
    ids=["empty", "broken", "list", "bytes", "deep", "digits"],
)
def test_a_config_that_is_no_json_object_is_refused(directory, text, message):
    (directory / "config.json").write_bytes(text)
    assert_refused(directory, "config.json: ", message)


def test_a_config_of_absurd_size_is_not_read(directory, monkeypatch):
    monkeypatch.setattr(files, "JSON_BYTES", 100)
    assert_refused(directory, "config.json", "bytes are too many; at most 100")


def test_json_that_is_nested_beyond_the_limit_is_refused(directory):
    deep = {}
    for _ in range(files.JSON_DEPTH - 2):
        deep = [deep]
    edit(directory / "config.json", lambda config: config.update(task_specific_params={"a": deep}))
    assert_refused(directory, "config.json: objects and lists are nested more than 64 deep")
    edit(directory / "config.json", lambda c: c.update(task_specific_params=deep[0]))
    load_pretrained(directory)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "vocab.txt", "spiece.model", "chat_template.jinja", "unread.json"]
)
def test_every_file_that_may_be_read_is_regular_inside_and_of_bounded_size(
    directory, tmp_path, monkeypatch, name
):
    """Tokenizer and template too, though other libraries read them: they would follow the link."""
    (directory / name).write_text("longer than ten")
    load_pretrained(directory)
    with monkeypatch.context() as patch:
        patch.setitem(files.MODEL_FILES, Path(name).suffix, 10)
        patch.setitem(files.MODEL_FILES, ".json", 10)
        assert_refused(directory, "bytes are too many; at most 10.")
    (directory / name).rename(tmp_path / "outside")
    (directory / name).symlink_to("../outside")
    assert_refused(directory, f"{name} is a link that leads out of the directory")
    (directory / name).unlink()
    os.mkfifo(directory / name)
    assert_refused(directory, f"{name} is no regular file")


def test_a_folder_of_chat_templates_is_looked_at_as_well(directory, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "tools.jinja").write_text("{{ 1 }}")
    (directory / files.TEMPLATES).symlink_to(outside)
    assert_refused(directory, f"{files.TEMPLATES} is a link that leads out of the directory")
    (directory / files.TEMPLATES).unlink()
    (directory / files.TEMPLATES).mkdir()
    load_pretrained(directory)
    (directory / files.TEMPLATES / "tools.jinja").symlink_to(outside / "tools.jinja")
    assert_refused(directory, "tools.jinja is a link that leads out of the directory")


# --- tensors -------------------------------------------------------------------------------------

BAD_TENSORS = [
    (lambda t: t.pop(NORM), ["1 missing: model.norm.weight."]),
    (lambda t: [t.pop(n) for n in list(t)[:7]], ["7 missing: ", " and 3 more"]),
    (lambda t: t.update(odd=t[NORM]), ["1 not in the architecture: odd."]),
    (
        lambda t: t.update({UP: np.ascontiguousarray(t[UP].T)}),
        [f"{UP} has shape (12, 10), expected (10, 12)"],
    ),
    (lambda t: t.update({NORM: t[NORM][:, None]}), ["has shape (12, 1), expected (12,)"]),
    (lambda t: t.update({NORM: np.ones(12, np.int32)}), [f"{NORM} has dtype I32, expected one of"]),
    (lambda t: t.update({NORM: np.ones(12, bool)}), [f"{NORM} has dtype BOOL, expected one of"]),
    (lambda t: t.update({NORM: np.ones(12, "complex64")}), [f"{NORM} has dtype C64, expected"]),
    (
        lambda t: t.pop("lm_head.weight"),
        ["1 missing: lm_head.weight.", "Is tie_word_embeddings in config.json right?"],
    ),
    (lambda t: t.update({"odd\nname": t[NORM]}), [r"not in the architecture: 'odd\nname'."]),
    (lambda t: t.update({"x" * 9999: t[NORM]}), ["not in the architecture: xxx", "xxx...."]),
    (
        lambda t: [t.pop(NORM), t.update(odd=t[EMBEDDING], even=t[EMBEDDING])],
        ["1 missing: model.norm.weight; 2 not in the architecture: even, odd."],
    ),
]


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_finite_numbers_are_refused_by_name(tiny, directory, kind, value):
    def change(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.astype(kind)
        tensors[UP].reshape(-1)[-1] = value

    edit_tensors(directory, change)
    assert_refused(directory, f"model.safetensors: {UP} holds numbers that are NaN or infinite")


def test_weights_that_float32_does_not_have_are_refused_and_the_largest_are_read(directory):
    largest = float(np.finfo(np.float32).max)
    edit_tensors(directory, lambda t: t.update({NORM: np.full(12, largest, np.float64)}))
    load_pretrained(directory)
    edit_tensors(directory, lambda t: t.update({NORM: np.full(12, -largest * 2, np.float64)}))
    assert_refused(directory, f"{NORM} holds numbers that are NaN or infinite, or too large for")


@pytest.mark.parametrize(("change", "parts"), BAD_TENSORS, ids=range(len(BAD_TENSORS)))
def test_tensors_that_are_not_the_models_are_refused(directory, change, parts):
    edit_tensors(directory, change)
    assert_refused(directory, f"tensors of '{directory}': ", *parts)


def test_an_output_matrix_beside_tied_embeddings_is_refused_with_a_hint(directory):
    edit(directory / "config.json", lambda config: config.update(tie_word_embeddings=True))
    assert_refused(directory, "1 not in the architecture: lm_head.weight. Is tie_word_embeddings")


def test_an_output_matrix_that_repeats_tied_embeddings_is_not_read(tiny, tmp_path):
    """Qwen 3's files hold it twice."""
    tied = Transformer(dataclasses.replace(CONFIG, tie_word_embeddings=True))
    params = {name: leaf for name, leaf in tiny[1].items() if name != "lm_head"}
    path = save_pretrained(tmp_path / "model", tied, params)
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t[EMBEDDING]}))
    assert_same(load_pretrained(path)[1], params)
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t[EMBEDDING] * np.float32(1.001)}))
    assert_refused(path, "1 not in the architecture: lm_head.weight. Is tie_word_embeddings")


def test_a_wrong_depth_is_refused(directory):
    edit(directory / "config.json", lambda config: config.update(num_hidden_layers=4000))
    assert_refused(directory, "51974 missing: model.layers.10.", " and 51970 more")
    edit(directory / "config.json", lambda config: config.update(num_hidden_layers=1))
    assert_refused(directory, "13 not in the architecture: model.layers.1.")


def test_sizes_that_no_machine_holds_are_refused_for_their_shapes(directory):
    huge = dict.fromkeys(["vocab_size", "hidden_size", "intermediate_size"], 2**24 - 1)
    huge |= {"num_attention_heads": 2**23, "num_key_value_heads": 1, "head_dim": 2**23}
    edit(directory / "config.json", lambda config: config.update(huge))
    assert_refused(directory, "has shape")


@pytest.mark.parametrize("layout", ["directory", "sharded"])
def test_rotary_frequencies_that_old_files_hold_are_not_read(tiny, layout, request):
    path = request.getfixturevalue(layout)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    file = sorted(path.glob("*.safetensors"))[0].name
    edit_tensors(path, lambda tensors: tensors.update({name: np.ones(3, np.float32)}), file)
    if layout == "sharded":
        edit(path / shard_files.INDEX, lambda index: index["weight_map"].update({name: file}))
    assert_same(load_pretrained(path)[1], tiny[1])


# --- files ---------------------------------------------------------------------------------------


def test_a_directory_without_its_files_is_refused(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert_refused(directory, "has neither model.safetensors nor model.safetensors.index.json")
    (directory / "config.json").unlink()
    assert_refused(directory, "has no config.json")


@pytest.mark.parametrize("keep", [0, 4, 8, 300, -1])
def test_a_cut_file_is_refused(directory, keep):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert_refused(directory, f"{file}: not a readable safetensors file")


def test_a_header_longer_than_its_file_is_refused(directory):
    (directory / "model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    assert_refused(directory, "not a readable safetensors file")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", shard_files.INDEX])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_regular_file_is_refused_and_not_opened(directory, file, kind):
    path = directory / file
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    assert_refused(directory, f"{file} is ", "regular file" if kind != "device" else "/dev/zero")


def test_a_transposed_view_is_written_as_it_reads(tmp_path):
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    shard_files.write_shard(tmp_path / "a.safetensors", {"view": kernel.T, "scalar": kernel[0, 1]})
    read = load_file(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(read["view"], [[0, 3], [1, 4], [2, 5]])
    assert read["scalar"] == 1 and read["scalar"].shape == ()


def test_both_one_file_and_an_index_of_others_are_refused(sharded, saved):
    shutil.copy(saved / "model.safetensors", sharded)
    assert_refused(sharded, "has both model.safetensors and an index of other files")


def test_an_index_of_the_single_file_is_read(tiny, directory):
    names = load_file(directory / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (directory / shard_files.INDEX).write_text(json.dumps(index))
    assert_same(load_pretrained(directory)[1], tiny[1])


def test_a_missing_shard_is_refused(sharded):
    (sharded / sorted(sharded.glob("*.safetensors"))[1]).unlink()
    assert_refused(sharded, "has no model-00002-of-")


def test_an_index_that_disagrees_with_the_shards_is_refused(sharded):
    index = sharded / shard_files.INDEX
    edit(index, lambda value: value["weight_map"].pop(NORM))
    assert_refused(sharded, "index.json disagrees with the files about model.norm.weight.")
    other = json.loads(index.read_text())["weight_map"][EMBEDDING]
    edit(index, lambda value: value["weight_map"].update({NORM: other}))
    assert_refused(sharded, "index.json disagrees with the files about model.norm.weight.")
    edit(index, lambda value: value["weight_map"].update({"gone": other}))
    assert_refused(sharded, "disagrees with the files about gone, model.norm.weight.")


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": None}, {"weight_map": ["a"]}, {"weight_map": {"a": ["b"]}}]
)
def test_an_index_without_a_map_of_names_is_refused(sharded, index):
    (sharded / shard_files.INDEX).write_text(json.dumps(index))
    assert_refused(sharded, "index.json: no weight_map of tensor names to files")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../model/model.safetensors", "is not the plain name of a file in it"),
        ("{root}/model.safetensors", "is not the plain name of a file in it"),
        ("sub/model.safetensors", "is not the plain name of a file in it"),
        ("..", "leads out of the directory"),
        (".", "is no regular file"),
        ("", "is no regular file"),
        ("a\0b", "no file can be named"),
        ("x" * 5000, "no file can be named"),
    ],
    ids=["up", "absolute", "below", "dots", "dot", "nothing", "zero", "long"],
)
def test_an_index_reaches_only_plain_files_of_its_directory(directory, sharded, name, message):
    (sharded / "sub").mkdir()
    shutil.copy(directory / "model.safetensors", sharded / "sub")
    name = name.format(root=directory)
    edit(sharded / shard_files.INDEX, lambda index: index["weight_map"].update({NORM: name}))
    assert_refused(sharded, message)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_link_out_of_the_directory_is_refused(directory, tmp_path, file):
    (directory / file).rename(tmp_path / "outside")
    (directory / file).symlink_to("../outside")
    assert_refused(directory, f"{file} is a link that leads out of the directory", "outside'")


@pytest.mark.parametrize("target", ["gone", "model.safetensors"])
def test_a_link_to_nothing_or_to_itself_is_refused(directory, target):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to(target)
    assert_refused(directory, "model.safetensors is no regular file")


def test_links_within_the_directory_and_to_it_are_followed(tiny, directory, tmp_path):
    (directory / "model.safetensors").rename(directory / "weights")
    (directory / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(directory)
    assert_same(load_pretrained(tmp_path / "link")[1], tiny[1])


@pytest.mark.parametrize("store", ["models--o--n/blobs", "blobs/ab"])
def test_links_of_the_hub_cache_into_its_blobs_are_followed(tiny, saved, tmp_path, store):
    snapshot = tmp_path / "models--o--n" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / store).mkdir(parents=True)
    for file in saved.iterdir():
        shutil.copy(file, tmp_path / store / f"hash-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../../{store}/hash-of-{file.name}")
    assert_same(load_pretrained(snapshot)[1], tiny[1])


@pytest.mark.parametrize(
    "name", ["nowhere", "./a/b", "/no/such/place", "~nobody-of-that-name/model", "a/b/c", ""]
)
def test_a_path_to_nothing_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(name, f"no model directory at '{name}'. Give a directory with config.json")


def test_a_file_is_no_model_directory(saved):
    assert_refused(saved / "config.json", "no model directory at ")


@pytest.mark.parametrize("name", ["no-such-owner/no-such-model", "-bad-/--name", "a\0b/c"])
def test_a_hub_name_without_a_network_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert_refused(name, f"'{name}' is no directory here and could not be fetched from the hub: ")


def test_damaged_bytes_load_or_are_refused_and_nothing_else(directory, sharded):
    """Random bytes in the config, in the header of the tensors and in the index."""
    rng = np.random.default_rng(0)
    spots = (
        (directory, "config.json", 10**9),
        (directory, "model.safetensors", 3000),
        (sharded, shard_files.INDEX, 10**9),
    )
    for path, name, most in spots:
        intact = (path / name).read_bytes()
        for _ in range(40):
            damaged = bytearray(intact)
            for at in rng.integers(0, min(len(intact), most), rng.integers(1, 4)):
                damaged[at] = rng.choice(list(b'0192",:{}[]\\ae\x00\xff'))
            (path / name).write_bytes(damaged)
            try:
                load_pretrained(path)
            except ModelLoadError as error:
                assert str(error)
        (path / name).write_bytes(intact)


# --- saving --------------------------------------------------------------------------------------


def listing(directory):
    return {f.name: f.read_bytes() for f in directory.iterdir() if f.is_file()}


def test_a_tokenizer_is_saved_with_its_chat_template_and_ids(tiny, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = arithmetic_tokenizer()
    path = save_pretrained(tmp_path / "model", *tiny, tokenizer)
    assert (path / "chat_template.jinja").read_text() == tokenizer.chat_template
    loaded = transformers.AutoTokenizer.from_pretrained(path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    for file in ("config.json", "generation_config.json"):
        fields = json.loads((path / file).read_text())
        assert (fields["eos_token_id"], fields["pad_token_id"]) == (1, 0)
    assert transformers.GenerationConfig.from_pretrained(path).eos_token_id == 1
    assert transformers.AutoConfig.from_pretrained(path).pad_token_id == 0
    load_pretrained(path)


def test_a_padding_token_that_is_the_end_token_is_not_saved(tiny, tmp_path):
    tokenizer = arithmetic_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    path = save_pretrained(tmp_path / "model", *tiny, tokenizer)
    assert json.loads((path / "config.json").read_text())["pad_token_id"] is None
    generation = json.loads((path / "generation_config.json").read_text())
    assert "pad_token_id" not in generation and generation["eos_token_id"] == 1


def test_without_a_tokenizer_no_token_ids_are_made_up(saved):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(saved)
    assert config.bos_token_id is config.eos_token_id is config.pad_token_id is None


END = {"eos_token_id": [7, 9], "temperature": 0.6, "do_sample": True}


@pytest.mark.parametrize(
    ("before", "ends", "padding"),
    [
        ({}, 1, 0),
        ({"eos_token_id": 1}, 1, 0),
        (END, [7, 9, 1], 0),
        ({"eos_token_id": [1, 9]}, [1, 9], 0),
        ({"eos_token_id": [0, 9]}, [0, 9, 1], None),  # the padding token ends answers, too
        ({"eos_token_id": 7, "pad_token_id": 5, "bos_token_id": 4}, [7, 1], 0),
    ],
)
def test_no_way_of_ending_an_answer_is_lost(tiny, tmp_path, before, ends, padding):
    path = save_pretrained(
        tmp_path / "model", *tiny, arithmetic_tokenizer(), generation_config=before
    )
    written = read_generation_config(path)
    assert (written["eos_token_id"], written.get("pad_token_id")) == (ends, padding)
    assert written.get("temperature") == before.get("temperature")
    assert written.get("bos_token_id") == before.get("bos_token_id")
    config = json.loads((path / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (ends, padding)


def test_without_a_tokenizer_the_ids_are_those_of_before(tiny, tmp_path):
    before = END | {"pad_token_id": 3}
    path = save_pretrained(tmp_path / "model", *tiny, generation_config=before)
    assert read_generation_config(path) == before


def test_without_generation_config_the_ids_are_those_of_config_json(tiny, directory, tmp_path):
    """And they are kept on export. transformers 5.24 takes them from there, too."""
    assert read_generation_config(directory) == {}
    (directory / "generation_config.json").unlink()
    assert read_generation_config(directory) == {}
    edit(directory / "config.json", lambda config: config.update(eos_token_id=[2, 7]))
    assert read_generation_config(directory) == {"eos_token_id": [2, 7]}
    again = save_pretrained(
        tmp_path / "again", *tiny, generation_config=read_generation_config(directory)
    )
    for name in ("config.json", "generation_config.json"):
        assert json.loads((again / name).read_text())["eos_token_id"] == [2, 7]


def test_generation_config_is_believed_before_config_json(directory):
    edit(directory / "config.json", lambda config: config.update(eos_token_id=[2, 7]))
    edit(directory / "generation_config.json", lambda fields: fields.update(eos_token_id=3))
    assert read_generation_config(directory)["eos_token_id"] == 3


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("ends", [-1, [2, -1], 10**9, [[2]], "2", 2.0, True, [None]])
def test_an_end_token_that_is_no_id_of_the_model_is_refused(directory, name, ends):
    if name == "config.json":
        (directory / "generation_config.json").unlink()
    edit(directory / name, lambda fields: fields.update(eos_token_id=ends))
    with pytest.raises(ModelLoadError, match=f"{name}: eos_token_id must be a token id below"):
        read_generation_config(directory)


@pytest.mark.parametrize("ends", [None, [], 0, [0, 1]])
def test_one_end_token_several_or_none_are_read(directory, ends):
    edit(directory / "generation_config.json", lambda fields: fields.update(eos_token_id=ends))
    assert read_generation_config(directory)["eos_token_id"] == ends


def test_a_generation_config_that_is_no_object_is_refused(directory):
    (directory / "generation_config.json").write_text("[1]")
    with pytest.raises(ModelLoadError, match="generation_config.json: must hold an object"):
        read_generation_config(directory)


def test_files_are_readable_as_the_umask_says(tiny, tmp_path):
    before = os.umask(0o027)
    try:
        path = save_pretrained(tmp_path / "model", *tiny)
    finally:
        os.umask(before)
    assert {f.stat().st_mode & 0o777 for f in path.iterdir()} == {0o640}


def test_saving_replaces_a_model_that_is_there(tiny, sharded, saved, monkeypatch):
    monkeypatch.setattr(shard_files, "SHARD_BYTES", 10**9)
    save_pretrained(sharded, *tiny)
    assert listing(sharded) == listing(saved)  # no shard is left over
    assert [f.name for f in sharded.parent.iterdir() if f.name.startswith(".")] == []


def test_saving_makes_the_directories_above(tiny, tmp_path):
    assert (save_pretrained(tmp_path / "a" / "b", *tiny) / "config.json").exists()


@pytest.mark.parametrize(
    ("module", "failing"), [(pretrained, "from_params"), (pretrained, "write_json")]
)
def test_a_save_that_fails_leaves_the_old_model(tiny, directory, monkeypatch, module, failing):
    before = listing(directory)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, failing, fail)
    with pytest.raises(OSError, match="No space"):
        save_pretrained(directory, *tiny)
    assert listing(directory) == before
    assert [f.name for f in directory.parent.iterdir()] == [directory.name]


def test_a_rename_that_fails_puts_the_old_model_back(tiny, directory, monkeypatch):
    before, rename = listing(directory), os.rename

    def fail(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        save_pretrained(directory, *tiny)
    assert listing(directory) == before
    assert [f.name for f in directory.parent.iterdir()] == [directory.name]


def test_leftovers_of_a_killed_save_are_cleared(tiny, directory, saved):
    for name in (".model.tmp", ".model.old"):
        shutil.copytree(saved, directory.parent / name)
    save_pretrained(directory, *tiny)
    assert [f.name for f in directory.parent.iterdir()] == [directory.name]


@pytest.mark.parametrize("other", ["notes.md", "checkpoints/"])
def test_saving_deletes_nothing_but_a_model(tiny, directory, other):
    if other.endswith("/"):
        (directory / other).mkdir()
    else:
        (directory / other).write_text("mine")
    before = listing(directory)
    with pytest.raises(
        RelaxError, match=f"more than a model, .*delete: {other.strip('/')}. Choose"
    ):
        save_pretrained(directory, *tiny)
    assert listing(directory) == before and (directory / other).exists()


def test_saving_over_a_file_is_refused(tiny, tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(RelaxError, match="is a file; a model is saved as a directory"):
        save_pretrained(tmp_path / "model", *tiny)
    assert (tmp_path / "model").read_text() == "mine"


def test_parameters_of_another_model_are_refused(tiny, tmp_path):
    model, params = tiny
    wrong = {k: v for k, v in params.items() if k != "lm_head"} | {"value_head": jnp.ones(3)}
    wrong["embed_tokens"] = jnp.ones((12, 12))
    message = "no lm_head, unknown value_head|embed_tokens of shape .12, 12., no lm_head, unknown"
    with pytest.raises(ValueError, match=message):
        save_pretrained(tmp_path / "model", model, wrong)
    assert list(tmp_path.iterdir()) == []
