"""`relax merge`: hand-made values, what is refused, and how much memory it takes."""

import json
import math
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import tiny_family
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from relax.errors import ConfigError, ModelLoadError, RelaxError
from relax.models import Transformer, TransformerConfig, load_pretrained, save_pretrained
from relax.models.config import LoRA
from relax.models.huggingface.peft import WEIGHTS, load_merged
from relax.models.huggingface.peft_save import save_adapter
from relax.models.huggingface.shards import write_shards
from relax.models.lora import init_adapters
from relax.models.trainable import merge as joined
from relax.tools.merge import sources
from relax.tools.merge.config import MergeConfig
from relax.tools.merge.merge import merge
from relax.tools.merge.methods import linear, shares, slerp_factors, ties, trim_threshold

CONFIG = TransformerConfig(
    vocab_size=261,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    tie_word_embeddings=True,
)
EMBEDDING = "model.embed_tokens.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory, arithmetic_tokenizer):
    """The directories of a base, of two models trained from it, and of two adapters of it."""
    path = tmp_path_factory.mktemp("models")
    model = Transformer(CONFIG)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    base = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)
    for name in ("base", "a", "b"):
        size = 0 if name == "base" else 0.3
        changed = jax.tree.map(lambda x, k=size: x + k * rng.normal(size=x.shape), base)
        changed = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), changed)
        save_pretrained(path / name, model, changed, arithmetic_tokenizer)
    for name in ("x", "y", "dora"):
        lora = LoRA(2, 6.0, 0.0, ("q_proj", "down_proj"), use_dora=name == "dora")
        with_adapter = model.clone(lora=lora)
        adapters = init_adapters(jax.random.key(1), base, with_adapter.lora)
        adapters = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), adapters)
        tree = joined(adapters, {"base": base})
        save_adapter(path / name, with_adapter, tree, str(path / "base"))
    return path


def run(models, names: str, output, **options):
    named = [str(models / name) for name in names.split()]
    config = MergeConfig().replace(models=named, output_dir=str(output), **options)
    config.check()
    return load_file(merge(config) / "model.safetensors")


def weights_of(models, name: str) -> dict[str, np.ndarray]:
    return load_file(models / name / "model.safetensors")


def test_a_weighted_mean_is_that_of_the_numbers(models, tmp_path, arithmetic_tokenizer):
    a, b = weights_of(models, "a"), weights_of(models, "b")
    merged = run(models, "a b", tmp_path / "m", weights=[3.0, 1.0])
    assert merged.keys() == a.keys()
    for name in a:
        np.testing.assert_allclose(merged[name], 0.75 * a[name] + 0.25 * b[name], atol=1e-6)
    model, _ = load_pretrained(tmp_path / "m")
    assert model.config == CONFIG
    saved = json.loads((tmp_path / "m" / "config.json").read_text())
    assert saved["dtype"] == "float32" and saved["eos_token_id"] == 1
    assert (tmp_path / "m" / "tokenizer.json").is_file()


def test_equal_weights_are_the_default_and_may_be_negative():
    assert shares([1.0, 1.0]) == [0.5, 0.5] and shares([2.0, -1.0]) == [2.0, -1.0]
    values = linear([np.float32([1, 2]), np.float32([4, 8])], [2.0, -1.0])
    assert values.tolist() == [-2.0, -4.0]


