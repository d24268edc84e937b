"""Every family loads, computes what transformers computes, and saves; see `families.ROWS`."""

import copy
import dataclasses
import json
import types
from contextlib import nullcontext
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import (
    DELTA,
    EXPERTS,
    FAMILY_NAMES,
    FULL,
    HEAD,
    IDS,
    NEWER,
    NO_DROPOUT,
    POSITIONS,
    RECURRENT,
    ROWS,
    SEGMENTS,
    SLIDING,
    TAIL,
    config_of,
    difference,
    fields_of,
    logits_of,
    made_by_transformers,
    our_logits,
    reference_logits,
    tiny_family,
)

import relax.models.huggingface.shards as shard_files
from relax.errors import ModelLoadError
from relax.models import RopeScaling, load_pretrained, read_pretrained_config, save_pretrained
from relax.models.families import FAMILIES, family_of
from relax.models.families.rope import BESIDE_ALPHA
from relax.models.huggingface.tensors import expected_tensors, from_params
from relax.sampling import SamplingConfig, generate

WITH_EXPERTS = [name for name in ROWS if config_of(name).num_experts]


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# --- the same as transformers --------------------------------------------------------------------


@pytest.fixture(scope="module", params=ROWS)
def pair(request, tmp_path_factory):
    """A model of transformers, its directory, what we loaded from it, and the logits of both."""
    pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("theirs")
    theirs = made_by_transformers(request.param)
    theirs.save_pretrained(path)
    model, params = load_pretrained(path)
    return types.SimpleNamespace(
        name=request.param,
        theirs=theirs,
        path=path,
        model=model,
        params=params,
        ours=our_logits(model, params),
        reference=reference_logits(theirs),
    )


@pytest.mark.parametrize(
    "row", [0, 1, 2, 3], ids=["alone", "left padding", "right padding", "two documents"]
)
def test_logits_equal_those_of_transformers(pair, row):
    assert np.abs(pair.reference[row]).max() > 1.4, "too flat to tell anything"
    assert difference(pair.ours, pair.reference, [row]) < 2e-5


def test_transformers_loads_what_we_save_with_the_same_logits(pair, tmp_path):
    from transformers import AutoModelForCausalLM

    path = save_pretrained(tmp_path / "ours", pair.model, pair.params)
    back, report = AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(back) is type(pair.theirs)
    np.testing.assert_array_equal(logits_of(back, IDS), logits_of(pair.theirs, IDS))
    assert read_pretrained_config(path) == pair.model.config == config_of(pair.name)
    assert_same(load_pretrained(path)[1], pair.params)


@pytest.mark.parametrize("name", ROWS)
def test_rope_settings_are_written_for_transformers_4_and_5_alike(name):
    """4 reads `rope_theta` and `rope_scaling`, 5 `rope_parameters` too; each alone says it all."""
    config = config_of(name)
    family = family_of(config.model_type)
    fields = family.to_hugging_face(config)
    old = {"rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"}
    if family.rope.nested_only:
        assert not old & fields.keys()
        return
    assert {"rope_theta", "rope_parameters"} <= fields.keys()
    for left_out in (old, {"rope_parameters"}):
        alone = {name: value for name, value in fields.items() if name not in left_out}
        assert family.from_hugging_face(alone) == config


def test_the_old_form_of_rope_settings_is_that_of_real_files():
    """As in config.json of Llama 3.1 8B, Gemma 3 1B and Phi-3.5 mini, made by transformers 4."""
    fields = {
        name: family_of(config_of(name).model_type).to_hugging_face(config_of(name))
        for name in ("llama", "llama-llama3", "gemma3_text", "phi3-longrope")
    }
    assert "rope_scaling" not in fields["llama"]
    assert fields["llama-llama3"]["rope_theta"] == 5000.0
    assert fields["llama-llama3"]["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    gemma = fields["gemma3_text"]
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"]) == (3000.0, 50.0)
    assert gemma["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    # transformers 4.57 refuses a fourth field here, and another name of the kind.
    assert fields["phi3-longrope"]["rope_scaling"] == {
        "type": "longrope",
        "short_factor": [1.0, 1.1, 1.25, 1.5],
        "long_factor": [1.0, 2.0, 4.0, 7.0],
    }


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_load_balancing_loss_equals_that_of_transformers(name, tmp_path):
    """Over the tokens of all layers that are no padding, in padded rows."""
    torch = pytest.importorskip("torch")
    theirs = made_by_transformers(name)
    theirs.save_pretrained(tmp_path)
    model, params = load_pretrained(tmp_path)
    ids, positions, segments = IDS[:3], POSITIONS[:3], SEGMENTS[:3]
    _, ours = jax.jit(
        lambda params: model.apply(
            {"params": params}, ids, positions, segments, method="hidden_states_and_aux_loss"
        )
    )(params)
    with torch.no_grad():
        out = theirs(
            torch.tensor(ids),
            attention_mask=torch.tensor(segments),
            position_ids=torch.tensor(positions),
            output_router_logits=True,
        )
    np.testing.assert_allclose(ours, out.aux_loss, rtol=1e-5)
    assert abs(float(ours) - model.config.num_experts_per_tok) > 1e-3, "too even to tell anything"


@pytest.mark.parametrize("pair", ["phi3", *NEWER], indirect=True)
def test_greedy_text_equals_that_of_transformers(pair):
    """Two prompts, 40 new tokens each: beyond every window."""
    import torch

    prompts = [IDS[0, :9].tolist(), IDS[1, 5:].tolist()]
    config = SamplingConfig(max_new_tokens=40, temperature=0.0)
    ours = generate(pair.model, pair.params, prompts, jax.random.key(0), config)
    inputs = torch.tensor(prompts)
    theirs = pair.theirs.generate(
        inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=40
    )
    assert ours.completions == theirs[:, 9:].tolist()
    assert len({*ours.completions[0], *ours.completions[1]}) > 3, "too dull to tell anything"


@pytest.mark.parametrize("pair", RECURRENT, indirect=True)
def test_slots_begin_with_the_states_behind_uneven_prompts(pair):
    """Four prompts in two slots, one of a single token, and one shorter than the convolutions."""
    import torch

    prompts = [IDS[0, :9].tolist(), IDS[1, :1].tolist(), IDS[2, :3].tolist(), IDS[3].tolist()]
    config = SamplingConfig(max_new_tokens=12, temperature=0.0, slots=2)
    ours = generate(pair.model, pair.params, prompts, jax.random.key(0), config)
    for prompt, completion in zip(prompts, ours.completions, strict=True):
        theirs = pair.theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)
        assert completion == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "pair", ["gemma2", "phi3", "phi3-longrope", *NEWER, *WITH_EXPERTS[:2]], indirect=True
)
def test_gradients_equal_those_of_transformers(pair):
    """Of every parameter: log-likelihood of one document, and the load-balancing loss."""
    import torch

    theirs, model, params = pair.theirs, pair.model, pair.params
    theirs.zero_grad()
    experts = model.config.num_experts > 0

    out = theirs(torch.tensor(IDS[:1]), **({"output_router_logits": True} if experts else {}))
    logprobs = torch.log_softmax(out.logits, dim=-1)
    loss = -logprobs.gather(-1, torch.tensor(IDS[:1, :, None]).long()).sum()
    (loss + (out.aux_loss if experts else 0)).backward()

    @jax.jit
    @jax.grad
    def gradients(params):
        hidden, aux = model.apply({"params": params}, IDS[:1], method="hidden_states_and_aux_loss")
        logits, cap = hidden @ model.output_matrix(params).T, model.config.final_logit_softcapping
        logprobs = jax.nn.log_softmax(logits if cap is None else cap * jnp.tanh(logits / cap))
        loss = -jnp.take_along_axis(logprobs, IDS[:1, :, None], axis=-1).sum()
        return loss + (aux if experts else 0)

    flat = flax.traverse_util.flatten_dict(gradients(params))
    family = FAMILIES[model.config.model_type]
    expected = expected_tensors(family, model.config, family.in_memory)
    references = {name: x.grad.numpy() for name, x in theirs.named_parameters()}
    fixed = {name for name in expected if name.endswith(("layer_scalar", ".beta", ".eps"))}
    assert len(references) == len(expected) - len(fixed)
    assert all((from_params(expected[name], flat, np.float32) == 0).all() for name in fixed)
    for tensor, parts in expected.items():
        if tensor in fixed:
            continue
        ours, reference = from_params(parts, flat, np.float32), references[tensor]
        np.testing.assert_allclose(ours, reference, atol=1e-4 * np.abs(reference).max())
        assert np.abs(reference).max() > 0, tensor


