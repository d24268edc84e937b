"""Adapters and frozen weights: what they compute, what is trained, and PEFT's files."""

import dataclasses
import functools
import json
import math
import re
import shutil

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import bits, packed_batch
from families import IDS, logits_of, tiny_family
from safetensors.numpy import load_file, save_file

from relax.errors import ConfigError, ModelLoadError
from relax.models import load_pretrained, save_pretrained
from relax.models.config import LoRA
from relax.models.huggingface.peft import (
    WEIGHTS,
    base_of,
    check_mergeable,
    is_adapter_directory,
    load_adapter,
    load_merged,
)
from relax.models.huggingface.peft_config import (
    CONFIG,
    IGNORED_FIELDS,
    READ,
    REQUIRED_VALUES,
    read_adapter_config,
)
from relax.models.huggingface.peft_save import save_adapter
from relax.models.layers import Linear
from relax.models.lora import init_adapters, layer_name, merge_adapters, target_weights
from relax.models.trainable import merge, overlaid, partition
from relax.optimizers import adamw
from relax.trainers import SFTTrainer
from relax.trainers.state import initial_weights, reference_params

pytestmark = [
    # peft asks transformers for a name that this is about to drop,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    # says that it saves embeddings whose adapter is saved,
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    # and says of patterns of parameters, which it applies, that it ignores them.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]

KEY = jax.random.key(3)
ALL = LoRA(r=4, alpha=6.0, dropout=0.0, target_modules=("all-linear",))
ROWS = [
    [([1, 2, 3, 4], [5]), ([6, 7], [8, 9, 10])],
    [([3], [4, 5, 6, 7, 8, 9, 10, 11, 12])],
]
BATCH = packed_batch(ROWS, 13)


def adapted(model, params, lora=ALL, scale=0.3):
    """The model with adapters that change what it computes: `(model, adapters)`."""
    model = model.clone(lora=lora)
    adapters, _ = partition(model, params, KEY)
    flat = flax.traverse_util.flatten_dict(adapters)
    rng = np.random.default_rng(5)
    for path, leaf in flat.items():
        if path[-1].endswith("lora_b"):
            flat[path] = jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32)
    return model, flax.traverse_util.unflatten_dict(flat)


def trainer_of(model, params, **options):
    return SFTTrainer(model, optax.sgd(0.1), params=params, **options)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params):
    return model.apply({"params": params}, BATCH["input_ids"])


# What adapters compute.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fresh_adapters_change_no_bit_of_the_logits(dtype, tiny_model, tiny_params):
    model = tiny_model.clone(dtype=dtype)
    with_lora = model.clone(lora=dataclasses.replace(ALL, dropout=0.1))
    adapters, frozen = partition(with_lora, tiny_params, KEY)
    base = logits(model, tiny_params)
    assert bits(logits(with_lora, merge(adapters, frozen))) == bits(base)
    assert bits(logits(model, frozen["base"])) == bits(base)  # the reference policy


def test_fresh_adapters_are_uniform_within_one_over_the_root_of_the_inputs_and_zero():
    params = {"a": {"q_proj": {"kernel": jnp.zeros((400, 30))}}, "b": {"kernel": jnp.zeros((9, 5))}}
    made = init_adapters(KEY, params, LoRA(r=64, target_modules=("all-linear",)))
    a, b = made["a"]["q_proj"]["lora_a"], made["a"]["q_proj"]["lora_b"]
    assert (a.shape, a.dtype, b.shape, b.dtype) == ((400, 64), jnp.float32, (64, 30), jnp.float32)
    assert not np.asarray(b).any()
    # of U(-1/20, 1/20): the standard deviation is 1/20 / sqrt(3)
    assert 0.0499 < float(jnp.abs(a).max()) <= 0.05
    np.testing.assert_allclose([a.mean(), a.std()], [0, 0.05 / math.sqrt(3)], atol=1e-3)
    # An adapter depends on its own place, not on which others there are.
    alone = init_adapters(KEY, {"b": params["b"]}, LoRA(r=64, target_modules=("all-linear",)))
    assert bits(alone["b"]) == bits(made["b"])
    assert not np.allclose(alone["b"]["lora_a"], a[:9])


