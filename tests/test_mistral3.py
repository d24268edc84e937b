"""The text part of `mistral3` directories, under all names that transformers gives its tensors."""

import json

import numpy as np
import pytest
from families import IDS, config_of, fields_of, logits_of
from safetensors.numpy import load_file, save_file

from relax.errors import ModelLoadError
from relax.models import load_pretrained, read_pretrained_config, save_pretrained
from relax.tools.plan.plan import read_shape

VISION = {
    "model_type": "pixtral",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 4,
    "image_size": 8,
    "patch_size": 4,
}
SINGLE = "model.safetensors"
# Whether transformers writes its names of version 4, and how queries are called then.
QUERIES = {
    True: "language_model.model.layers.1.self_attn.q_proj.weight",
    False: "model.language_model.layers.1.self_attn.q_proj.weight",
}


def made(path, row, tied, old_names=True):
    """A tiny model of images and text; Ministral 3 or Mistral as its text part."""
    import torch
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    torch.manual_seed(0)
    config = Mistral3Config(
        text_config=fields_of(row), vision_config=VISION, tie_word_embeddings=tied
    )
    theirs = Mistral3ForConditionalGeneration(config).eval()
    theirs.save_pretrained(path, save_original_format=old_names)
    return theirs


def bytes_of(path) -> dict[str, bytes]:
    tensors = load_file(path / SINGLE)
    return {name: array.dtype.name.encode() + array.tobytes() for name, array in tensors.items()}


@pytest.mark.parametrize("old_names", [True, False], ids=["names of 4", "names of 5"])
@pytest.mark.parametrize(
    ("row", "tied"), [("ministral3", False), ("ministral3-unscaled", True), ("mistral", False)]
)
def test_the_text_part_is_trained_and_all_else_is_kept(row, tied, old_names, tmp_path):
    pytest.importorskip("torch")
    from transformers import Mistral3ForConditionalGeneration

    theirs = made(tmp_path / "theirs", row, tied, old_names)
    model, params = load_pretrained(tmp_path / "theirs")
    config = tmp_path / "theirs" / "config.json"
    assert model.config == config_of(row) == read_shape(str(config))
    ours = model.apply({"params": params}, IDS[:1])
    np.testing.assert_allclose(ours, logits_of(theirs, IDS[:1]), atol=2e-5)
    params["layers_1"]["q_proj"]["kernel"] += 0.5
    path = save_pretrained(tmp_path / "saved", model, params, beside=tmp_path / "theirs")
    before, after = bytes_of(tmp_path / "theirs"), bytes_of(path)
    assert before.keys() == after.keys()
    assert {n for n in before if before[n] != after[n]} == {QUERIES[old_names]}
    assert any("vision_tower" in name for name in after)
    back, report = Mistral3ForConditionalGeneration.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    ours = model.apply({"params": params}, IDS[:1])
    np.testing.assert_allclose(ours, logits_of(back, IDS[:1]), atol=2e-5)


def test_embeddings_are_tied_where_the_files_hold_no_other_output_matrix(tmp_path):
    """As in transformers 5, for which `text_config` has no say, and files of 4 say nothing."""
    pytest.importorskip("torch")
    from transformers import Mistral3ForConditionalGeneration

    for tied in (True, False):
        path = tmp_path / str(tied)
        made(path, "ministral3", tied)
        fields = json.loads((path / "config.json").read_text())
        del fields["tie_word_embeddings"]
        fields["text_config"]["tie_word_embeddings"] = not tied
        (path / "config.json").write_text(json.dumps(fields))
        model, params = load_pretrained(path)
        assert model.config.tie_word_embeddings == tied
        assert read_pretrained_config(path) == model.config
        theirs = Mistral3ForConditionalGeneration.from_pretrained(path)
        ours = model.apply({"params": params}, IDS[:1])
        np.testing.assert_allclose(ours, logits_of(theirs, IDS[:1]), atol=2e-5)
        assert ("lm_head" in params) != tied


def test_another_output_matrix_is_taken_for_tied_where_it_is_the_same(tmp_path):
    pytest.importorskip("torch")
    made(tmp_path, "ministral3-unscaled", True)
    tensors = load_file(tmp_path / SINGLE)
    twice = tensors["language_model.model.embed_tokens.weight"]
    save_file(tensors | {"language_model.lm_head.weight": twice}, tmp_path / SINGLE)
    model, params = load_pretrained(tmp_path)
    assert model.config.tie_word_embeddings and "lm_head" not in params


def test_quantised_directories_are_refused_by_name(tmp_path):
    """As those of Ministral 3 with numbers of 8 bits, whose settings are outside `text_config`."""
    fields = {"model_type": "mistral3", "text_config": fields_of("ministral3")}
    fields["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelLoadError, match=r"text_config: quantization_config is \{'quant_m"):
        read_pretrained_config(tmp_path)