@pytest.mark.parametrize("name", WITH_EXPERTS[:2])
def test_experts_that_a_file_stacks_are_read(name, tmp_path):
    """As transformers 5 has them in memory, and writes them when told so."""
    pytest.importorskip("torch")
    theirs = made_by_transformers(name)
    for form in (True, False):
        theirs.save_pretrained(tmp_path / str(form), save_original_format=form)
    names = shard_files.tensor_files(tmp_path / "False", "-")
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in names)
    apart, stacked = (load_pretrained(tmp_path / form)[1] for form in ("True", "False"))
    assert_same(stacked, apart)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_what_is_saved_is_what_is_loaded(name, tmp_path, monkeypatch):
    """In shards that part the experts of a layer, too."""
    model, params = tiny_family(name)
    monkeypatch.setattr(shard_files, "SHARD_BYTES", 9000)
    path = save_pretrained(tmp_path / "model", model, params)
    assert len(list(path.glob("*.safetensors"))) > 2
    back, again = load_pretrained(path)
    assert back.config == model.config
    assert_same(again, params)


def test_experts_are_read_in_the_dtype_of_the_parameters(tmp_path):
    model, params = tiny_family("mixtral")
    path = save_pretrained(tmp_path / "model", model, params)
    _, half = load_pretrained(path, param_dtype=jnp.bfloat16)
    assert_same(half, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))


def test_a_missing_expert_is_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    path = save_pretrained(tmp_path / "model", *tiny_family("mixtral"))
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ModelLoadError, match="1 missing: model.layers.1.*experts.3.w2.weight"):
        load_pretrained(path)


@pytest.mark.parametrize("stacks", ["too many", "too few"])
def test_parameters_with_other_experts_are_refused(tmp_path, stacks):
    model, params = tiny_family("mixtral")
    flat = flax.traverse_util.flatten_dict(params)
    stack = flat["layers_0", "experts", "up_proj"]
    more = jnp.concatenate([stack, stack[:1]])
    flat["layers_0", "experts", "up_proj"] = more if stacks == "too many" else stack[1:]
    with pytest.raises(ValueError, match="layers_0/experts/up_proj of shape"):
        save_pretrained(tmp_path / "model", model, flax.traverse_util.unflatten_dict(flat))


def test_fused_matrices_hold_queries_keys_and_values_in_this_order(tmp_path):
    from safetensors.numpy import load_file

    model, params = tiny_family("phi3")
    path = save_pretrained(tmp_path / "model", model, params)
    fused = load_file(path / "model.safetensors")["model.layers.1.self_attn.qkv_proj.weight"]
    layer = params["layers_1"]
    parts = [layer[name]["kernel"].T for name in ("q_proj", "k_proj", "v_proj")]
    np.testing.assert_array_equal(fused, np.concatenate(parts))


# --- config.json ---------------------------------------------------------------------------------


def read(fields, where="config.json"):
    return family_of(fields["model_type"]).from_hugging_face(fields, where)


@pytest.mark.parametrize("name", ROWS)
def test_a_configuration_is_read_as_it_was_written(name):
    config = config_of(name)
    written = family_of(config.model_type).to_hugging_face(config)
    assert read(json.loads(json.dumps(written))) == config


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"qk_norm": "head"}, "a llama model cannot have qk_norm 'head'"),
        ("llama", {"attention_bias": True}, "cannot have output_bias False"),
        (
            "mistral",
            {"no_rope_layers": (1,)},
            "a mistral model cannot have layer 1 LayerSpec.*rope=None",
        ),
        (
            "qwen3",
            {"qk_norm": None},
            "cannot have qk_norm None: it would be read back with qk_norm",
        ),
        ("gemma2", {"embedding_multiplier": 1.0}, "cannot have embedding_multiplier 1.0"),
        ("gemma2", {"attention_multiplier": 0.3}, "cannot have attention_multiplier 0.3"),
        ("llama", {"rotary_dim": 2}, "cannot have rotary_dim 2"),
        ("llama", {"rope_scaling": RopeScaling("dynamic", 2.0)}, "cannot have layer 0 .*=8192"),
    ],
)
def test_what_a_family_cannot_say_is_not_saved(name, changes, message):
    config = dataclasses.replace(config_of(name), **changes)
    with pytest.raises(ValueError, match=message):
        family_of(config.model_type).to_hugging_face(config)


KEYS = {"num_key_value_heads": 2}
SMALL = {
    "vocab_size": 11,
    "hidden_size": 24,
    "intermediate_size": 10,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
}


# What the files of a family must say so that it is one of ours.
NEEDED = {
    "granitemoehybrid": {"layer_types": ["attention"] * 8, "num_local_experts": 0},
    "seed_oss": NO_DROPOUT,  # transformers asks for some by default
}


def theirs_of(model_type, **fields):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoConfig.for_model(model_type, **fields).to_dict()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_fields_have_the_defaults_of_transformers(model_type):
    fields = SMALL | NEEDED.get(model_type, {})
    more = ("qwen2", "qwen3", "mistral", "mixtral", "ministral3", "exaone4", "seed_oss", "lfm2")
    more += ("gpt_oss",)
    if model_type in more:  # whose default number of key-value heads is more than 4
        fields = fields | KEYS
    if model_type == "granitemoehybrid":
        fields = fields | {"mamba_n_heads": 8}
    ours = read({"model_type": model_type, **fields})
    assert ours == read(theirs_of(model_type, **fields))
    nulls = set(theirs_of(model_type, **fields)) - fields.keys() - {"model_type"}
    nulls -= {"sliding_window", "num_key_value_heads"}  # null says none, and as many as heads
    nulls -= {"final_logit_softcapping", "attn_logit_softcapping"}
    assert read({"model_type": model_type, **fields, **dict.fromkeys(nulls)}) == ours


@pytest.mark.parametrize(
    ("model_type", "expected"), [("qwen2", 32), ("qwen3", 32), ("mistral", 8), ("mixtral", 8)]
)
def test_the_default_of_key_value_heads_is_that_of_transformers(model_type, expected):
    fields = SMALL | {"num_attention_heads": 32, "hidden_size": 64} | NEEDED.get(model_type, {})
    assert read({"model_type": model_type, **fields}).num_key_value_heads == expected
    assert theirs_of(model_type, **fields)["num_key_value_heads"] == expected


def layers_of(model_type, fields, count=6):
    """Per layer a letter: s window, f full; n without positions; e with experts."""
    config = read({"model_type": model_type, **SMALL, **fields, "num_hidden_layers": count})
    return " ".join(
        ("s" if layer.window else "f") + "n" * (layer.rope is None) + "e" * layer.experts
        for layer in config.layers
    )


DENSE = {"layer_types": ["attention"] * 6, "num_local_experts": 0}
GEMMA4 = {"vocab_size_per_layer_input": 11}
MOE = EXPERTS | {"num_experts": 4, "moe_intermediate_size": 6}