def test_merged_kernels_compute_what_kernel_and_adapter_do(tiny_model, tiny_params):
    params = tiny_params
    lora, adapters = adapted(tiny_model, params)
    weights = merge(adapters, {"base": params})
    merged = merge_adapters(weights, lora.lora)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    expected = logits(lora, weights)
    assert np.abs(logits(tiny_model, params) - expected).max() > 0.1
    np.testing.assert_allclose(logits(tiny_model, merged), expected, atol=2e-5)
    kernel = np.asarray(params["layers_0"]["o_proj"]["kernel"], np.float64)
    a, b = (np.asarray(adapters["layers_0"]["o_proj"][n], np.float64) for n in ("lora_a", "lora_b"))
    np.testing.assert_allclose(
        merged["layers_0"]["o_proj"]["kernel"], kernel + 1.5 * a @ b, 1e-6, 1e-6
    )
    assert merged["embed_tokens"] is params["embed_tokens"]


def test_a_model_that_is_not_told_the_scale_refuses_adapters(tiny_model, tiny_params):
    _, adapters = adapted(tiny_model, tiny_params)
    with pytest.raises(ValueError, match="whose scale the model must know"):
        logits(tiny_model, merge(adapters, {"base": tiny_params}))


def test_targets_are_named_layers_and_names_of_none_are_refused():
    _, params = tiny_family("qwen3_moe")  # the middle layer is dense, the others have experts
    every = target_weights(params, ALL)
    assert {layer_name(path) for path in every} == set(
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    )
    assert len(every) == 3 * 4 + 3 * 3
    some = target_weights(params, LoRA(target_modules=("v_proj", "up_proj")))
    assert sorted(some) == [
        ("layers_0", "experts", "up_proj"), ("layers_0", "v_proj", "kernel"),
        ("layers_1", "up_proj", "kernel"), ("layers_1", "v_proj", "kernel"),
        ("layers_2", "experts", "up_proj"), ("layers_2", "v_proj", "kernel"),
    ]  # fmt: skip
    for wrong in (("q_proj", "qkv"), ("experts",), (), ("all-linear", "q_proj")):
        with pytest.raises(ConfigError, match="lora_target_modules must be all-linear or names"):
            target_weights(params, LoRA(target_modules=wrong))


def test_adapters_of_experts_have_the_gradient_of_the_experts_that_they_change():
    """dA = s dW Bᵀ and dB = s Aᵀ dW, of each expert, with dW the gradient of the merged weight."""
    model, params = tiny_family("qwen3_moe")
    lora, adapters = adapted(model, params)
    weights = merge(adapters, {"base": params})
    batch = {"input_ids": IDS, "labels": IDS}

    def gradient(model, params):
        trainer = SFTTrainer(model, optax.sgd(0.1))
        return jax.jit(jax.grad(lambda p: trainer.compute_loss(p, batch).loss))(params)

    found, of_merged = gradient(lora, weights), gradient(model, merge_adapters(weights, lora.lora))
    for layer in ("layers_0", "layers_2"):
        for name in ("gate_proj", "up_proj", "down_proj"):
            d_w = np.asarray(of_merged[layer]["experts"][name])
            a, b = (np.asarray(weights[layer]["experts"][f"{name}_lora_{h}"]) for h in "ab")
            for half, expected in (("a", d_w @ b.swapaxes(1, 2)), ("b", a.swapaxes(1, 2) @ d_w)):
                given = found[layer]["experts"][f"{name}_lora_{half}"]
                np.testing.assert_allclose(given, 1.5 * expected, rtol=1e-3, atol=1e-6)
            assert np.abs(d_w).max() > 1e-4


# Dropout.


def test_dropout_drops_inputs_of_the_adapter_alone_and_keeps_their_mean():
    lora = LoRA(r=2, alpha=6.0, dropout=0.25)
    layer = Linear(5, False, 0.02, jnp.float32, jnp.float32, lora)
    rng = np.random.default_rng(0)
    w, a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, 5), (8, 2), (2, 5)))
    params = {"params": {"kernel": w, "lora_a": a, "lora_b": b}}

    # One row per input: what an input adds is either nothing or 4/3 of what it adds undropped.
    x = jnp.tile(jnp.eye(8, dtype=jnp.float32), (500, 1))
    change = layer.apply(params, x, rngs={"dropout": KEY}) - x @ w
    whole = 3.0 * np.asarray(x @ a @ b)
    kept = np.abs(change).max(axis=1) > 1e-6
    np.testing.assert_allclose(change, np.where(kept[:, None], whole * 4 / 3, 0), atol=1e-5)
    assert abs(kept.mean() - 0.75) < 0.03
    np.testing.assert_allclose(layer.apply(params, x) - x @ w, whole, atol=1e-5)


