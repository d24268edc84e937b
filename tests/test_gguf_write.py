"""`relax export`: a GGUF file holds what llama.cpp's converter writes, and reads back the same.

The entries and names that are spelt out here were compared with those of llama.cpp's own converter
on directories like these.
"""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from relax.errors import ConfigError, ModelLoadError, RelaxError
from relax.models import Transformer, load_pretrained, save_pretrained
from relax.models.config import LoRA
from relax.models.families import family_of
from relax.models.huggingface.peft import load_merged
from relax.models.huggingface.peft_save import save_adapter
from relax.models.lora import init_adapters
from relax.models.trainable import merge as joined
from relax.tools.export.config import ExportConfig
from relax.tools.export.export import export
from relax.tools.gguf.convert import convert_gguf
from relax.tools.gguf.tokenizer import WORDS, splitter
from relax.tools.gguf.tokenizer_write import PROBES

gguf = pytest.importorskip("gguf")

from tests import gguf_files  # noqa: E402

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}
YARN = {
    **{"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0},
    "original_max_position_embeddings": 64,
}
# Name -> model_type, way of splitting words, fields of config.json.
CASES = {
    "llama": ("llama", "smollm", {"tie_word_embeddings": True, "rope_theta": 500.0}),
    "llama3": ("llama", "llama-bpe", {"rope_parameters": LLAMA3}),
    "qwen2": ("qwen2", "qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", "qwen2", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma3": (
        "gemma3_text",
        "gpt-2",
        {"num_hidden_layers": 6, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8},
    ),
}


def byte_level_tokenizer(rule: str, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 300 tokens and a few added ones, with one of the rules."""
    words = WORDS[rule]
    tokenizer = Tokenizer(models.BPE(ignore_merges=words.whole))
    normalizer, tokenizer.pre_tokenizer = splitter(words)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROBES * 3, trainer)
    tokenizer.add_tokens(["<think>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A",
            pair="<|endoftext|> $A <|endoftext|>:1 $B:1",
            special_tokens=[("<|endoftext|>", 0)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template="{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`case -> directory` of a random model."""
    path, known = tmp_path_factory.mktemp("models"), {}

    def make(case: str):
        if case not in known:
            model_type, rule, fields = CASES[case]
            fields = SIZES | fields | {"model_type": model_type}
            model = Transformer(family_of(model_type).from_hugging_face(fields))
            shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
            rng = np.random.default_rng(0)
            params = jax.tree.map(
                lambda leaf: (0.2 * rng.normal(size=leaf.shape)).astype(np.float32), shapes
            )["params"]
            tokenizer = byte_level_tokenizer(rule, bos=case == "llama3")
            known[case] = save_pretrained(path / case, model, params, tokenizer)
        return known[case]

    return make


def write(directory, path, **options):
    """The file that a directory is exported to, and the notes."""
    config = ExportConfig().replace(
        model_name_or_path=str(directory), output_file=str(path), **options
    )
    config.check()
    return export(config)


def entries(path) -> dict:
    fields = gguf.GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if "GGUF." not in name}


@pytest.mark.parametrize("case", CASES)
def test_a_file_reads_back_as_the_directory(made, tmp_path, case):
    """Same configuration, tokens and chat template; parameters as float16 holds them."""
    path, notes = write(made(case), tmp_path / "model.gguf")
    assert notes == [] and [file.name for file in tmp_path.iterdir()] == ["model.gguf"]
    assert convert_gguf(path, tmp_path / "back")
    (model, params), (theirs, expected) = map(load_pretrained, (tmp_path / "back", made(case)))
    assert model.config.layers == theirs.config.layers
    assert model.config.vocab_size == theirs.config.vocab_size == 320
    assert model.config.tie_word_embeddings == theirs.config.tie_word_embeddings
    jax.tree.map(
        lambda ours, exact: np.testing.assert_allclose(ours, exact, rtol=2**-11, atol=1e-6),
        params,
        expected,
    )
    ours, theirs = (
        PreTrainedTokenizerFast.from_pretrained(d) for d in (tmp_path / "back", made(case))
    )
    assert [ours(text)["input_ids"] for text in PROBES] == [
        theirs(text)["input_ids"] for text in PROBES
    ]
    assert ours.chat_template == theirs.chat_template


def test_the_entries_are_those_of_the_converter(made, tmp_path):
    """Word for word what convert_hf_to_gguf.py of llama.cpp wrote for such a directory."""
    path, _ = write(made("llama"), tmp_path / "model.gguf", type="bf16")
    found = entries(path)
    tokens, types = (found.pop(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    assert len(tokens) == 320 and tokens[300:302] == ["<think>", "[PAD301]"]
    assert types[:4] == [3, 3, 3, 1] and types[299:302] == [1, 4, 5]
    assert found.pop("tokenizer.ggml.merges")[0].count(" ") == 1
    assert found.pop("llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    assert found.pop("tokenizer.chat_template").startswith("{% for m in messages %}")
    assert found == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "Llama",
        "general.size_label": "82K",
        "general.file_type": 32,
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.freq_base": 500.0,
        "llama.rope.dimension_count": 16,
        "llama.vocab_size": 320,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
def test_matrices_are_what_the_gguf_package_quantises(made, tmp_path, kind):
    """In the rows' order of llama.cpp; vectors stay float32."""
    path, _ = write(made("llama"), tmp_path / "model.gguf", type=kind)
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    matrices = load_file(made("llama") / "model.safetensors")
    query = gguf_files.interleave(matrices["model.layers.1.self_attn.q_proj.weight"], 4)
    key = gguf_files.interleave(matrices["model.layers.1.self_attn.k_proj.weight"], 2)
    down = matrices["model.layers.1.mlp.down_proj.weight"]
    type_ = gguf.GGMLQuantizationType[kind.upper()]
    for name, matrix in (("attn_q", query), ("attn_k", key), ("ffn_down", down)):
        tensor = held[f"blk.1.{name}.weight"]
        assert tensor.tensor_type == type_
        np.testing.assert_array_equal(tensor.data, gguf.quantize(matrix, type_))
    norm = held["blk.1.attn_norm.weight"]
    np.testing.assert_array_equal(norm.data, matrices["model.layers.1.input_layernorm.weight"])
    assert "output.weight" not in held  # tied


def test_an_adapter_is_merged(made, tmp_path):
    model, params = load_pretrained(made("qwen3"))
    model = model.clone(lora=LoRA(2, 8.0, 0.0, ("q_proj",)))
    adapters = init_adapters(jax.random.key(0), params, model.lora)
    adapters = jax.tree.map(lambda a: jnp.full_like(a, 0.1), adapters)
    tree = joined(adapters, {"base": params})
    save_adapter(tmp_path / "adapter", model, tree, str(made("qwen3")))
    path, _ = write(tmp_path / "adapter", tmp_path / "model.gguf")
    convert_gguf(path, tmp_path / "back")
    ours = load_pretrained(tmp_path / "back")[1]["layers_0"]["q_proj"]["kernel"]
    exact = load_merged(tmp_path / "adapter")[1]["layers_0"]["q_proj"]["kernel"]
    np.testing.assert_allclose(ours, exact, rtol=2**-11, atol=1e-6)
    assert np.abs(exact - params["layers_0"]["q_proj"]["kernel"]).max() > 0.05


def changed(directory, path, **fields):
    """A copy of a directory with other fields in its config.json; None: without the field."""
    shutil.copytree(directory, path)
    config = json.loads((path / "config.json").read_text()) | fields
    kept = {name: value for name, value in config.items() if value is not None}
    (path / "config.json").write_text(json.dumps(kept))
    return path


MISTRAL = {"model_type": "mistral", "attention_bias": None, "mlp_bias": None}
OTHER_YARN = {"rope_parameters": YARN | {"attention_factor": 1.5}, "rope_scaling": None}


@pytest.mark.parametrize(
    ("case", "fields", "words"),
    [
        ("llama", MISTRAL, "is a mistral model, which is not written as GGUF; llama, qwen2, "),
        ("qwen2", OTHER_YARN | {"rope_theta": None}, "layer 0 is"),
        ("gemma3", {"query_pre_attn_scalar": 20}, "attention_multiplier is"),
        ("gemma3", {"layer_types": ["full_attention", *["sliding_attention"] * 5]}, "layer 0 is"),
    ],
)
def test_a_model_that_the_file_would_change_is_refused(made, tmp_path, case, fields, words):
    directory = changed(made(case), tmp_path / "model", **fields)
    with pytest.raises(ModelLoadError, match=words) as caught:
        write(directory, tmp_path / "model.gguf")
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_numbers_that_float32_holds_are_written_in_whatever_digits_they_come(made, tmp_path):
    """As a directory has them that was made from a GGUF file."""
    directory = changed(made("llama"), tmp_path / "model", rms_norm_eps=9.999999747378752e-06)
    write(directory, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["llama.attention.layer_norm_rms_epsilon"].contents() == np.float32(1e-5)


def test_a_tokenizer_that_has_no_name_is_refused(made, tmp_path):
    shutil.copytree(made("gemma3"), tmp_path / "model")  # splits as GPT-2
    file = tmp_path / "model" / "tokenizer.json"
    fields = json.loads(file.read_text())
    fields["pre_tokenizer"]["pretokenizers"][0]["add_prefix_space"] = True
    file.write_text(json.dumps(fields))
    with pytest.raises(ModelLoadError, match="in a way that has no name here"):
        write(tmp_path / "model", tmp_path / "model.gguf")


def test_rows_that_do_not_divide_into_blocks_are_float16_and_told(made, tmp_path):
    model, params = load_pretrained(made("llama"))
    config = family_of("llama").from_hugging_face(
        SIZES | {"model_type": "llama", "intermediate_size": 40, "num_hidden_layers": 1}
    )
    model = Transformer(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    save_pretrained(tmp_path / "model", model, params)
    path, notes = write(tmp_path / "model", tmp_path / "model.gguf", type="q8_0")
    assert notes == [
        "rows of model.layers.0.mlp.down_proj.weight do not divide into blocks of 32: written as "
        "float16"
    ]
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_up.weight"] == "Q8_0"
    params["layers_0"]["up_proj"]["kernel"][0, 0] = 1e5
    save_pretrained(tmp_path / "model", model, params)
    with pytest.raises(RelaxError, match="up to 1e.05, too large for float16; choose --type bf16"):
        write(tmp_path / "model", tmp_path / "other.gguf")
    assert not (tmp_path / "other.gguf").exists()


def test_the_file_is_beside_its_directory_unless_named(made, tmp_path):
    directory = changed(made("llama"), tmp_path / "final")
    path, _ = export(ExportConfig().replace(model_name_or_path=str(directory), type="q8_0"))
    assert path == tmp_path / "final-q8_0.gguf" and path.is_file()
    with pytest.raises(ConfigError, match="output_file must be in a directory that exists"):
        write(directory, tmp_path / "none" / "model.gguf")


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """BPE in SentencePiece's form: a space before a text, unknown characters as bytes."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    texts = [f"\u2581{text.replace(' ', chr(0x2581))}" for text in PROBES]
    words = [part for text in texts for part in re.findall("\u2581+[^\u2581\\s]*|\\s+", text)]
    trainer = trainers.BpeTrainer(
        vocab_size=440, special_tokens=special, limit_alphabet=90, show_progress=False
    )
    tokenizer.pre_tokenizer = None
    normalizer, tokenizer.normalizer = tokenizer.normalizer, None
    tokenizer.train_from_iterator([*words, *words], trainer)
    fields = json.loads(tokenizer.to_str())
    # Bytes are tokens of the model; only the first three are special.
    fields["added_tokens"] = fields["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(fields))
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def in_sentencepiece_form(tmp_path_factory):
    """The directory of a model with such a tokenizer, and the file that it is exported to."""
    path, tokenizer = tmp_path_factory.mktemp("pieces"), sentencepiece_tokenizer()
    fields = SIZES | {"model_type": "llama", "vocab_size": len(tokenizer), "num_hidden_layers": 1}
    model = Transformer(family_of("llama").from_hugging_face(fields))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    directory = save_pretrained(path / "model", model, params, tokenizer)
    return directory, write(directory, path / "model.gguf")[0]


def test_a_tokenizer_in_sentencepieces_form_gets_scores_and_reads_back(
    in_sentencepiece_form, tmp_path
):
    directory, file = in_sentencepiece_form
    found, tokenizer = entries(file), sentencepiece_tokenizer()
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("llama", "default")
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "<0x00>"] and types[:4] == [2, 3, 3, 6]
    assert types[258] == 6 and set(types[259:]) == {1}
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    scores = dict(zip(tokens, found["tokenizer.ggml.scores"], strict=True))
    assert [scores["".join(merge)] for merge in merges[:3]] == [0.0, -1.0, -2.0]
    assert "tokenizer.ggml.merges" not in found
    assert found["tokenizer.ggml.add_space_prefix"] is True
    assert convert_gguf(file, tmp_path / "back")
    back = PreTrainedTokenizerFast.from_pretrained(tmp_path / "back")
    for text in (*PROBES, "\u4eca\u65e5 1", ""):
        assert back(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_sentencepiece_gives_the_same_tokens_from_the_scores(in_sentencepiece_form):
    """With its own program, from the tokens, scores and types of the file."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pb = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    found, tokenizer = entries(in_sentencepiece_form[1]), sentencepiece_tokenizer()
    proto = pb.ModelProto()
    proto.trainer_spec.model_type = 2  # BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.remove_extra_whitespaces = False
    columns = (found[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    for piece, score, kind in zip(*columns, strict=True):
        proto.pieces.add(piece=piece, score=score, type=kind)
    own = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    for text in PROBES:
        assert [1, *own.encode(text)] == tokenizer(text)["input_ids"]