def test_spherical_interpolation_keeps_the_length_of_unit_vectors(models, tmp_path):
    """Half-way between (1, 0) and (0, 1) is (√½, √½), a third of the way at 30 degrees."""
    assert slerp_factors(0.0, 1.0, 1.0, 0.5) == pytest.approx((math.sqrt(0.5), math.sqrt(0.5)))
    third = slerp_factors(0.0, 4.0, 9.0, 1 / 3)
    assert third == pytest.approx((math.cos(math.radians(30)), 0.5))
    assert slerp_factors(2.0, 1.0, 4.0, 0.25) == (0.75, 0.25)  # parallel
    assert slerp_factors(-2.0, 1.0, 4.0, 0.25) == (0.75, 0.25)  # opposite
    assert slerp_factors(0.0, 0.0, 4.0, 0.25) == (0.75, 0.25)
    merged = run(models, "a b", tmp_path / "m", method="slerp", t=0.25)
    for name, a in weights_of(models, "a").items():
        b = weights_of(models, "b")[name]
        angle = math.acos(float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)))
        expected = (math.sin(0.75 * angle) * a + math.sin(0.25 * angle) * b) / math.sin(angle)
        np.testing.assert_allclose(merged[name], expected, atol=1e-5)


def test_ties_trims_elects_a_sign_and_averages_what_has_it():
    """Worked by hand, at weights 1, 1, 2; the trimmed numbers stand in brackets.

    change 1:   4    -3    (1)    5
    change 2:  -6    -2    (1)  (-1)
    change 3:   4     6    (1)  (-1)
    sum:        6     7     0     5      weighted; the signs elected are +, +, none, +
    mean:       4     6     0     5      of those that agree: (4 + 2·4)/3, 12/2, none, 5
    """
    changes = [np.float32(c) for c in ([4, -3, 1, 5], [-6, -2, 1, -1], [4, 6, 1, -1])]
    cuts = [
        trim_threshold(c.copy(), density)
        for c, density in zip(changes, (0.75, 0.5, 0.5), strict=True)
    ]
    assert cuts == [3.0, 2.0, 4.0]
    assert ties(changes, cuts, [1, 1, 2]).tolist() == [4.0, 6.0, 0.0, 5.0]


def test_ties_of_models_adds_the_merged_change_to_the_base(models, tmp_path):
    base = weights_of(models, "base")
    changes = [
        {name: tensor - base[name] for name, tensor in weights_of(models, one).items()}
        for one in ("a", "b")
    ]
    options = {"method": "ties", "density": 0.4, "lambda": 1.5}
    merged = run(models, "a b", tmp_path / "m", base_model=str(models / "base"), **options)
    for name, start in base.items():
        pair = [change[name] for change in changes]
        kept = []
        for change in pair:
            count = round(0.4 * change.size)
            cut = np.sort(np.abs(change).reshape(-1))[-count]
            kept.append(np.where(np.abs(change) < cut, 0, change))
        sign = np.sign(kept[0] + kept[1])
        agree = [np.where(np.sign(k) == sign, k, 0) for k in kept]
        count = np.maximum(sum((k != 0).astype(np.float32) for k in agree), 1)
        expected = start + 1.5 * (agree[0] + agree[1]) / count
        np.testing.assert_allclose(merged[name], expected, atol=1e-5)


@pytest.mark.parametrize("part", [7, 1 << 20])
def test_adapters_count_as_their_base_with_them_merged(models, tmp_path, monkeypatch, part):
    """Whatever the parts that a tensor is read in."""
    monkeypatch.setattr(sources, "PART", part)
    merged = run(models, "x y", tmp_path / "m", weights=[1.0, 3.0])
    base, parts = weights_of(models, "base"), []
    for name in ("x", "y"):
        file = load_file(models / name / WEIGHTS)
        a, b = (file[f"base_model.model.{QUERY[:-7]}.lora_{half}.weight"] for half in "AB")
        parts.append(3 * b @ a)
    np.testing.assert_array_equal(merged[EMBEDDING], base[EMBEDDING])
    expected = base[QUERY] + 0.25 * parts[0] + 0.75 * parts[1]
    np.testing.assert_allclose(merged[QUERY], expected, atol=1e-5)
    for name in ("x", "dora"):
        ours = run(models, f"{name} {name}", tmp_path / "same")
        model, params = load_merged(models / name)
        theirs = load_file(save_pretrained(tmp_path / name, model, params) / "model.safetensors")
        for tensor in theirs:
            np.testing.assert_allclose(ours[tensor], theirs[tensor], atol=1e-5)
    run(models, "x y", tmp_path / "ties", method="ties")  # knows the base