@pytest.fixture(scope="module")
def dropping(tiny_model, tiny_params):
    lora = dataclasses.replace(ALL, dropout=0.3, target_modules=("q_proj", "down_proj"))
    return adapted(tiny_model, tiny_params, lora), tiny_params


def test_dropout_is_keyed_and_absent_from_validation(dropping):
    (model, adapters), params = dropping
    frozen = {"base": params}
    trainer = trainer_of(model, params)
    loss = jax.jit(lambda key: trainer.compute_loss(adapters, BATCH, rng=key, frozen=frozen).loss)
    one, same, other = loss(KEY), loss(KEY), loss(jax.random.key(4))
    assert one == same != other
    undropped = trainer_of(model.clone(lora=dataclasses.replace(model.lora, dropout=0.0)), params)
    expected = undropped.eval_step(adapters, frozen, BATCH).loss
    assert trainer.eval_step(adapters, frozen, BATCH).loss == expected != one


def test_gradient_checkpointing_drops_the_same_inputs_when_it_computes_them_again(dropping):
    """The gradient is the slope of the loss along a line, as it would not be otherwise."""
    (model, adapters), params = dropping
    trainer = trainer_of(model.clone(gradient_checkpointing=True), params)

    def loss(adapters):
        return trainer.compute_loss(adapters, BATCH, rng=KEY, frozen={"base": params}).loss

    gradient = jax.jit(jax.grad(loss))(adapters)
    line = jax.tree.map(lambda g: g / optax.tree.norm(gradient), gradient)
    loss = jax.jit(loss)
    ahead = loss(jax.tree.map(lambda a, d: a + 1e-2 * d, adapters, line))
    behind = loss(jax.tree.map(lambda a, d: a - 1e-2 * d, adapters, line))
    np.testing.assert_allclose((ahead - behind) / 2e-2, optax.tree.norm(gradient), rtol=1e-2)


def test_every_update_and_micro_batch_has_its_own_dropout(dropping):
    """The loss of update n is the one under fold_in(fold_in(key, n), micro-batch)."""
    (model, adapters), params = dropping
    trainer = SFTTrainer(
        model,
        optax.sgd(0.0),
        params=merge(adapters, {"base": params}),
        gradient_accumulation_steps=2,
    )
    twice = jax.tree.map(lambda x: np.concatenate([x, x]), packed_batch(ROWS[1:], 13))
    state = trainer.create_train_state(KEY)
    assert jax.tree.structure(state.params) == jax.tree.structure(adapters)
    row = packed_batch(ROWS[1:], 13)
    loss = jax.jit(
        lambda key: trainer.compute_loss(adapters, row, rng=key, frozen={"base": params}).loss
    )
    for step in range(2):
        keys = [jax.random.fold_in(jax.random.fold_in(KEY, step), i) for i in range(2)]
        first, second = map(loss, keys)
        assert first != second
        state, metrics = trainer.train_step(state, twice)
        np.testing.assert_allclose(metrics["loss"], (first + second) / 2, rtol=1e-6)


# What is trained.


def test_only_adapters_are_trained_and_have_an_optimizer(tiny_model, tiny_params):
    model, params = tiny_model.clone(lora=ALL), tiny_params
    trainer = SFTTrainer(model, adamw(1e-2), params=params, max_grad_norm=1.0)
    state = trainer.create_train_state(KEY)
    assert {path[-1] for path in flax.traverse_util.flatten_dict(state.params)} == {
        "lora_a", "lora_b",
    }  # fmt: skip
    held = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert held == 2 * sum(leaf.size for leaf in jax.tree.leaves(state.params))
    before, fresh = bits(state.frozen), bits(state.params)
    state, metrics = trainer.train_step(state, BATCH)
    assert bits(state.frozen) == before == bits({"base": params})
    # B is 0 at first, so that A has no gradient in the first update, and B does.
    flat = flax.traverse_util.flatten_dict(state.params)
    moved = {path[-1] for path, leaf in flat.items() if path[-1] == "lora_b" and leaf.any()}
    assert moved == {"lora_b"} and bits(state.params) != fresh
    losses = []
    for _ in range(10):
        state, metrics = trainer.train_step(state, BATCH)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]


