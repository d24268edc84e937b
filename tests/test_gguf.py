"""A GGUF file is converted to the Hugging Face directory that it was made from."""

import json
import math
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from relax.config import create_default_config
from relax.data import load_tokenizer
from relax.engine.model_source import ModelSource, make_model
from relax.errors import ModelLoadError
from relax.models import (
    RopeScaling,
    Transformer,
    load_pretrained,
    read_generation_config,
    read_pretrained_config,
    save_pretrained,
)
from relax.models.families import family_of
from relax.tools.gguf.convert import convert_gguf, read_gguf_config
from relax.tools.gguf.program import main as gguf_program

gguf = pytest.importorskip("gguf")

from tests import gguf_files  # noqa: E402
from tests.gguf_files import CASES, SIZES  # noqa: E402

EMBEDDING = {"token_embd.weight": np.zeros((61, 64), np.float32)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`architecture -> (directory, tensors by llama.cpp's names)` of a random model."""
    known = {}

    def make(architecture: str):
        if architecture not in known:
            fields = CASES[architecture][0]
            config = family_of(fields["model_type"]).from_hugging_face(dict(fields))
            model = Transformer(config)
            shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
            rng = np.random.default_rng(0)
            params = jax.tree.map(
                lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), leaf.dtype), shapes
            )["params"]
            directory = tmp_path_factory.mktemp(architecture) / "model"
            save_pretrained(directory, model, params)
            tensors = load_file(directory / "model.safetensors")
            known[architecture] = directory, gguf_files.convert(architecture, tensors)
        return known[architecture]

    return make


def convert(file: Path, dtype="float32") -> Path:
    """The directory that a file is converted to."""
    directory = file.with_suffix("")
    convert_gguf(file, directory, dtype)
    return directory


def load(file: Path):
    return load_pretrained(convert(file))


def write(path: Path, made, architecture: str, kind: str = "F32", **metadata) -> Path:
    tensors = made(architecture)[1]
    return gguf_files.write(path, architecture, CASES[architecture][1] | metadata, tensors, kind)


def refusal(path, read=convert) -> str:
    with pytest.raises(ModelLoadError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize("architecture", CASES)
def test_a_file_loads_as_the_directory_that_it_was_made_from(tmp_path, made, architecture):
    """Same sizes and same parameters, so the same logits."""
    file = write(tmp_path / "model.gguf", made, architecture)
    model, params = load(file)
    expected_model, expected = load_pretrained(made(architecture)[0])
    assert model.config == expected_model.config
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), params, expected)


@pytest.mark.parametrize("architecture", [name for name in CASES if name != "qwen3moe"])
def test_the_logits_of_a_file_equal_those_of_transformers(tmp_path, made, architecture):
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")  # transformers reads no GGUF file without
    from transformers import AutoModelForCausalLM

    file = write(tmp_path / "model.gguf", made, architecture)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = np.random.default_rng(1).integers(0, 61, (2, 11))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    model, params = load(file)
    logits = jax.jit(model.apply)({"params": params}, ids)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_matrices_are_what_the_gguf_package_dequantises(tmp_path, made, kind):
    directory, tensors = made("qwen2")
    _, params = load(write(tmp_path / "model.gguf", made, "qwen2", kind))
    _, exact = load_pretrained(directory)
    kind = gguf.GGMLQuantizationType[kind]
    for module, name in {"q_proj": "attn_q", "down_proj": "ffn_down"}.items():
        matrix = tensors[f"blk.1.{name}.weight"]
        expected = gguf.dequantize(gguf.quantize(matrix, kind), kind)
        np.testing.assert_array_equal(params["layers_1"][module]["kernel"], expected.T)
        assert 0 < np.abs(expected - matrix).max() < 0.1
    np.testing.assert_array_equal(params["norm"]["scale"], exact["norm"]["scale"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tensors_are_written_in_the_asked_dtype(tmp_path, made, dtype):
    directory = convert(write(tmp_path / "model.gguf", made, "llama", "Q8_0"), dtype)
    tensors = load_file(directory / "model.safetensors")
    assert {tensor.dtype.name for tensor in tensors.values()} == {dtype}
    assert json.loads((directory / "config.json").read_text())["dtype"] == dtype
    exact = load_file(
        convert(write(tmp_path / "b.gguf", made, "llama", "Q8_0")) / "model.safetensors"
    )
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, exact[name].astype(tensor.dtype))


def test_without_an_output_matrix_the_embedding_is_it(tmp_path, made):
    model, _ = load(write(tmp_path / "a.gguf", made, "llama"))
    assert not model.config.tie_word_embeddings
    model, params = load(write(tmp_path / "b.gguf", made, "qwen2"))
    assert model.config.tie_word_embeddings and "lm_head" not in params


def sizes(path, architecture="llama", tensors=EMBEDDING, **metadata):
    metadata = {key.replace("__", "."): value for key, value in metadata.items()}
    given = {k: v for k, v in (CASES[architecture][1] | metadata).items() if v is not None}
    return read_gguf_config(gguf_files.write(path, architecture, given, tensors))


def rope_factors(theta, size, factor, low=1.0, high=4.0, original=8192):
    """What each frequency of a Llama 3.1 to 3.3 is divided by, as its paper's code has it."""
    factors = []
    for i in range(size // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / size)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            share = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - share) / factor + share))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_factors_of_llama_3_are_told_as_its_scaling(tmp_path, factor):
    settings = {"attention__key_length": 64, "rope__dimension_count": 64, "rope__freq_base": 5e5}
    held = {"rope_freqs.weight": rope_factors(5e5, 64, factor)}
    config = sizes(tmp_path / "a.gguf", tensors=EMBEDDING | held, **settings)
    assert config.rope_scaling == RopeScaling("llama3", factor)


def test_factors_of_one_are_none_and_others_are_refused(tmp_path):
    held = {"rope_freqs.weight": np.ones(8, np.float32)}
    assert sizes(tmp_path / "a.gguf", tensors=EMBEDDING | held).rope_scaling is None
    held["rope_freqs.weight"][3] = 2.0
    with pytest.raises(ModelLoadError, match="rope_freqs.weight holds factors that are not those"):
        sizes(tmp_path / "b.gguf", tensors=EMBEDDING | held)


def test_linear_and_yarn_scaling_are_read(tmp_path):
    scaling = {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}
    assert sizes(tmp_path / "a.gguf", **scaling).rope_scaling == RopeScaling("linear", 4.0)
    scaling = scaling | {"rope__scaling__type": "yarn"}
    config = sizes(tmp_path / "b.gguf", rope__scaling__original_context_length=32, **scaling)
    assert (config.rope_scaling.kind, config.rope_scaling.factor) == ("yarn", 4.0)
    assert config.rope_scaling.original_max_position_embeddings == 32


def test_the_scaling_of_gemma_3_is_of_its_full_layers_alone(tmp_path):
    scaling = {"rope__scaling__type": "linear", "rope__scaling__factor": 8.0}
    layers = sizes(tmp_path / "a.gguf", "gemma3", **scaling).layers
    assert [layer.window for layer in layers] == [5, 5, 5, 5, 5, None]
    assert layers[5].rope.scaling == RopeScaling("linear", 8.0)
    assert (layers[0].rope.theta, layers[0].rope.scaling) == (10000.0, None)


def test_the_period_and_the_local_base_of_gemma_3_are_the_file_s_where_it_has_them(tmp_path):
    own = {"attention__sliding_window_pattern": 2, "rope__freq_base_swa": 77.0}
    layers = sizes(tmp_path / "a.gguf", "gemma3", **own).layers
    assert [layer.window for layer in layers] == [5, None, 5, None, 5, None]
    assert layers[0].rope.theta == 77.0
    layers = sizes(tmp_path / "b.gguf", "gemma3", attention__sliding_window=None).layers
    assert [layer.window for layer in layers] == [None] * 6


@pytest.mark.parametrize(("architecture", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemma_scales_queries_by_width_over_heads(tmp_path, architecture, layers):
    config = sizes(tmp_path / "a.gguf", architecture, block_count=layers)
    assert config.attention_multiplier == pytest.approx((64 / 4) ** -0.5)
    config = sizes(tmp_path / "b.gguf", architecture, block_count=layers - 1)
    assert config.attention_multiplier == pytest.approx(256**-0.5)


def test_gemma_2_has_llama_cpp_s_defaults_where_an_old_file_has_none(tmp_path):
    names = ("attention__sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
    config = sizes(tmp_path / "a.gguf", "gemma2", **dict.fromkeys(names))
    assert config.sliding_window == 4096
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)


def test_all_tokens_that_end_a_turn_are_in_the_generation_config(tmp_path, made):
    ids = {"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.eot_token_id": 5}
    directory = convert(write(tmp_path / "a.gguf", made, "llama", **ids))
    assert read_generation_config(directory) == {"eos_token_id": [1, 5]}


def test_a_gguf_file_is_refused_by_every_loader_with_the_command_that_converts_it(tmp_path, made):
    file = write(tmp_path / "a.gguf", made, "llama")
    readers = (load_pretrained, read_pretrained_config, read_generation_config, load_tokenizer)
    for path in (file, tmp_path / "absent.GGUF"):
        for read in readers:
            assert f"convert it with `relax gguf {path} DIR`" in refusal(path, read)


@pytest.mark.parametrize(
    ("metadata", "told"),
    {
        "attention.clamp_kqv": ({"attention.clamp_kqv": 8.0}, "attention.clamp_kqv = 8.0"),
        "experts": ({"expert_count": 8}, "expert_count = 8"),
        "window": ({"attention.sliding_window": 7}, "attention.sliding_window = 7"),
        "no size": ({"embedding_length": None}, "embedding_length must be a size, got None"),
        "no number": ({"block_count": "two"}, "block_count must be a size, got 'two'"),
        "per layer": ({"feed_forward_length": [3, 4]}, "feed_forward_length must be a size"),
        "theta": ({"rope.freq_base": -1.0}, "rope.freq_base must be above 0, got -1.0"),
        "partial": ({"rope.dimension_count": 8}, "rope.dimension_count is 8"),
        "values": ({"attention.value_length": 3}, "attention.value_length is 3"),
        "scaling": ({"rope.scaling.type": "longrope"}, "rope.scaling.type is 'longrope'"),
        "attention factor": ({"rope.scaling.attn_factor": 2.0}, "rope.scaling.attn_factor"),
        "adapter": ({"general.type": "adapter"}, "general.type is 'adapter'"),
        "split": ({"split.count": 3}, "split.count is 3"),
    }.values(),
)  # fmt: skip
def test_metadata_that_asks_for_something_else_is_refused_by_name(tmp_path, metadata, told):
    given = {key: value for key, value in (SIZES | metadata).items() if value is not None}
    file = gguf_files.write(tmp_path / "a.gguf", "llama", given, EMBEDDING)
    assert told in refusal(file, read_gguf_config)


def test_a_period_of_gemma_that_is_no_count_is_refused(tmp_path):
    with pytest.raises(ModelLoadError, match="sliding_window_pattern must be a count, got 0"):
        sizes(tmp_path / "a.gguf", "gemma3", attention__sliding_window_pattern=0)


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path):
    file = gguf_files.write(tmp_path / "a.gguf", "mamba", {}, EMBEDDING)
    message = refusal(file)
    assert "general.architecture is 'mamba'" in message and "gemma3, llama, qwen2" in message


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"blk.1.attn_k.weight": None}, "model.layers.1.self_attn.k_proj.weight is missing"),
        ({"token_embd.weight": None}, "token_embd.weight is missing"),
        ({"blk.0.attn_qkv.weight": np.zeros((2, 2))}, "blk.0.attn_qkv.weight is not in the arch"),
        ({"blk.9.attn_q.weight": np.zeros((2, 2))}, "blk.9.attn_q.weight is not in the arch"),
        ({"output_norm.weight": np.zeros(3)}, "output_norm.weight has shape (3,), expected (64,)"),
    ],
)
def test_missing_extra_and_misshapen_tensors_are_refused_by_name(tmp_path, made, change, told):
    tensors = made("llama")[1] | {k: v if v is None else v.astype("f4") for k, v in change.items()}
    tensors = {name: array for name, array in tensors.items() if array is not None}
    file = gguf_files.write(tmp_path / "a.gguf", "llama", CASES["llama"][1], tensors)
    assert told in refusal(file)