def edited(models, path, change):
    """A copy of model `b` with other tensors."""
    shutil.copytree(models / "b", path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    return str(path)


def not_a_number(tensors):
    tensors[QUERY][1, 2] = np.nan


def half(tensors):
    tensors |= {name: tensor.astype(np.float16) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (not_a_number, {}, f"{QUERY} holds numbers that are NaN or infinite"),
        (half, {}, "have float32 and float16; choose what is written with --dtype"),
        (lambda tensors: tensors.pop(QUERY), {}, f"1 missing: {QUERY}"),
        (lambda tensors: None, {"method": "ties"}, "name it with --base_model"),
    ],
)
def test_models_that_do_not_fit_are_refused_before_anything_is_written(
    models, tmp_path, change, options, words
):
    other = edited(models, tmp_path / "other", change)
    named = [str(models / "a"), other]
    with pytest.raises(ModelLoadError, match=words) as caught:
        merge(MergeConfig().replace(models=named, output_dir=str(tmp_path / "m"), **options))
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["other"]


def test_models_of_other_sizes_or_tokenizers_are_refused(models, tmp_path):
    config = MergeConfig().replace(output_dir=str(tmp_path / "m"))
    shutil.copytree(models / "b", tmp_path / "b")
    file = tmp_path / "b" / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"rms_norm_eps": 1e-3}))
    config = config.replace(models=[str(models / "a"), str(tmp_path / "b")])
    with pytest.raises(ModelLoadError, match=r"differ in rms_norm_eps \(1e-06 and 0.001\)"):
        merge(config)
    file.write_text(json.dumps(fields))
    file = tmp_path / "b" / "tokenizer.json"
    file.write_text(file.read_text().replace("<system>", "<other>"))
    with pytest.raises(ModelLoadError, match=r"differ in 2 tokens: '<other>', '<system>'"):
        merge(config)
    assert not (tmp_path / "m").exists()


def test_numbers_that_the_dtype_does_not_have_are_refused(models, tmp_path):
    big = edited(
        models, tmp_path / "big", lambda tensors: tensors.update({QUERY: tensors[QUERY] * 1e6})
    )
    config = MergeConfig().replace(models=[str(models / "a"), big], dtype="float16")
    with pytest.raises(RelaxError, match=f"{QUERY} has numbers too large for float16"):
        merge(config.replace(output_dir=str(tmp_path / "m")))
    assert [file.name for file in tmp_path.iterdir()] == ["big"]
    half_of_both = run(models, "a b", tmp_path / "m", dtype="bfloat16")
    assert {tensor.dtype.name for tensor in half_of_both.values()} == {"bfloat16"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"models": ["a"]}, "models must name at least two"),
        ({"models": ["a", "b", "c"], "method": "slerp"}, "slerp merges two models, got 3"),
        ({"models": ["a", "out/"]}, "output_dir must not be one of the models"),
        ({"weights": [1.0]}, "one number per model, got 1 for 2"),
        ({"weights": [1.0, -1.0]}, "must not sum to 0"),
        ({"weights": [1.0, -0.5], "method": "ties"}, "weights of ties must be above 0, got -0.5"),
        ({"weights": [1.0, 2.0], "method": "slerp"}, "weights"),
        ({"density": 0.5}, "density"),
        ({"lambda": 0.5}, "lambda"),
        ({"t": 0.25}, "t .*slerp"),
    ],
)
def test_a_contradiction_is_refused(options, words):
    config = MergeConfig().replace(**{"models": ["a", "b"], "output_dir": "out"} | options)
    with pytest.raises(ConfigError, match=words):
        config.check()