def products_of_step(model, params, freeze=None):
    """The shapes that the matrix products of an update give, and its floating-point operations."""
    trainer = trainer_of(model, params, freeze=freeze)
    lowered = trainer.train_step.lower(trainer.create_train_state(KEY), BATCH)
    shapes = re.findall(r"dot_general .*-> tensor<([\dx]*)xf32>", lowered.as_text())
    found = {tuple(sorted(map(int, shape.split("x")))) for shape in shapes}
    return found, lowered.cost_analysis()["flops"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient_of_a_frozen_kernel_is_computed(checkpointing, tiny_model, tiny_params):
    model, layer = tiny_model.clone(gradient_checkpointing=checkpointing), tiny_params["layers_0"]
    kernels = {tuple(sorted(layer[n]["kernel"].shape)) for n in ("q_proj", "k_proj", "up_proj")}
    kernels.add(tuple(sorted(tiny_params["embed_tokens"].shape)))
    assert len(kernels) == 4
    full, flops = products_of_step(model, tiny_params)
    assert kernels <= full  # the probe sees them where they are
    for with_lora, freeze in ((model.clone(lora=ALL), None), (model, "proj|embed")):
        found, fewer = products_of_step(with_lora, tiny_params, freeze)
        assert not kernels & found
        assert freeze is None or fewer < 0.8 * flops


def test_frozen_weights_stay_bit_identical_and_the_others_move(tiny_model, tiny_params):
    params, freeze = tiny_params, "embed|layers_[01]/[qk]_proj"
    trainer = SFTTrainer(tiny_model, adamw(1e-2), params=params, freeze=freeze)
    state = trainer.create_train_state(KEY)
    for _ in range(2):
        state, _ = trainer.train_step(state, BATCH)
    after = flax.traverse_util.flatten_dict(merge(state.params, state.frozen), sep="/")
    before = flax.traverse_util.flatten_dict(params, sep="/")
    same = {path for path in before if bits(before[path]) == bits(after[path])}
    assert same == {"embed_tokens", "layers_0/q_proj/kernel", "layers_0/k_proj/kernel"}


def test_what_is_trained_beside_frozen_weights_moves_as_it_would_with_all_trained(
    tiny_model, tiny_params
):
    all_of = trainer_of(tiny_model, tiny_params)
    some_of = trainer_of(tiny_model, tiny_params, freeze="q_proj|norm")
    everything, metrics = all_of.train_step(all_of.create_train_state(KEY), BATCH)
    some, some_metrics = some_of.train_step(some_of.create_train_state(KEY), BATCH)
    np.testing.assert_allclose(some_metrics["loss"], metrics["loss"], rtol=1e-6)
    expected = flax.traverse_util.flatten_dict(everything.params)
    for path, leaf in flax.traverse_util.flatten_dict(some.params).items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-5)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ("nowhere", "freeze must fit some weights and not all, and 'nowhere' fits none of"),
        ("", "freeze must fit some weights and not all, and '' fits"),
        ("(", r"freeze must be a regular expression, got '\('"),
    ],
)
def test_a_regular_expression_that_freezes_nothing_or_everything_is_refused(
    freeze, message, tiny_model, tiny_params
):
    model, params = tiny_model, tiny_params
    with pytest.raises(ConfigError, match=message):
        partition(model, params, KEY, freeze)


def test_freezing_beside_adapters_is_refused_and_so_is_a_weight_on_both_sides(
    tiny_model, tiny_params
):
    model, params = tiny_model, tiny_params
    with pytest.raises(ConfigError, match="all other weights are frozen"):
        partition(model.clone(lora=ALL), params, KEY, "embed")
    with pytest.raises(ValueError, match="'norm' is both|'scale' is both"):
        merge({"norm": {"scale": 1}}, {"base": {"norm": {"scale": 2}}})
    assert partition(model, params, KEY) == (params, {})


# PEFT.


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Base directories by family, written without torch."""
    root, made = tmp_path_factory.mktemp("bases"), {}

    def directory(name):
        if name not in made:
            model, params = tiny_family(name)
            made[name] = save_pretrained(root / name, model, params)
        return made[name]

    return directory


def peft_model(directory, seed=1, **fields):
    """A random adapter of PEFT's own on a base that transformers reads."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    torch.manual_seed(seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **fields)
    theirs = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                weight.normal_(0, 0.3)
            if "modules_to_save" in name:
                weight.add_(0.1 * torch.randn_like(weight))
            if "lora_magnitude" in name:
                weight.mul_(torch.rand_like(weight) + 0.5)
    return theirs


def reference(theirs):
    """Logits of the first row, which has no padding."""
    return logits_of(theirs, IDS[:1])


@functools.partial(jax.jit, static_argnums=0)
def ours_on_row(model, params):
    return model.apply({"params": params}, IDS[:1])