def test_what_is_no_gguf_file_is_refused(tmp_path):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGML" + bytes(100))
    assert "no GGUF file: it must begin with b'GGUF', got b'GGML'" in refusal(file)
    file.write_bytes(b"")
    assert "no GGUF file" in refusal(file)
    assert "No such file" in refusal(tmp_path / "absent.gguf")
    file.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(100))
    assert "its version is 1" in refusal(file)


def test_a_file_that_ends_early_is_refused_wherever_it_ends(tmp_path, made):
    words = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.scores": [0.5, 1.5]}
    data = write(tmp_path / "whole.gguf", made, "llama", **words).read_bytes()
    header = data.index(b"output_norm") + 200
    cut = tmp_path / "cut.gguf"
    for end in [*range(4, header, 7), len(data) - 4096, len(data) - 32]:
        cut.write_bytes(data[:end])
        assert "not readable as a GGUF file" in refusal(cut), end


def test_a_length_that_no_file_has_is_refused(tmp_path):
    """One key of 2^63 bytes; a count of entries, or of tensors, that never ends."""
    head = b"GGUF" + (3).to_bytes(4, "little")
    file = tmp_path / "a.gguf"
    many = (2**63).to_bytes(8, "little")
    for rest in (bytes(8) + (1).to_bytes(8, "little") + many, bytes(8) + many, many + bytes(8)):
        file.write_bytes(head + rest + bytes(64))
        refusal(file)