@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        ("llama", {}, "f f f f f f"),
        ("mistral", KEYS, "s s s s s s"),
        ("mistral", {"sliding_window": None} | KEYS, "f f f f f f"),
        ("qwen2", {"max_window_layers": 4} | KEYS, "f f f f f f"),
        ("qwen2", {"max_window_layers": 4, "use_sliding_window": True} | KEYS, "f f f f s s"),
        ("qwen3", {"use_sliding_window": True} | KEYS, "f f f f f f"),  # fewer than 28
        ("qwen3", {"max_window_layers": 0, "use_sliding_window": True} | KEYS, "s s s s s s"),
        ("gemma2", {}, "s f s f s f"),
        ("gemma2", {"layer_types": [FULL] * 5 + [SLIDING]}, "f f f f f s"),
        ("gemma3_text", {}, "s s s s s f"),
        ("gemma3_text", {"sliding_window_pattern": 2}, "s f s f s f"),
        ("gemma3_text", {"layer_types": [FULL] * 6, "_sliding_window_pattern": 2}, "f f f f f f"),
        ("gemma4_text", GEMMA4, "s s s s s f"),
        ("gemma4_text", GEMMA4 | {"layer_types": [FULL, SLIDING] * 2 + [FULL] * 2}, "f s f s f f"),
        ("smollm3", {}, "f f f fn f f"),
        ("smollm3", {"no_rope_layer_interval": 2}, "f fn f fn f fn"),
        ("smollm3", {"no_rope_layers": [0, 1, 1, 1, 1, 0]}, "fn f f f f fn"),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 7}, "f f f sn f f"),
        ("smollm3", {"use_sliding_window": False, "sliding_window": 7}, "f f f fn f f"),
        ("phi3", {}, "f f f f f f"),
        ("phi3", {"sliding_window": 9}, "s s s s s s"),
        ("olmo2", {}, "f f f f f f"),
        ("olmo3", {}, "s s s f s s"),
        ("olmo3", {"layer_types": [FULL] * 6}, "f f f f f f"),
        ("ministral3", KEYS, "f f f f f f"),
        ("ministral3", {"sliding_window": 9} | KEYS, "s s s s s s"),
        ("exaone4", KEYS, "s s s fn s s"),
        ("exaone4", {"sliding_window_pattern": 2} | KEYS, "s fn s fn s fn"),
        ("exaone4", {"layer_types": [FULL] * 5 + [SLIDING]} | KEYS, "fn fn fn fn fn s"),
        ("exaone4", {"layer_types": [FULL] * 6} | KEYS, "fn fn fn fn fn fn"),
        ("exaone4", {"sliding_window": None, "sliding_window_pattern": None} | KEYS, "f f f f f f"),
        (
            "exaone4",
            {"sliding_window_pattern": "LLLG", "layer_types": [SLIDING, FULL] * 3} | KEYS,
            "s fn s fn s fn",
        ),
        ("granitemoehybrid", DENSE | {"position_embedding_type": "rope"}, "f f f f f f"),
        ("granitemoehybrid", DENSE | {"position_embedding_type": "nope"}, "fn fn fn fn fn fn"),
        ("granitemoehybrid", DENSE, "fn fn fn fn fn fn"),
        ("mixtral", KEYS, "fe fe fe fe fe fe"),
        ("mixtral", {"sliding_window": 9} | KEYS, "se se se se se se"),
        ("qwen3_moe", MOE, "fe fe fe fe fe fe"),
        ("qwen3_moe", MOE | {"decoder_sparse_step": 2}, "f fe f fe f fe"),
        ("qwen3_moe", MOE | {"mlp_only_layers": [0, 3, 9]}, "f fe fe f fe fe"),
        ("qwen3_moe", MOE | {"decoder_sparse_step": 3, "mlp_only_layers": [2]}, "f f f f f fe"),
        ("qwen3_moe", MOE | {"use_sliding_window": True}, "se se se se se se"),
        ("lfm3", {}, "fn fn f fn s fn"),
        ("lfm3", {"layer_types": ["conv"] * 5 + [SLIDING]}, "fn fn fn fn fn s"),
        ("gpt_oss", KEYS, "se fe se fe se fe"),
        ("gpt_oss", {"layer_types": [FULL] * 6} | KEYS, "fe fe fe fe fe fe"),
    ],
)
def test_layers_are_what_the_fields_say(model_type, fields, expected):
    assert layers_of(model_type, fields) == expected


def test_both_forms_of_full_layers_of_gemma_4_mean_the_same():
    """`global_head_dim`, as in the models' files; `per_layer_config`, as transformers saves."""
    fields = {"model_type": "gemma4_text", **SMALL, **GEMMA4, "head_dim": 8, "global_head_dim": 12}
    fields |= {"num_key_value_heads": 4, "num_kv_shared_layers": 1, "layer_types": [FULL] * 8}
    for more in ({}, {"attention_k_eq_v": True, "num_global_key_value_heads": 2}):
        for width in (12, 8):
            old = fields | more | {"global_head_dim": width}
            new = theirs_of(**old)
            assert "per_layer_config" in new and "global_head_dim" not in new
            assert read(old) == read(new)
            assert {layer.head_dim for layer in read(new).layers} == {width}
            old_dtype, new_dtype = {"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}
            assert read(old | old_dtype) == read(new | new_dtype)


def test_any_part_of_a_head_that_turns_is_written_so_that_it_is_read_back():
    """30 / 44 · 44 is less than 30 in floating point."""
    config = dataclasses.replace(config_of("phi3"), head_dim=44, rotary_dim=30)
    written = family_of("phi3").to_hugging_face(config)
    assert read(written) == config and int(44 * (30 / 44)) == 29


SCALING = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
ALPHA = {"alpha": 9.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
LLAMA3_NEW = LLAMA3 | {"rope_theta": 7.0}
GEMMA3_NEW = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 200.0},
    }
}
GEMMA3_OLD = {
    "rope_theta": 5e5,
    "rope_local_base_freq": 200.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
LONG = {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}


@pytest.mark.parametrize(
    ("model_type", "old", "new"),
    [
        (
            "llama",
            {"rope_theta": 7.0, "rope_scaling": SCALING},
            {"rope_parameters": {"rope_theta": 7.0, "rope_type": "yarn", **SCALING}},
        ),
        (
            "llama",
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        ),
        ("gemma3_text", GEMMA3_OLD, GEMMA3_NEW),
        (
            "olmo3",
            {"rope_theta": 5e5, "rope_scaling": SCALING | {"rope_type": "yarn"}},
            {"rope_parameters": {FULL: SCALING | {"rope_theta": 5e5}, SLIDING: {}}},
        ),
        (
            "hunyuan_v1_dense",
            {"rope_theta": 7.0, "rope_scaling": ALPHA | {"type": "dynamic"}},
            {"rope_parameters": ALPHA | {"rope_type": "dynamic", "rope_theta": 7.0}},
        ),
        (
            "glm4",
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.75},
            {
                "rope_parameters": {
                    "rope_type": "linear",
                    "factor": 2.0,
                    "partial_rotary_factor": 0.75,
                }
            },
        ),
        ("exaone4", {"rope_theta": 7.0, "rope_scaling": LLAMA3}, {"rope_parameters": LLAMA3_NEW}),
        ("granite", {"rope_theta": 7.0, "rope_scaling": LLAMA3}, {"rope_parameters": LLAMA3_NEW}),
        (
            "granitemoehybrid",
            {"rope_theta": 7.0, "rope_scaling": LLAMA3},
            {"rope_parameters": LLAMA3_NEW},
        ),
        ("seed_oss", {"rope_theta": 7.0, "rope_scaling": LLAMA3}, {"rope_parameters": LLAMA3_NEW}),
        ("ernie4_5", {"rope_theta": 7.0, "rope_scaling": LLAMA3}, {"rope_parameters": LLAMA3_NEW}),
        ("arcee", {"rope_theta": 7.0, "rope_scaling": LLAMA3}, {"rope_parameters": LLAMA3_NEW}),
        ("nanochat", {"rope_theta": 7.0, "rope_scaling": LLAMA3}, {"rope_parameters": LLAMA3_NEW}),
        (
            "ministral3",
            {"rope_theta": 7.0, "rope_scaling": SCALING | {"llama_4_scaling_beta": 0.3}},
            {"rope_parameters": SCALING | {"llama_4_scaling_beta": 0.3, "rope_theta": 7.0}},
        ),
        ("apertus", {"rope_theta": 7.0, "rope_scaling": LLAMA3}, {"rope_parameters": LLAMA3_NEW}),
        (
            "gpt_oss",
            {"rope_theta": 7.0, "rope_scaling": SCALING | {"truncate": False}},
            {"rope_parameters": SCALING | {"rope_theta": 7.0, "truncate": False}},
        ),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", **LONG}, "partial_rotary_factor": 0.7},
            {
                "original_max_position_embeddings": 4096,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "partial_rotary_factor": 0.7,
                    "original_max_position_embeddings": 4096,
                    "rope_theta": 1e4,
                    **LONG,
                },
            },
        ),
    ],
)
def test_rope_settings_of_transformers_4_and_5_mean_the_same(model_type, old, new):
    fields = SMALL | KEYS | NEEDED.get(model_type, {})
    if model_type == "granitemoehybrid":
        fields = fields | {"mamba_n_heads": 8}
    ours = read({"model_type": model_type, **fields, **old})
    assert ours == read({"model_type": model_type, **fields, **new})
    assert ours == read(theirs_of(model_type, **fields, **copy.deepcopy(old)))
    assert ours.rope_scaling is not None
    old_dtype, new_dtype = {"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}
    assert ours == read({"model_type": model_type, **fields, **old, **old_dtype})
    assert ours == read({"model_type": model_type, **fields, **new, **new_dtype})


def test_files_of_olmo3_from_transformers_4_have_one_base_for_all_layers():
    """transformers 5.24 reads the sliding layers' as 500,000 whatever `rope_theta` says."""
    config = read({"model_type": "olmo3", **SMALL, "rope_theta": 7.0})
    assert {layer.rope.theta for layer in config.layers} == {7.0}


def test_longrope_was_first_called_su():
    old, new = ({"rope_scaling": {"type": kind, **LONG}} for kind in ("su", "longrope"))
    fields = {"model_type": "phi3", **SMALL, "num_attention_heads": 6}
    assert read(fields | old) == read(fields | new)
    assert read(fields | old).rope_scaling.kind == "longrope"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"factor": 4.0}, 1.1386294361119891),  # 0.1 ln 4 + 1
        ({"factor": 0.5}, 1.0),
        ({"factor": 4.0, "attention_factor": 0.9}, 0.9),
        ({"factor": 4.0, "mscale": 2.0, "mscale_all_dim": 1.0}, 1.121751143713058),
        ({"factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.0}, 1.1386294361119891),
        ({"original_max_position_embeddings": 16}, 1.1386294361119891),  # of 64: the factor is 4
    ],
)
def test_attention_factor_of_yarn(settings, expected):
    fields = {"model_type": "llama", **SMALL, "max_position_embeddings": 64}
    scaling = read(fields | {"rope_scaling": {"rope_type": "yarn", **settings}}).rope_scaling
    assert scaling.attention_factor == pytest.approx(expected, rel=1e-12)
    assert scaling.factor == settings.get("factor", 4.0)