PEFT = {
    "all": ("llama", {"r": 4, "lora_alpha": 7, "target_modules": "all-linear"}),
    "fused": ("phi3", {"r": 4, "lora_alpha": 7, "target_modules": ["qkv_proj", "gate_up_proj"]}),
    "beside experts": ("qwen3_moe", {"r": 2, "lora_alpha": 2, "target_modules": ["o_proj"]}),
    "experts": (
        "qwen3_moe",
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "experts and routers": (
        "qwen3_moe",
        {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": "all-linear"},
    ),
    "one of the experts' weights": (
        "mixtral",
        {"r": 3, "target_modules": ["v_proj"], "target_parameters": ["experts.gate_up_proj"]},
    ),
    "experts whose outputs alternate": (
        "gpt_oss",
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["v_proj"],
            "target_parameters": [
                "mlp.router.weight",
                "mlp.experts.gate_up_proj",
                "mlp.experts.down_proj",
            ],
        },
    ),
    "patterns": (
        "gemma2",
        {
            "r": 4,
            "lora_alpha": 8,
            "use_rslora": True,
            "target_modules": ["o_proj", "down_proj", "k_proj"],
            "layers_to_transform": [0, 2],
            "rank_pattern": {"o_proj": 3},
            "alpha_pattern": {"layers.2.mlp.down_proj": 5},
        },
    ),
    "wildcards": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
            # Regular expressions of ends of names, where a dot is any character. The first in the
            # file counts, where PEFT has them sorted, whatever their order in memory was.
            "rank_pattern": {"[kv]_proj": 3, r"^model\.layers\.1\..*proj": 2, "v_proj": 5},
            "alpha_pattern": {
                r".*\.(0|1)\.mlp.*": 3,
                "layers...self_attn.q_proj": 1,
                "layers.2.mlp.down.proj": 5,
                "self.*_proj": 2,
            },
        },
    ),
    "first layer": (
        "llama",
        {"r": 2, "target_modules": ["o_proj", "up_proj"], "layers_to_transform": 0},
    ),
    "no layer named": (
        "llama",
        {"r": 2, "target_modules": ["o_proj"], "layers_to_transform": []},
    ),
    "whole name and layer": (
        "llama",
        {
            "r": 2,
            "target_modules": ["model.layers.2.mlp.up_proj", "o_proj"],
            "layers_to_transform": [1],
        },
    ),
    "inputs of each layer": ("gemma4_text", {"r": 2, "target_modules": "all-linear"}),
    "delta rules": ("qwen3_5_text", {"r": 2, "target_modules": "all-linear"}),
    "convolutions": ("lfm2", {"r": 2, "target_modules": ["in_proj", "out_proj", "w1"]}),
    "dora": ("llama", {"r": 4, "lora_alpha": 7, "target_modules": "all-linear", "use_dora": True}),
    "dora with biases": (
        "qwen2",
        {
            "r": 4,
            "use_rslora": True,
            "use_dora": True,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2},
            "lora_dropout": 0.1,
        },
    ),
    "dora fused": ("phi3", {"r": 4, "target_modules": ["qkv_proj", "o_proj"], "use_dora": True}),
    "modules in full": (
        "llama-biases",
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["q_proj", "up_proj"],
            "modules_to_save": ["embed_tokens", "norm", "k_proj"],
            "alpha_pattern": {"up_proj": 5},
        },
    ),
    "embeddings": (
        "llama-biases",
        {
            "r": 3,
            "lora_alpha": 4,
            "target_modules": ["embed_tokens", "o_proj"],
            "rank_pattern": {"embed_tokens": 2},
        },
    ),
    "regex": ("qwen2", {"r": 2, "target_modules": r".*\.0\..*(gate|up)_proj", "lora_dropout": 0.1}),
}


@pytest.mark.parametrize("name", PEFT)
def test_adapters_of_peft_give_its_logits_and_merge_to_its_weights(name, directories, tmp_path):
    """And saved by us they load in PEFT with nothing missing or left over, to the same logits."""
    family, fields = PEFT[name]
    theirs = peft_model(directories(family), **fields)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = reference(theirs)
    with theirs.disable_adapter():
        assert np.abs(reference(theirs) - expected).max() > 0.05
    model, params = load_pretrained(directories(family))
    lora, adapters = load_adapter(tmp_path / "theirs", model, params)
    weights = overlaid(params, adapters)
    np.testing.assert_allclose(ours_on_row(lora, weights), expected, atol=1e-4)
    assert lora.lora.dropout == fields.get("lora_dropout", 0.0)

    ours = save_adapter(tmp_path / "ours", lora, weights, str(directories(family)))
    np.testing.assert_allclose(reload_in_peft(ours, directories(family)), expected, atol=1e-4)

    theirs.merge_and_unload().save_pretrained(tmp_path / "merged")
    _, merged = load_pretrained(tmp_path / "merged")
    plain, our_merged = load_merged(tmp_path / "theirs")
    assert plain.lora is None
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), our_merged, merged)