@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
def test_memory_stays_below_twice_the_largest_tensor_and_a_shard(tmp_path, monkeypatch, method):
    """A vocabulary of 4 MB in float32, and a model of 12 MB in three shards."""
    config = TransformerConfig(
        vocab_size=1 << 14,
        hidden_size=64,
        intermediate_size=1 << 13,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
    )
    model = Transformer(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    monkeypatch.setattr("relax.models.huggingface.shards.SHARD_BYTES", 5_000_000)
    monkeypatch.setattr(sources, "PART", 1 << 16)
    rng = np.random.default_rng(0)
    for name in ("base", "a", "b"):
        params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)
        save_pretrained(tmp_path / name, model, params)
    named = [str(tmp_path / name) for name in ("a", "b")]
    options = {"method": "ties", "base_model": str(tmp_path / "base")} if method == "ties" else {}
    asked = MergeConfig().replace(models=named, output_dir=str(tmp_path / "m"), method=method)
    asked = asked.replace(**options)
    found = [sources.find_source(name) for name in named]  # tracing takes memory of its own
    monkeypatch.setattr("relax.tools.merge.merge.find_source", lambda name: found[0])
    largest = (1 << 14) * 64 * 4
    tracemalloc.start()
    merge(asked)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    shard = max(file.stat().st_size for file in (tmp_path / "m").glob("*.safetensors"))
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    assert largest < peak < 2 * largest + shard


def test_a_streamed_file_holds_what_safetensors_reads(tmp_path):
    """Also an odd header, a tensor without numbers and one of bfloat16."""
    tensors = {"b": np.arange(6).reshape(2, 3), "a": np.ones(5), "empty": np.zeros((0, 3))}
    for dtype in ("float32", "float16", jnp.bfloat16):
        held = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
        held["ids"] = np.arange(3)
        kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in held.items()}
        write_shards(tmp_path, kinds, held.__getitem__)
        read = load_file(tmp_path / "model.safetensors")
        assert read.keys() == held.keys()
        for name, tensor in held.items():
            assert read[name].dtype == tensor.dtype
            np.testing.assert_array_equal(read[name], tensor)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_adapters_of_experts_merge_as_the_models_that_they_make(family, tmp_path):
    """A mean of two adapters is that of the two models with each merged into every expert."""
    model, params = tiny_family(family)
    base = save_pretrained(tmp_path / "base", model, params)
    rng, parts = np.random.default_rng(3), []
    for name in ("x", "y"):
        adapted = model.clone(lora=LoRA(2, 6.0, 0.0, ("all-linear",)))
        adapters = init_adapters(jax.random.key(1), params, adapted.lora)
        adapters = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), adapters)
        tree = joined(adapters, {"base": params})
        save_adapter(tmp_path / name, adapted, tree, str(base))
        parts.append(load_merged(tmp_path / name)[1])
    run(tmp_path, "x y", tmp_path / "m", weights=[0.25, 0.75])
    _, merged = load_pretrained(tmp_path / "m")
    expected = jax.tree.map(lambda a, b: 0.25 * a + 0.75 * b, *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), merged, expected)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), merged, params)
    experts = [v for path, v in flatten_dict(moved).items() if path[-1].endswith("_proj")]
    assert experts and min(experts) > 0.1


def test_an_adapter_of_embeddings_merges_as_the_model_that_it_makes(tmp_path):
    model, params = tiny_family("llama-biases")
    base = save_pretrained(tmp_path / "base", model, params)
    adapted = model.clone(lora=LoRA(2, 6.0, 0.0, ("embed_tokens", "q_proj")))
    adapters = init_adapters(jax.random.key(1), params, adapted.lora)
    adapters = jax.tree.map(lambda a: a + 0.1, adapters)
    save_adapter(tmp_path / "x", adapted, joined(adapters, {"base": params}), str(base))
    run(tmp_path, "x base", tmp_path / "m", weights=[0.5, 0.5])
    _, whole = load_merged(tmp_path / "x")
    expected = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, whole, params)
    _, merged = load_pretrained(tmp_path / "m")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), merged, expected)
    assert float(np.abs(merged["embed_tokens"] - params["embed_tokens"]).max()) > 0.01