PHI3 = "configuration_phi3.Phi3Config"
BAD = [
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ("gemma3_text", {"_sliding_window_pattern": 5}, "_sliding_window_pattern must be 6, got 5"),
    ("gemma3_text", {"rope_parameters": {"rope_theta": 1.0}}, "full_attention and sliding_att"),
    (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2}}},
        "rope_parameters of sliding_attention are",
    ),
    (
        "gemma3_text",
        {
            "rope_local_base_freq": 5.0,
            "rope_parameters": {"sliding_attention": {"rope_theta": 6.0}},
        },
        "rope settings in several places disagree about rope_theta",
    ),
    ("gemma4_text", {"enable_moe_block": True}, "enable_moe_block is True, which is not impl"),
    ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'"),
    ("gemma4_text", {"layer_types": [SLIDING] * 8}, "layer_types must end in full_attention"),
    ("gemma4_text", {"num_kv_shared_layers": 4}, "leave a layer of each type to share from, got 4"),
    ("gemma4_text", {"num_kv_shared_layers": 8}, "leave a layer of each type to share from, got 8"),
    ("gemma4_text", {"num_kv_shared_layers": 9}, "leave a layer of each type to share from, got 9"),
    ("gemma4_text", {"vocab_size_per_layer_input": 10}, "must be at least vocab_size"),
    ("gemma4_text", {"num_global_key_value_heads": 1}, "is 1 without attention_k_eq_v"),
    ("gemma4_text", {"per_layer_config": {"7": {"sliding_window": 4}}}, "sets sliding_window of"),
    ("gemma4_text", {"per_layer_config": {"6": {"head_dim": 4}}}, "must be about the full layers"),
    ("gemma4_text", {"per_layer_config": {"8": {"head_dim": 4}}}, "must be about the full layers"),
    ("gemma4_text", {"per_layer_config": {"x": {}}}, "per_layer_config must be an object of obj"),
    (
        "gemma4_text",
        {"per_layer_config": {n: {"num_key_value_heads": 1} for n in "57"}},
        "per_layer_config sets num_key_value_heads without attention_k_eq_v",
    ),
    (
        "gemma4_text",
        {"per_layer_config": {n: {"head_dim": 4} for n in "57"}, "global_head_dim": 8},
        "per_layer_config disagrees with global_head_dim",
    ),
    ("gemma4_text", {"rope_theta": 5.0}, "fields that ReLax does not support: rope_theta"),
    (
        "gemma4_text",
        {"rope_parameters": {FULL: {"rope_type": "linear", "factor": 2.0}}},
        "rope_type is 'linear', which is not implemented; only default, proportional are",
    ),
    (
        "gemma4_text",
        {"rope_parameters": {FULL: {"rope_type": "default", "partial_rotary_factor": 0.5}}},
        "partial_rotary_factor is 0.5",
    ),
    (
        "gemma4_text",
        {"rope_parameters": {FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.001}}},
        "must turn a plane of a head of 512, got 0.001",
    ),
    ("gemma2", {"hidden_act": "gelu"}, "hidden_act must be hidden_activation, 'gelu_pytorch_tanh'"),
    ("gemma2", {"sliding_window_size": 9}, "sliding_window_size must be sliding_window, 4096"),
    (
        "gemma2",
        {"sliding_window": None},
        "sliding layers, of layer_types or of the family, need sliding_window",
    ),
    ("gemma2", {"layer_types": [FULL]}, "layer_types must name every layer, got 1 types for 8"),
    ("gemma2", {"layer_types": []}, "layer_types must name every layer, got 0 types for 8"),
    ("gemma2", {"layer_types": [FULL] * 7 + ["chunked_attention"]}, "layer_types must be a list"),
    ("smollm3", {"layer_types": [SLIDING] * 8}, "need sliding_window, and use_sliding_window"),
    ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers must be about every layer, got 1 for 8"),
    ("smollm3", {"no_rope_layers": [2] * 8}, "no_rope_layers must be a list of which each is"),
    ("qwen2", {"use_mrope": True}, "use_mrope is True, which is not implemented; only False is"),
    ("phi3", {"resid_pdrop": 1}, "resid_pdrop must be a number from 0 to below 1, got 1"),
    ("phi3", {"auto_map": {"AutoConfig": "mine.Config"}}, "auto_map must be the map to Microsoft"),
    (
        "phi3",
        {"auto_map": {"AutoConfig": f"me/x--{PHI3}"}},
        "auto_map must be the map to Microsoft",
    ),
    ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
    ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor must be a number above 0"),
    ("phi3", {"partial_rotary_factor": 0.5}, "rotary_dim must be even and at most head_dim 6"),
    ("phi3", {"rope_scaling": {"type": "longrope", **LONG}}, "must have one number for each of 3"),
    ("phi3", {"rope_scaling": {"type": "longrope"}}, "short_factor must be a list"),
    (
        "phi3",
        {"rope_parameters": {"original_max_position_embeddings": 9, "rope_type": "longrope"}},
        "must be the same in the rope settings and outside, got 9 and 4096",
    ),
    ("llama", {"rope_scaling": {"type": "yarn"}}, "factor must be a finite number above 0"),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 2, "mscale": -1}}, "mscale must be"),
    (
        "llama",
        {"rope_scaling": {"type": "dynamic", "factor": 2, "original_max_position_embeddings": 9}},
        "needs original_max_position_embeddings equal to max_position_embeddings",
    ),
    (
        "llama",
        {"rope_scaling": {"factor": 2, "type": "linear"}, "rope_parameters": {"factor": 3}},
        "rope settings in several places disagree about factor",
    ),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
    ("mixtral", {"num_experts": 4, "num_local_experts": 5}, "num_experts and num_local_experts"),
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok must be from 1 to num_experts 8"),
    ("mixtral", {"num_hidden_layers": 4000, "num_local_experts": 1000}, "must be at most 65536"),
    ("mixtral", {"num_local_experts": 0}, "num_local_experts must be an integer from 1"),
    (
        "qwen3_moe",
        {"use_sliding_window": True, "max_window_layers": 3},
        "max_window_layers is 3 beside use_sliding_window",
    ),
    (
        "mistral",
        {"layer_types": [FULL] * 8},
        "layer_types must be sliding_attention in every layer, as sliding_window 4096 says, got "
        "full_attention in 8 layers",
    ),
    ("ministral3", {"layer_types": [FULL, SLIDING] * 4}, "got full_attention, sliding_attention"),
    ("olmo3", {"sliding_window": None}, "need sliding_window"),
    ("olmo3", {"rope_parameters": {"rope_theta": 1.0}}, "full_attention and sliding_attention"),
    (
        "olmo3",
        {"rope_parameters": {FULL: {"rope_theta": 5.0}, SLIDING: {"rope_theta": 6.0}}},
        "rope settings in several places disagree about rope_theta",
    ),
    (
        "olmo3",
        {"rope_scaling": SCALING | {"truncate": False}},
        "truncate is False, which is not implemented",
    ),
    ("gemma3_text", {"rope_scaling": SCALING | {"truncate": False}}, "truncate is False"),
    ("ministral3", {"rope_parameters": SCALING}, "llama_4_scaling_beta must be a finite number"),
    ("ministral3", {"rope_theta": 5.0}, "disagree about rope_theta"),
    (
        "ministral3",
        {"rope_parameters": {"llama_4_scaling_beta": 0.1, "max_position_embeddings": 9}},
        "max_position_embeddings must be the same",
    ),
    (
        "exaone4",
        {"sliding_window_pattern": "LLLG"},
        "'LLLG' beside sliding_window needs layer_types",
    ),
    ("granite", {"residual_multiplier": 0}, "residual_multiplier must be a finite number above 0"),
    ("granitemoehybrid", {"num_local_experts": 8}, "num_local_experts must be an integer from 0"),
    (
        "granitemoehybrid",
        {"layer_types": ["mamba"] * 8},
        "layer_types must be a list of which each",
    ),
    ("granitemoehybrid", {"layer_types": ["attention"]}, "got 1 types for 8 layers"),
    (
        "hunyuan_v1_dense",
        {"rope_scaling": {"type": "dynamic", "alpha": 9.0, "factor": 2.0}},
        "factor of rope settings with alpha has no effect unless it is 1.0",
    ),
    ("hunyuan_v1_dense", {"use_qk_norm": False}, "use_qk_norm is False"),
    (
        "hunyuan_v1_dense",
        {"attention_head_dim": 9},
        "attention_head_dim must be head_dim, 6, got 9",
    ),
    (
        "seed_oss",
        {"attention_dropout": 1.0},
        "attention_dropout must be a number from 0 to below 1",
    ),
    ("glm4", {"rope_interleaved": True}, "rope_interleaved is True"),
    ("apertus", {"rope_theta": 5.0}, "disagree about rope_theta"),
    ("apertus", {"mlp_bias": True}, "mlp_bias is True"),
    ("lfm3", {"sliding_window": None}, "sliding layers need sliding_window, got None"),
    ("lfm3", {"rope_parameters": {FULL: {"rope_type": "dynamic"}}}, "rope_type is 'dynamic'"),
    ("lfm3", {"full_attn_idxs": [1]}, "does not support: full_attn_idxs"),
    ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("gpt_oss", {"experts_per_token": 3, "num_experts_per_tok": 2}, "experts_per_token and num_"),
    ("gpt_oss", {"sliding_window": None}, "need sliding_window"),
]


