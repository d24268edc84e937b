"""The text part of a model of images and text is trained; all other tensors stay as they are."""

import json
import types
from typing import NamedTuple

import numpy as np
import pytest
from families import IDS, config_of, fields_of, logits_of, tiny_family

from relax.engine.model_source import ModelSource
from relax.errors import ModelLoadError
from relax.models import load_pretrained, read_pretrained_config, save_pretrained
from relax.models.huggingface.text_parts import INNER
from relax.tools.plan.plan import read_shape

PROCESSOR = '{"patch_size": 2}\n'
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_heads": 2,
    "out_hidden_size": 36,
    "patch_size": 2,
    "num_position_embeddings": 4,
}
SIGLIP = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
TOWER = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "patch_size": 2,
    "position_embedding_size": 4,
}
AUDIO = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [4, 4],
    "output_proj_dims": 6,
}


class Mixed(NamedTuple):
    """A tiny model of images and text.

    Attributes:
      text: the row of its text part.
      name: of its classes in transformers.
      parts: settings of everything else.
      extra: a tensor of its files that transformers' model has not: name, shape and dtype.
      layers: what stands before the layers in the names of its files.
    """

    text: str
    name: str
    parts: dict
    extra: tuple[str, tuple[int, ...], str]
    layers: str


MIXED = {
    "qwen3_5": Mixed(
        "qwen3_5_text",
        "Qwen3_5",
        {"vision_config": QWEN_VISION},
        ("mtp.fc.weight", (4, 6), "bfloat16"),  # of a layer that predicts further tokens
        "model.language_model.layers",
    ),
    "gemma3": Mixed(
        "gemma3_text",
        "Gemma3",
        {"vision_config": SIGLIP, "mm_tokens_per_image": 1},
        ("another.weight", (3,), "int64"),
        "language_model.model.layers",
    ),
    "gemma4": Mixed(
        "gemma4_text",
        "Gemma4",
        {"vision_config": TOWER, "audio_config": AUDIO},
        # Of a layer with the keys and values of another, as in the files of Gemma 4 E2B.
        ("model.language_model.layers.4.self_attn.k_proj.weight", (32, 36), "bfloat16"),
        "model.language_model.layers",
    ),
}


@pytest.fixture(scope="module", params=MIXED)
def whole(request, tmp_path_factory):
    """The model's directory, with a tensor that no part of transformers' model reads."""
    torch = pytest.importorskip("torch")
    import transformers
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    mixed = MIXED[request.param]
    text = fields_of(mixed.text) | {"pad_token_id": 0}
    config = getattr(transformers, f"{mixed.name}Config")(text_config=text, **mixed.parts)
    kind = getattr(transformers, f"{mixed.name}ForConditionalGeneration")
    theirs = kind(config).eval()
    path = tmp_path_factory.mktemp("whole")
    theirs.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    name, shape, dtype = mixed.extra
    tensors[name] = torch.ones(shape).to(getattr(torch, dtype))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "preprocessor_config.json").write_text(PROCESSOR)
    return types.SimpleNamespace(
        path=path,
        theirs=theirs,
        names=set(tensors),
        kind=kind,
        extra=name,
        text=mixed.text,
        layers=mixed.layers,
    )


def bytes_of(path) -> dict[str, bytes]:
    from safetensors.numpy import load_file

    tensors = load_file(path / "model.safetensors")
    return {name: array.dtype.name.encode() + array.tobytes() for name, array in tensors.items()}


def test_the_text_part_computes_what_transformers_computes(whole):
    model, params = load_pretrained(whole.path)
    assert model.config == config_of(whole.text) == read_shape(str(whole.path / "config.json"))
    ours = model.apply({"params": params}, IDS[:1])
    np.testing.assert_allclose(ours, logits_of(whole.theirs, IDS[:1]), atol=2e-5)


def test_everything_else_is_saved_byte_for_byte(whole, tmp_path):
    model, params = load_pretrained(whole.path)
    params["layers_1"]["q_proj"]["kernel"] += 0.5
    assert ModelSource.find(str(whole.path)).surroundings == whole.path
    path = save_pretrained(tmp_path / "saved", model, params, beside=whole.path)
    before, after = bytes_of(whole.path), bytes_of(path)
    changed = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys() == whole.names
    assert changed == {f"{whole.layers}.1.self_attn.q_proj.weight"}
    assert (path / "preprocessor_config.json").read_text() == PROCESSOR
    back, report = whole.kind.from_pretrained(path, output_loading_info=True)
    assert {*report.pop("unexpected_keys")} <= {whole.extra}
    assert not any(report.values()), report
    ours = model.apply({"params": params}, IDS[:1])
    np.testing.assert_allclose(ours, logits_of(back, IDS[:1]), atol=2e-5)


def test_a_text_part_can_be_saved_alone(whole, tmp_path):
    model, params = load_pretrained(whole.path)
    path = save_pretrained(tmp_path / "alone", model, params)
    assert read_pretrained_config(path) == model.config
    assert ModelSource.find(str(path)).surroundings is None
    others = ("language_model", "visual", "vision", "audio", "projector", "another")
    assert not any(other in name for name in bytes_of(path) for other in others)


@pytest.fixture
def directory(tmp_path):
    """The text part alone, under the names of a model of images and text; made without torch."""
    from safetensors.numpy import load_file, save_file

    path = save_pretrained(tmp_path / "model", *tiny_family("qwen3_5_text"))
    tensors = load_file(path / "model.safetensors")
    save_file(
        {INNER[1].in_file(name): tensor for name, tensor in tensors.items()} | {"other": IDS},
        path / "model.safetensors",
    )
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": fields}))
    return path


def test_names_of_older_files_are_read_and_kept(directory, tmp_path):
    model, params = load_pretrained(directory)
    assert model.config == config_of("qwen3_5_text")
    path = save_pretrained(tmp_path / "saved", model, params, beside=directory)
    assert bytes_of(path) == bytes_of(directory)


def test_a_model_of_another_size_is_not_saved_beside_it(directory, tmp_path):
    model, params = tiny_family("qwen3_5_text-interval")
    with pytest.raises(ValueError, match="must hold a model of images and text whose text part"):
        save_pretrained(tmp_path / "saved", model, params, beside=directory)


def test_a_directory_without_its_text_part_is_refused(directory):
    from safetensors.numpy import save_file

    save_file({"other": IDS}, directory / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"no embeddings of a text model, model\.language"):
        load_pretrained(directory)
    (directory / "config.json").write_text('{"model_type": "qwen3_5"}')
    with pytest.raises(ModelLoadError, match="text_config must be an object, got None"):
        load_pretrained(directory)