def reload_in_peft(directory, base):
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    theirs = peft.get_peft_model(model, peft.PeftConfig.from_pretrained(directory))
    weights = peft.utils.load_peft_weights(str(directory))
    result = peft.set_peft_model_state_dict(theirs, weights)
    assert not result.unexpected_keys
    assert not [name for name in result.missing_keys if "lora" in name]
    return reference(theirs.eval())


def test_our_adapters_load_in_peft(directories, tmp_path):
    """Those of layers that are one there (Phi-3) too, trained apart as they are."""
    pytest.importorskip("peft")
    stabilised, decomposed = {"use_rslora": True}, {"use_rslora": True, "use_dora": True}
    cases = (
        ("phi3", ("all-linear",), {}),
        ("phi3", ("k_proj",), stabilised),
        ("phi3", ("k_proj", "down_proj"), decomposed),
        ("llama", ("up_proj",), {}),
        ("granitemoehybrid", ("all-linear",), stabilised),
        ("qwen3_moe", ("all-linear",), {}),  # with a dense layer, which PEFT takes for experts
        ("qwen3_moe", ("down_proj",), stabilised),
        ("mixtral", ("router", "up_proj", "q_proj"), {}),
        ("gpt_oss", ("router", "up_proj", "down_proj", "o_proj"), {}),
    )
    for family, targets, options in cases:
        model, params = tiny_family(family)
        chosen = dataclasses.replace(ALL, target_modules=targets, **options)
        lora, adapters = adapted(model, params, chosen)
        weights = merge(adapters, {"base": params})
        merged = merge_adapters(weights, lora.lora)
        path = save_adapter(tmp_path / "a", lora, weights, str(directories(family)))
        theirs = reload_in_peft(path, directories(family))
        np.testing.assert_allclose(ours_on_row(model, merged), theirs, atol=1e-4)
        back, read = load_adapter(path, model, params)
        again = merge_adapters(merge(read, {"base": params}), back.lora)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again, merged)