def test_a_type_of_tensor_that_the_package_does_not_know_is_refused(tmp_path, made):
    file = write(tmp_path / "a.gguf", made, "llama")
    data = bytearray(file.read_bytes())
    name = b"blk.0.attn_q.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # after the number of axes and the axes
    assert data[at : at + 4] == bytes(4)
    data[at] = 99
    file.write_bytes(data)
    assert "'blk.0.attn_q.weight' is of type 99" in refusal(file)
    data[at] = gguf.GGMLQuantizationType.I32
    file.write_bytes(data)
    assert "blk.0.attn_q.weight is of type I32, which the gguf package cannot" in refusal(file)


def test_without_the_gguf_package_its_extra_is_named(tmp_path, made, monkeypatch):
    file = write(tmp_path / "a.gguf", made, "llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'relax-trainers[gguf]'" in refusal(file)


def test_the_program_writes_a_directory_that_a_run_begins_with(tmp_path, made, capsys):
    tokens = [*"abcdefghijklmnopqrstuvwxyz", *(f"<{i}>" for i in range(35))]
    words = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 26 + [3] * 35,
        "tokenizer.ggml.eos_token_id": 60,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}<34>",
    }
    file, directory = write(tmp_path / "model.gguf", made, "gemma3", **words), tmp_path / "out"
    assert gguf_program([str(file), str(directory)]) == 0
    assert capsys.readouterr().out == f"the model is in '{directory}'\n"
    config = create_default_config(str(directory), max_steps=1)
    source = ModelSource.find(config.model.model_name_or_path)
    tokenizer, (_, params) = source.tokenizer(), make_model(source, config, weights=True)
    expected = load_pretrained(made("gemma3")[0])[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), params, expected)
    assert tokenizer("abz<34>")["input_ids"] == [0, 1, 25, 60]
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<34>", 60)
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}<34>"