@pytest.mark.parametrize(("model_type", "fields", "message"), BAD)
def test_fields_that_do_not_fit_a_family_are_refused(model_type, fields, message):
    with pytest.raises(ModelLoadError) as caught:
        needed = NEEDED.get(model_type, {})
        read({"model_type": model_type, **SMALL, **KEYS, **needed, **fields}, "x/config.json")
    assert str(caught.value).startswith("x/config.json: ") and message in str(caught.value)


# What config.json of real models holds, without what is the same in all of them.
ANY = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": [2, 7],
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
}


def sizes(*values):
    """Vocabulary, width, width of the feed-forward block, layers, heads, key-value heads."""
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    return dict(zip([*names.split(), "num_key_value_heads"], values, strict=True))


PHI_SIZES = {
    "auto_map": {"AutoConfig": PHI3, "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "attention_bias": False,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
PHI_MINI = sizes(32064, 3072, 8192, 32, 32, 32) | PHI_SIZES
GEMMA3 = {
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
}
GEMMA4_FILE = {
    "attention_bias": False,
    "attention_k_eq_v": False,
    "dtype": "bfloat16",
    "enable_moe_block": False,
    "expert_intermediate_size": None,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "moe_intermediate_size": None,
    "num_experts": None,
    "num_global_key_value_heads": None,
    "num_kv_shared_layers": 0,
    "rope_parameters": {
        FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        SLIDING: {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "top_k_experts": None,
    "use_bidirectional_attention": None,
    "vocab_size_per_layer_input": 262144,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0}
YARN |= {"original_max_position_embeddings": 8192}
MINISTRAL = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 16.0,
    "llama_4_scaling_beta": 0.1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16384,
    "rope_theta": 1000000.0,
    "rope_type": "yarn",
}
DEVSTRAL = {
    "beta_fast": 4.0,
    "factor": 64.0,
    "llama_4_scaling_beta": 0.0,
    "mscale_all_dim": 0.0,
    "original_max_position_embeddings": 4096,
}
GRANITE = {
    "attention_bias": False,
    "attention_multiplier": 0.015625,
    "embedding_multiplier": 12,
    "residual_multiplier": 0.22,
    "rope_scaling": None,
    "tie_word_embeddings": True,
}
MROPE = {"mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25}
REAL = {
    "Mistral 7B v0.1": (
        "mistral",
        sizes(32000, 4096, 14336, 32, 32, 8) | {"sliding_window": 4096, "rope_theta": 1e4},
        {"head_dim": 128, "sliding_window": 4096, "layer_types": (SLIDING,) * 32},
    ),
    "Mistral Nemo": (
        "mistral",
        sizes(131072, 5120, 14336, 40, 32, 8)
        | {"sliding_window": None, "head_dim": 128, "rope_theta": 1e6},
        {"head_dim": 128, "sliding_window": None, "layer_types": (), "rope_theta": 1e6},
    ),
    "Qwen 2.5 0.5B": (
        "qwen2",
        sizes(151936, 896, 4864, 24, 14, 2)
        | {"max_window_layers": 24, "sliding_window": 32768, "use_sliding_window": False}
        | {"rope_theta": 1e6, "tie_word_embeddings": True, "use_mrope": False},
        {"head_dim": 64, "layer_types": (), "attention_bias": True, "output_bias": False},
    ),
    "Qwen 3 0.6B": (
        "qwen3",
        sizes(151936, 1024, 3072, 28, 16, 8)
        | {"attention_bias": False, "head_dim": 128, "max_window_layers": 28}
        | {"rope_scaling": None, "sliding_window": None, "use_sliding_window": False}
        | {"tie_word_embeddings": True, "rope_theta": 1000000},
        {"head_dim": 128, "qk_norm": "head", "tie_word_embeddings": True},
    ),
    "Qwen 3 30B A3B": (
        "qwen3_moe",
        sizes(151936, 2048, 6144, 48, 32, 4)
        | {"decoder_sparse_step": 1, "head_dim": 128, "max_window_layers": 48}
        | {"mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True}
        | {"num_experts": 128, "num_experts_per_tok": 8, "output_router_logits": False}
        | {"router_aux_loss_coef": 0.001, "sliding_window": None, "use_sliding_window": False},
        {"num_experts": 128, "norm_topk_prob": True, "dense_layers": (), "head_dim": 128},
    ),
    "Mixtral 8x7B": (
        "mixtral",
        sizes(32000, 4096, 14336, 32, 32, 8)
        | {"num_experts_per_tok": 2, "num_local_experts": 8, "output_router_logits": False}
        | {"router_aux_loss_coef": 0.02, "sliding_window": None, "rope_theta": 1000000.0},
        {"num_experts": 8, "moe_intermediate_size": 14336, "router_aux_loss_coef": 0.02},
    ),
    "Gemma 2 2B": (
        "gemma2",
        sizes(256000, 2304, 9216, 26, 8, 4)
        | {"attention_bias": False, "attn_logit_softcapping": 50.0, "head_dim": 256}
        | {"cache_implementation": "hybrid", "final_logit_softcapping": 30.0}
        | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
        | {"query_pre_attn_scalar": 256, "sliding_window": 4096, "rope_theta": 10000.0},
        {
            "layer_types": (SLIDING, FULL) * 13,
            "attention_multiplier": 0.0625,
            "embedding_multiplier": 48.0,
            "tie_word_embeddings": True,
        },
    ),
    "Gemma 3 1B": (
        "gemma3_text",
        sizes(262144, 1152, 6912, 26, 4, 1)
        | GEMMA3
        | {"cache_implementation": "hybrid"}
        | {"sliding_window_pattern": 6},
        {
            "layer_types": ((SLIDING,) * 5 + (FULL,)) * 4 + (SLIDING,) * 2,
            "rope_theta": 1e6,
            "local_rope_theta": 1e4,
            "final_logit_softcapping": None,
        },
    ),
    "Gemma 3 270M": (
        "gemma3_text",
        sizes(262144, 640, 2048, 18, 4, 1)
        | GEMMA3
        | {"_sliding_window_pattern": 6, "use_bidirectional_attention": False}
        | {"layer_types": ([SLIDING] * 5 + [FULL]) * 3},
        {"layer_types": ((SLIDING,) * 5 + (FULL,)) * 3, "sliding_window": 512},
    ),
    "Gemma 3 4B, the text part": (
        "gemma3_text",
        {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
        | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
        {
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "rope_scaling": RopeScaling("linear", 8.0),
            "rope_theta": 1e6,
            "sliding_window": 1024,
        },
    ),
    "Gemma 4 E2B": (
        "gemma4_text",
        sizes(262144, 1536, 6144, 35, 8, 1)
        | GEMMA4_FILE
        | {"hidden_size_per_layer_input": 256, "num_kv_shared_layers": 20}
        | {"layer_types": ([SLIDING] * 4 + [FULL]) * 7, "use_double_wide_mlp": True},
        {
            "global_head_dim": 512,
            "num_kv_shared_layers": 20,
            "rope_scaling": RopeScaling("proportional", planes=64),
            "rope_theta": 1e6,
            "local_rope_theta": 1e4,
            "embedding_multiplier": 1536**0.5,
        },
    ),
    "Gemma 4 E4B": (
        "gemma4_text",
        sizes(262144, 2560, 10240, 42, 8, 2)
        | GEMMA4_FILE
        | {"hidden_size_per_layer_input": 256, "num_kv_shared_layers": 18},
        {"layer_types": ((SLIDING,) * 5 + (FULL,)) * 7, "use_double_wide_mlp": False},
    ),
    "Gemma 4 31B": (
        "gemma4_text",
        sizes(262144, 5376, 21504, 60, 32, 16)
        | GEMMA4_FILE
        | {"attention_k_eq_v": True, "num_global_key_value_heads": 4, "sliding_window": 1024}
        | {"hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision"},
        {"num_global_key_value_heads": 4, "tensor_heads": 4, "hidden_size_per_layer_input": 0},
    ),
    "Phi 3 mini 4k": (
        "phi3",
        PHI_MINI | {"max_position_embeddings": 4096, "rope_scaling": None, "sliding_window": 2047},
        {"rope_scaling": None, "sliding_window": 2047, "rotary_dim": None, "head_dim": 96},
    ),
    "Phi 3.5 mini": (
        "phi3",
        PHI_MINI
        | {"max_position_embeddings": 131072, "sliding_window": 262144}
        | {"auto_map": {"AutoConfig": f"microsoft/Phi-3.5-mini-instruct--{PHI3}"}}
        | {"rope_scaling": {"type": "longrope"} | {k: [1.5] * 48 for k in LONG}},
        {
            "rope_scaling": RopeScaling(
                "longrope",
                32.0,
                original_max_position_embeddings=4096,
                attention_factor=1.1902380714238083,  # sqrt(1 + ln 32 / ln 4096)
                short_factor=(1.5,) * 48,
                long_factor=(1.5,) * 48,
            )
        },
    ),
    "Phi 4 mini": (
        "phi3",
        sizes(200064, 3072, 8192, 32, 24, 8)
        | PHI_SIZES
        | {"auto_map": PHI_SIZES["auto_map"] | {"AutoTokenizer": "Xenova/gpt-4o"}}
        | {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False}
        | {"max_position_embeddings": 131072, "partial_rotary_factor": 0.75}
        | {"rope_scaling": {"type": "longrope"} | {k: [1.0] * 48 for k in LONG}}
        | {"sliding_window": 262144, "tie_word_embeddings": True},
        {"rotary_dim": 96, "head_dim": 128, "tie_word_embeddings": True},
    ),
    "OLMo 2 7B": (
        "olmo2",
        sizes(100352, 4096, 11008, 32, 32, 32)
        | {"attention_bias": False, "rope_scaling": None, "rope_theta": 500000},
        {"pre_norm": False, "post_norm": True, "qk_norm": "all", "rope_theta": 5e5},
    ),
    "OLMo 3 7B": (
        "olmo3",
        sizes(100278, 4096, 11008, 32, 32, 32)
        | {"attention_bias": False, "max_position_embeddings": 65536, "rope_theta": 500000}
        | {"rope_scaling": YARN | {"attention_factor": 1.2079441541679836}}
        | {"layer_types": ([SLIDING] * 3 + [FULL]) * 8, "sliding_window": 4096},
        {"rope_theta": 5e5, "local_rope_theta": 5e5, "layer_types": ((SLIDING,) * 3 + (FULL,)) * 8},
    ),
    "Ministral 3 3B, the text part": (
        "ministral3",
        sizes(131072, 3072, 9216, 26, 32, 8)
        | {"head_dim": 128, "sliding_window": None, "tie_word_embeddings": True}
        | {"rope_parameters": MINISTRAL | {"type": "yarn", "rope_type": "yarn"}},
        {"query_beta": 0.1, "query_length": 16384, "rope_theta": 1e6, "layer_types": ()},
    ),
    "Devstral 2 123B": (
        "ministral3",
        sizes(131072, 12288, 28672, 88, 96, 8)
        | {"rope_parameters": MINISTRAL | DEVSTRAL, "head_dim": 128},
        {"query_beta": 0.0, "query_length": 4096},
    ),
    "EXAONE 4 1.2B": (
        "exaone4",
        sizes(102400, 2048, 4096, 30, 32, 8)
        | {"head_dim": 64, "layer_types": [FULL] * 30, "sliding_window": None}
        | {"sliding_window_pattern": "LLLG", "tie_word_embeddings": True}
        | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}}
        | {"max_position_embeddings": 65536, "rope_theta": 1000000},
        {"layer_types": (), "no_rope_layers": (), "qk_norm": "head", "pre_norm": False},
    ),
    "EXAONE 4 32B": (
        "exaone4",
        sizes(102400, 5120, 27392, 64, 40, 8)
        | {"head_dim": 128, "layer_types": ([SLIDING] * 3 + [FULL]) * 16}
        | {"sliding_window": 4096, "sliding_window_pattern": "LLLG", "rope_theta": 1000000},
        {"no_rope_layers": tuple(range(3, 64, 4)), "sliding_window": 4096},
    ),
    "Granite 3.3 2B": (
        "granite",
        sizes(49159, 2048, 8192, 40, 32, 8)
        | GRANITE
        | {"logits_scaling": 8.0, "mlp_bias": False, "rope_theta": 10000000.0},
        {"logits_scaling": 8.0, "residual_multiplier": 0.22, "attention_multiplier": 0.015625},
    ),
    "Granite 4 micro": (
        "granitemoehybrid",
        sizes(100352, 2560, 8192, 40, 40, 8)
        | GRANITE
        | {"layer_types": ["attention"] * 40, "position_embedding_type": "rope"}
        | {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 8192}
        | {"mamba_n_heads": 128, "mamba_d_head": 64, "mamba_expand": 2, "logits_scaling": 10}
        | {"normalization_function": "rmsnorm", "init_method": "mup", "rope_theta": 10000000},
        {"logits_scaling": 10.0, "intermediate_size": 8192, "no_rope_layers": ()},
    ),
    "GLM-4 9B": (
        "glm4",
        sizes(151552, 4096, 13696, 40, 32, 2)
        | {"attention_bias": True, "head_dim": 128, "partial_rotary_factor": 0.5},
        {"rotary_dim": 64, "rope_interleaved": True, "attention_bias": True, "output_bias": False},
    ),
    "Hunyuan 7B": (
        "hunyuan_v1_dense",
        sizes(128167, 4096, 14336, 32, 32, 8)
        | {
            "attention_dropout": 0.1,
            "head_dim": 128,
            "attention_head_dim": 128,
            "use_qk_norm": True,
            "use_cla": False,
        }
        | {"rope_scaling": BESIDE_ALPHA | {"alpha": 1000.0, "type": "dynamic"}},
        {"qk_norm": "rotated", "rope_scaling": RopeScaling("ntk", 1000.0), "rope_theta": 1e4},
    ),
    "Seed-OSS 36B": (
        "seed_oss",
        sizes(155136, 5120, 27648, 64, 80, 8)
        | {"attention_bias": True, "attention_out_bias": False, "head_dim": 128}
        | {"residual_dropout": 0.0, "rope_scaling": {"rope_type": "default"}, "rope_theta": 1e7},
        {"attention_bias": True, "output_bias": False, "rope_scaling": None},
    ),
    "ERNIE 4.5 0.3B": (
        "ernie4_5",
        sizes(103424, 1024, 3072, 18, 16, 2)
        | {"head_dim": 128, "use_bias": False, "rope_theta": 500000.0, "rope_scaling": None},
        {"rope_interleaved": True, "tie_word_embeddings": True, "attention_bias": False},
    ),
    "Arcee AFM 4.5B": (
        "arcee",
        sizes(128004, 2560, 18432, 36, 20, 4)
        | {"attention_bias": False, "head_dim": 128, "hidden_act": "relu2", "mlp_bias": False}
        | {"max_position_embeddings": 65536, "rope_scaling": YARN | {"mscale": 1.0}},
        {"gated_mlp": False, "hidden_act": "relu2"},
    ),
    "LFM2 1.2B": (
        "lfm2",
        sizes(65536, 2048, 12288, 16, 32, 8)
        | {"block_auto_adjust_ff_dim": True, "block_dim": 2048, "block_ff_dim": 12288}
        | {"block_ffn_dim_multiplier": 1.0, "block_mlp_init_scale": 1.0, "block_multiple_of": 256}
        | {"block_norm_eps": 1e-5, "block_out_init_scale": 1.0, "block_use_swiglu": True}
        | {"block_use_xavier_init": True, "conv_L_cache": 3, "conv_bias": False}
        | {"conv_dim": 2048, "conv_dim_out": 2048, "conv_use_xavier_init": True, "num_heads": 32}
        | {"full_attn_idxs": [2, 5, 8, 10, 12, 14], "norm_eps": 1e-5, "theta": 1000000.0}
        | {"max_position_embeddings": 128000, "rope_theta": 1000000.0, "use_pos_enc": True},
        {"intermediate_size": 8192, "conv_width": 3, "rope_theta": 1e6, "head_dim": 64},
    ),
    "Qwen 3.5 0.8B": (
        "qwen3_5_text",
        sizes(248320, 1024, 3584, 24, 8, 2)
        | {"attention_bias": False, "attn_output_gate": True, "full_attention_interval": 4}
        | {"head_dim": 256, "hidden_act": "silu", "layer_types": ([DELTA] * 3 + [FULL]) * 6}
        | {"linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16}
        | {"linear_num_value_heads": 16, "linear_value_head_dim": 128, "mlp_only_layers": []}
        | {"mamba_ssm_dtype": "float32", "max_position_embeddings": 262144}
        | {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}
        | {"rms_norm_eps": 1e-6, "tie_word_embeddings": True}
        | {"rope_parameters": MROPE | {"rope_type": "default", "rope_theta": 10000000}},
        {"rope_theta": 1e7, "rotary_dim": 64, "conv_width": 4, "num_key_value_heads": 2},
    ),
    "Qwen 3.6 27B": (
        "qwen3_5_text",
        sizes(248320, 5120, 17408, 64, 24, 4)
        | {"attention_bias": False, "attn_output_gate": True, "full_attention_interval": 4}
        | {"head_dim": 256, "layer_types": ([DELTA] * 3 + [FULL]) * 16}
        | {"linear_num_key_heads": 16, "linear_num_value_heads": 48, "output_gate_type": "swish"}
        | {"rope_parameters": MROPE | {"rope_type": "default", "rope_theta": 10000000}},
        {"attention_gate": "entry", "linear_num_value_heads": 48, "num_attention_heads": 24},
    ),
    "Apertus 8B": (
        "apertus",
        sizes(131072, 4096, 21504, 32, 32, 8)
        | {"attention_bias": False, "hidden_act": "xielu", "mlp_bias": False, "post_norm": False}
        | {"max_position_embeddings": 65536, "qk_norm": True, "rms_norm_eps": 1e-5}
        | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}}
        | {"rope_theta": 12000000},
        {"hidden_act": "xielu", "gated_mlp": False, "qk_norm": "head", "rope_theta": 12e6},
    ),
    "LFM3 1.7B": (
        "lfm3",
        sizes(128000, 2048, 7680, 24, 16, 4)
        | {"conv_L_cache": 7, "conv_bias": False, "head_dim": 128, "norm_eps": 1e-5}
        | {"layer_types": (["conv"] * 2 + [FULL, "conv"]) + [SLIDING, "conv", FULL, "conv"] * 5}
        | {"sliding_window": 256, "use_attention_gate": True, "use_sandwich_norm": True},
        {"attention_gate": "head", "post_norm": True, "rope_theta": 1e6, "local_rope_theta": 1e4},
    ),
    "gpt-oss 20B": (
        "gpt_oss",
        sizes(201088, 2880, 2880, 24, 64, 8)
        | {"attention_bias": True, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu"}
        | {"initial_context_length": 4096, "layer_types": [SLIDING, FULL] * 12}
        | {"max_position_embeddings": 131072, "num_experts_per_tok": 4, "num_local_experts": 32}
        | {"output_router_logits": False, "rms_norm_eps": 1e-5, "rope_theta": 150000}
        | {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
        | {"rope_scaling": YARN | {"factor": 32.0, "truncate": False}}
        | {"router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0},
        {"num_experts": 32, "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "attention_sinks": True},
    ),
    "SmolLM 3 3B": (
        "smollm3",
        sizes(128256, 2048, 11008, 36, 16, 4)
        | {"attention_bias": False, "mlp_bias": False, "max_window_layers": 28}
        | {"layer_types": [FULL] * 36, "no_rope_layer_interval": 4, "pretraining_tp": 2}
        | {"no_rope_layers": [1, 1, 1, 0] * 9, "rope_scaling": None, "rope_theta": 5000000.0}
        | {"sliding_window": None, "use_sliding_window": False},
        {"no_rope_layers": tuple(range(3, 36, 4)), "rope_theta": 5e6, "layer_types": ()},
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_configurations_of_real_models_are_read(name):
    model_type, fields, expected = REAL[name]
    fields = ANY | fields
    asks = fields["attention_dropout"] > 0
    with pytest.warns(UserWarning, match="attention_dropout") if asks else nullcontext():
        config = read({"model_type": model_type, **fields})
    assert {name: getattr(config, name) for name in expected} == expected


def least(model_type) -> dict:
    """The fields of a small model of a family."""
    return {"model_type": model_type, **SMALL, **KEYS, **NEEDED.get(model_type, {})}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_dropout_is_warned_of_and_changes_nothing(model_type):
    plain = read(least(model_type))
    with pytest.warns(UserWarning, match="attention_dropout 0.1 of config.json will not be appl"):
        assert read(least(model_type) | {"attention_dropout": 0.1}) == plain


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_unknown_field_that_is_null_counts_as_absent(model_type):
    fields = least(model_type)
    assert read(fields | {"field_of_tomorrow": None}) == read(fields)
    with pytest.raises(ModelLoadError, match="does not support: field_of_tomorrow"):
        read(fields | {"field_of_tomorrow": 0})


@pytest.mark.parametrize("model_type", ["mistral", "ministral3"])
@pytest.mark.parametrize("window", [None, 8])
def test_layer_types_may_say_what_the_window_says(model_type, window):
    fields = least(model_type) | {"sliding_window": window}
    types = [FULL if window is None else SLIDING] * SMALL["num_hidden_layers"]
    assert read(fields | {"layer_types": types}) == read(fields | {"layer_types": None})


def test_what_is_known_of_model_types_includes_those_with_a_text_part():
    with pytest.raises(ModelLoadError, match="Known: .*gemma4, gemma4_text.*qwen3_5, qwen3_5_text"):
        read({"model_type": "gemma4_unified", "text_config": {}})


# Fields of transformers' configurations that leave the logits as they are, reviewed by hand.
UNCHANGING = set(
    """
    _name_or_path architectures bos_token_id chunk_size_feed_forward dtype eos_token_id id2label
    label2id model_type output_attentions output_hidden_states output_router_logits pad_token_id
    pretraining_tp problem_type return_dict transformers_version use_cache
    """.split()
)
# What does nothing beside a list of all layers; for what these do alone, see
# `test_layers_are_what_the_fields_say`.
OVERRULED = {
    "max_window_layers",
    "no_rope_layer_interval",
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "use_sliding_window",
}
OTHER_VALUES = {
    "hidden_act": "gelu",
    "hidden_activation": "relu2",
    "num_attention_heads": 12,
    "intermediate_size": 40,
    "head_dim": 14,
    "layer_types": [SLIDING, FULL, FULL],
    "mlp_only_layers": [1, 2],
    "no_rope_layers": [0, 1, 1],
    "sliding_window": 9,
    "original_max_position_embeddings": 11,
}


def other(name, value):
    """A value that differs, of the same type where there is one."""
    if name == "num_key_value_heads":
        return 3 if value == 1 else 1
    if name in OTHER_VALUES:
        return OTHER_VALUES[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + type(value)(1)
    return 9 if value is None else "another"


# Of experts and Mamba layers that are not there, and ids that no code reads.
UNREAD = {
    "granitemoehybrid": {
        "intermediate_size",
        "num_experts_per_tok",
        "router_aux_loss_coef",
        "time_step_limit",
        *(f"mamba_{x}" for x in "n_heads n_groups d_state d_head d_conv expand".split()),
        *(f"mamba_{x}" for x in "chunk_size conv_bias proj_bias".split()),
    },
    "hunyuan_v1_dense": {"eod_token_id"},
}


def silent(config, fields):
    """The fields of a configuration that have no say."""
    names = UNCHANGING | OVERRULED | UNREAD.get(config.model_type, set())
    if not fields.get("block_auto_adjust_ff_dim", True):
        names |= {"block_multiple_of", "block_ffn_dim_multiplier"}
    names |= set() if config.rope_scaling else {"original_max_position_embeddings"}
    names |= {"sliding_window"} if {*(fields.get("layer_types") or ())} == {FULL} else set()
    return names | (set() if fields.get("use_sliding_window", True) else {"sliding_window"})


def assert_honoured(before, fields, name, value):
    """The field is refused or warned of by name, changes the configuration, or has no say."""
    try:
        after = read(fields | {name: value})
    except (ModelLoadError, UserWarning) as error:
        assert name in str(error), f"{name}: {error}"
        return
    if value in FAMILIES[before.model_type].only.get(name, ()):
        return  # the only one, and so that of a file without the field
    assert after != before or name in silent(before, fields), f"{name} {value!r} is ignored"
    assert after == before or name not in UNCHANGING, name


@pytest.mark.parametrize("name", ROWS)
def test_every_field_of_transformers_is_honoured_or_refused(name):
    """Each one changed, and those of all other families set."""
    fields = theirs_of(**fields_of(name))
    before = read(fields)
    for field, value in fields.items():
        if field not in ("model_type", "rope_parameters", "num_hidden_layers"):
            assert_honoured(before, fields, field, other(field, value))
    for model_type in FAMILIES:
        foreign = theirs_of(model_type)
        for field in foreign.keys() - fields.keys() - {"rope_parameters"}:
            assert_honoured(before, fields, field, other(None, foreign[field]))


@pytest.mark.parametrize("name", ROWS)
def test_every_rope_setting_of_transformers_is_honoured_or_refused(name):
    fields = theirs_of(**fields_of(name))
    before, ropes = read(fields), fields["rope_parameters"]
    nested = FULL in ropes
    for kind, settings in ropes.items() if nested else [(None, ropes)]:
        for setting, value in settings.items():
            changed = [x + 1 for x in value] if isinstance(value, list) else other(setting, value)
            changed = settings | {setting: changed}
            changed = ropes | {kind: changed} if nested else changed
            try:
                after = read(fields | {"rope_parameters": changed})
            except ModelLoadError as error:
                assert setting in str(error), f"{setting}: {error}"
            else:
                ignored = FAMILIES[fields["model_type"]].rope.ignored
                assert after != before or setting in ignored, setting


# Fields that code of others reads, or that stand in files without being transformers'.
@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quantization_config", {"bits": 4}),
        ("auto_map", {"AutoModelForCausalLM": "m.M"}),
        ("is_encoder_decoder", True),
        ("add_cross_attention", True),
        ("pruned_heads", {"0": [1]}),
        ("clip_qkv", 8.0),
        ("logit_scale", 0.5),
        ("logits_scaling", 2.0),
        ("residual_multiplier", 0.5),
        ("embedding_multiplier", 12.0),
        ("attention_multiplier", 0.1),
        ("attention_chunk_size", 8),
        ("alibi", True),
        ("parallel_residual", True),
        ("use_qk_norm", True),
        ("qk_layernorm", True),
        ("n_shared_experts", 1),
        ("shared_expert_intermediate_size", 4),
        ("rope_interleaved", True),
        ("num_nextn_predict_layers", 1),
        ("rope_scaling", {"type": "default", "mrope_section": [1, 1, 1]}),
    ],
)
def test_fields_of_other_architectures_are_refused_by_name(model_type, field, value):
    family = FAMILIES[model_type]
    if field in family.fields or value in family.only.get(field, ()):
        return  # its own
    if field == "rope_scaling" and family.rope.ignored:
        return
    fields = least(model_type)
    if field == "rope_scaling" and model_type == "ministral3":
        value = value | {"llama_4_scaling_beta": 0.1}
    is_inner = field == "rope_scaling" and not family.rope.nested_only
    with pytest.raises(ModelLoadError, match="mrope_section" if is_inner else field):
        read(fields | {field: value})


# --- the documentation ---------------------------------------------------------------------------


def test_the_table_of_models_is_the_list_of_the_tests():
    """Made again with `python tests/families.py > docs/models.md`."""
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    head, _, rest = text.partition("|---|---|---|---|\n")
    table, tail = rest.split("\n\n", 1)
    assert f"{head}|---|---|---|---|\n" == HEAD and f"\n{tail}" == TAIL
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    listed = [
        (model_type, name.removeprefix(model_type).removeprefix("-") or "plain", what)
        for name, (model_type, what, _) in ROWS.items()
    ]
    assert [tuple(row[:3]) for row in rows] == listed
    assert all(0 < float(row[3]) < 2e-4 for row in rows)


def test_the_readme_counts_the_families():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"for {len(FAMILIES)} model families" in " ".join(text.split())