GRADIENTS = {
    "lora": {"target_modules": "all-linear"},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"layers.1.mlp.down_proj": 3},
    },
    "in full and embeddings": {
        "target_modules": ["q_proj", "embed_tokens"],
        "modules_to_save": ["lm_head", "norm"],
    },
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_adapters_are_those_of_torch(name, directories, tmp_path):
    torch = pytest.importorskip("torch")
    fields = {"r": 4, "lora_alpha": 7} | GRADIENTS[name]
    base = directories("llama-biases" if "in full" in name else "llama")
    theirs = peft_model(base, **fields)
    theirs.save_pretrained(directory := tmp_path / "gradients")
    labels = np.where(np.arange(IDS.shape[1]) < 5, -100, IDS[:1])
    theirs(
        torch.tensor(IDS[:1].astype(int)), labels=torch.tensor(labels.astype(int))
    ).loss.backward()
    model, params = load_pretrained(base)
    lora, adapters = load_adapter(directory, model, params)
    trainer = trainer_of(lora, params)
    batch = {"input_ids": IDS[:1], "labels": labels}

    trained, frozen = partition(lora, overlaid(params, adapters), KEY)

    def loss(trained):
        return trainer.compute_loss(trained, batch, frozen=frozen).loss

    gradients = jax.jit(jax.grad(loss))(trained)
    as_adapter = save_adapter(tmp_path / "ours", lora, merge(gradients, frozen), "base")
    found = {name.removesuffix(".weight"): g for name, g in load_file(as_adapter / WEIGHTS).items()}
    expected = {
        name.replace(".modules_to_save", "").replace(".default", "").removesuffix(".weight"): (
            parameter.grad.numpy()
        )
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(gradient, expected[name], atol=1e-4 * scale, err_msg=name)


def test_what_peft_can_express_and_we_cannot_is_refused_by_name(tmp_path):
    model, params = tiny_family("gemma2")  # its embeddings are its output matrix
    q_proj = {"target_modules": ("q_proj",)}
    for fields, said in (
        ({"modules_to_save": ("q_proj",)} | q_proj, "lora_target_modules adapts it"),
        ({"modules_to_save": ("v_head",)} | q_proj, "none ends in 'v_head'"),
        ({"rank_pattern": (("k_proj", 2),)} | q_proj, "rank_pattern: 'k_proj' fits no module"),
        ({"target_modules": ("lm_head",)}, "lora_target_modules must be all-linear or names"),
        ({"target_modules": ("embed_tokens",), "use_dora": True}, "use_dora has no adapter of emb"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            partition(model.clone(lora=dataclasses.replace(ALL, **fields)), params, KEY)
    lora, adapters = adapted(
        model, params, dataclasses.replace(ALL, **q_proj, modules_to_save=("embed_tokens",))
    )
    path = save_adapter(tmp_path / "a", lora, overlaid(params, adapters), "base")
    assert json.loads((path / CONFIG).read_text())["ensure_weight_tying"] is True
    assert bits(load_adapter(path, model, params)[1]) == bits(adapters)
    with pytest.raises(ModelLoadError, match="embed_tokens would be trained apart from the output"):
        load_adapter(rewrite(path, ensure_weight_tying=False), model, params)
    lora, adapters = adapted(
        model, params, dataclasses.replace(ALL, target_modules=("embed_tokens",))
    )
    with pytest.raises(ModelLoadError, match="embed_tokens cannot be merged"):
        check_mergeable(lora)


def test_the_reference_of_adapters_has_what_is_trained_in_full_as_it_was(tiny_model, tiny_params):
    lora = dataclasses.replace(ALL, target_modules=("q_proj",), modules_to_save=("norm",))
    model = tiny_model.clone(lora=lora)
    trained, frozen = initial_weights(model, KEY, tiny_params, reference=True)
    moved = jax.tree.map(lambda leaf: leaf + 1, trained)
    assert bits(trained["norm"]) == bits(tiny_params["norm"])
    before = reference_params(frozen)
    assert bits(logits(model, before)) == bits(logits(tiny_model, tiny_params))
    assert not np.allclose(logits(model, merge(moved, frozen)), logits(model, before))


# Adapter files that are refused.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory of an adapter on `llama`, made without torch."""
    model, params = tiny_family("llama")
    targets = ("q_proj", "down_proj")
    lora, adapters = adapted(model, params, dataclasses.replace(ALL, target_modules=targets))
    path = tmp_path_factory.mktemp("saved") / "adapter"
    return save_adapter(path, lora, merge(adapters, {"base": params}), "owner/base")


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def rewrite(directory, **fields):
    file = directory / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return directory


def test_a_saved_adapter_is_read_back_bit_for_bit(saved):
    model, params = tiny_family("llama")
    targets = ("q_proj", "down_proj")
    lora, adapters = adapted(model, params, dataclasses.replace(ALL, target_modules=targets))
    back, read = load_adapter(saved, model, params)
    assert bits(read) == bits(adapters) and back.lora == dataclasses.replace(
        lora.lora, target_modules=("down_proj", "q_proj")
    )
    assert base_of(saved) == "owner/base" and is_adapter_directory(saved)


CHANGES = {
    "peft_type": "LOHA",
    "task_type": "SEQ_CLS",
    "bias": "lora_only",
    "revision": "v2",
    "init_lora_weights": "pissa",
    "fan_in_fan_out": True,
    "use_dora": "yes",
    "use_qalora": True,
    "lora_bias": True,
    "use_bdlora": {"target_modules_bd_a": ["q_proj"]},
    "modules_to_save": "embed_tokens",
    "ensure_weight_tying": "yes",
    "layer_replication": [[0, 2], [1, 3]],
    "target_parameters": ["experts.gate.bias"],
    "target_modules": ["q_proj", 3],
    "layers_to_transform": [-1],
    "trainable_token_indices": [3],
    "alora_invocation_tokens": [3],
    "megatron_config": {"a": 1},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1.0},
    "velora_config": {"rank": 1},
    "monteclora_config": {"samples": 2},
    "r": 0,
    "lora_alpha": -1,
    "lora_dropout": 1.0,
    "use_rslora": "yes",
    "rank_pattern": {"(q_proj)+": 2},
    "alpha_pattern": {"q_proj": "8"},
    "base_model_name_or_path": None,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_field_that_asks_for_another_computation_is_refused_by_name(name, copy):
    model, params = tiny_family("llama")
    rewrite(copy, **{name: CHANGES[name]})
    with pytest.raises(ModelLoadError, match=f"{CONFIG}: {name} "):
        load_adapter(copy, model, params)


def test_every_field_of_peft_is_known_and_one_of_the_future_is_refused(copy):
    peft = pytest.importorskip("peft")
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields <= {*REQUIRED_VALUES, *IGNORED_FIELDS, *READ}
    assert set(REQUIRED_VALUES) <= set(CHANGES)
    with pytest.raises(ModelLoadError, match="fields that ReLax does not support.*: use_tomorrow"):
        base_of(rewrite(copy, use_tomorrow=True))


def test_keys_of_patterns_that_may_run_for_long_are_refused(copy):
    """PEFT takes any regular expression; ours are matched in bounded time, or not at all."""
    for key in ("(a+)+b", "(?=q)q_proj", "q{2,9}", ".*a.*b.*c.*d", "[", "(q", "a" * 501, r"\\1"):
        with pytest.raises(ModelLoadError, match="alpha_pattern must be numbers by names"):
            read_adapter_config(rewrite(copy, alpha_pattern={key: 1}))
    many = {f".*{i}.q_proj": 1 for i in range(17)}
    with pytest.raises(ModelLoadError, match="rank_pattern must be whole numbers by names"):
        read_adapter_config(rewrite(copy, alpha_pattern={}, rank_pattern=many))
    slow = {f".*{'.*'.join('ab')}{i}x": 1 for i in range(16)}
    config = read_adapter_config(rewrite(copy, rank_pattern=slow))
    assert config.rank("model.layers.0.self_attn." + "ab" * 20) == config.r


def test_adapters_that_the_configuration_does_not_target_are_refused(copy):
    """PEFT would leave them out, with a warning."""
    model, params = tiny_family("llama")
    for fields in ({"target_modules": ["q_proj"]}, {"layers_to_transform": [0, 1]}):
        targets = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": None}
        with pytest.raises(ModelLoadError, match="has adapters of model.layers.* does not target"):
            load_adapter(rewrite(copy, **targets | fields), model, params)


def test_dropout_that_peft_does_not_have_is_told(tmp_path):
    model, params = tiny_family("qwen3_moe")
    lora, adapters = adapted(model, params, dataclasses.replace(ALL, dropout=0.1))
    with pytest.warns(UserWarning, match="lora_dropout 0.1 is written as 0"):
        path = save_adapter(tmp_path / "a", lora, merge(adapters, {"base": params}), "base")
    assert read_adapter_config(path).dropout == 0


def test_tensors_that_are_missing_extra_or_misshapen_are_refused(copy):
    model, params = tiny_family("llama")
    tensors = load_file(copy / WEIGHTS)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert first in tensors
    for changed, message in (
        ({n: t for n, t in tensors.items() if n != first}, f"1 missing: {first}"),
        (
            {n: t for n, t in tensors.items() if ".1.mlp" not in n},
            r"2 missing: .*layers.1.mlp.down_proj.lora_A",
        ),
        (tensors | {"base_model.model.lm_head.lora_A.weight": tensors[first]}, "1 not in the arch"),
        (tensors | {"odd": tensors[first]}, "1 not in the architecture: odd"),
        (tensors | {first: tensors[first][:3].copy()}, "q_proj.lora_A.weight has shape"),
    ):
        save_file(changed, copy / WEIGHTS)
        with pytest.raises(ModelLoadError, match=message):
            load_adapter(copy, model, params)
    save_file({}, copy / WEIGHTS)
    with pytest.raises(ModelLoadError, match="there is no adapter in it"):
        load_adapter(rewrite(copy, target_modules=r".*q_proj"), model, params)
    (copy / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(ModelLoadError, match="not a readable safetensors file"):
        load_adapter(copy, model, params)


def test_an_adapter_that_is_no_finite_numbers_is_refused_by_name(copy):
    model, params = tiny_family("llama")
    tensors = load_file(copy / WEIGHTS)
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    save_file(tensors | {name: tensors[name] * np.float32(np.nan)}, copy / WEIGHTS)
    with pytest.raises(ModelLoadError, match=f"{name} holds numbers that are NaN or infinite"):
        load_adapter(copy, model, params)


def test_a_directory_with_an_adapter_and_a_model_is_refused(copy):
    (copy / "config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="both an adapter and a model"):
        is_adapter_directory(copy)