def test_the_program_says_that_a_file_holds_no_tokenizer(tmp_path, made, capsys):
    file = write(tmp_path / "model.gguf", made, "llama")
    assert gguf_program([str(file), str(tmp_path / "out")]) == 0
    assert "has no tokenizer" in capsys.readouterr().out


def test_the_program_refuses_in_one_line_and_leaves_nothing_behind(tmp_path, made, capsys):
    file = write(tmp_path / "model.gguf", made, "llama", **{"attention.clamp_kqv": 8.0})
    assert gguf_program([str(file), str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert os.listdir(tmp_path) == ["model.gguf"]


PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea,",
)
REAL = ("RELAX_SMOLLM2_GGUF", "RELAX_GEMMA3_GGUF")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variable", REAL)
def test_a_real_file_gives_the_logits_and_the_greedy_text_of_transformers(tmp_path, variable):
    """64 tokens after each prompt, and logits beyond the window of Gemma 3, 512 tokens."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if variable not in os.environ:
        pytest.skip(f"{variable} names no file")
    file = Path(os.environ[variable])
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    convert_gguf(file, tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    model, params = load_pretrained(tmp_path / "model")
    apply = jax.jit(model.apply)
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        assert ids == their_tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            told = theirs.generate(
                torch.tensor([ids]), max_new_tokens=64, do_sample=False, eos_token_id=None
            )
            expected = theirs(told).logits[0].numpy()
        logits = np.asarray(apply({"params": params}, told.numpy()))[0]
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3)
        # Each greedy choice, given those before it, so the same text.
        assert (logits[len(ids) - 1 : -1].argmax(-1) == told[0, len(ids) :].numpy()).all()
    ids = np.array(
        [tokenizer("\n".join(f"{i}. {p}" for i in range(50) for p in PROMPTS))["input_ids"]]
    )
    ids = ids[:, :700]
    assert ids.shape[1] == 700
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(apply({"params": params}, ids), expected, rtol=0, atol=1e-3)
