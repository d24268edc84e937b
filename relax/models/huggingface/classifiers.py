"""Hugging Face directories of reward models: sequence classifiers with one label.

transformers reads the score at the last token that is not `pad_token_id`. A text's own last token
must not be that one, or the score would be read before it.
"""

import copy
import os
from pathlib import Path

import jax.numpy as jnp

from relax.errors import ConfigError, ModelLoadError
from relax.files import read_json
from relax.models.config import TransformerConfig
from relax.models.families import Family, family_of
from relax.models.families.family import FOLLOWING
from relax.models.heads import HEAD, trunk_config
from relax.models.huggingface.directories import find_directory
from relax.models.huggingface.pretrained import (
    CLASSIFIER,
    TOKEN_IDS,
    expected_in,
    is_classifier,
    write_model,
)
from relax.models.huggingface.sharded_read import read_params
from relax.models.huggingface.shards import check_tensors, tensor_files
from relax.models.huggingface.tensors import Part, Tensors, expected_tensors, shape_of
from relax.models.huggingface.text_parts import read_config
from relax.models.transformer import Transformer

TENSOR = "score.weight"
# Classes that are not named after that of the language model.
CLASSES = {
    "gemma3_text": "Gemma3TextForSequenceClassification",
    "qwen3_5_text": "Qwen3_5TextForSequenceClassification",
}
# Families without a class.
WITHOUT = frozenset(
    """
    gemma4_text granite granitemoehybrid ernie4_5 nanochat apertus lfm2 lfm3
    """.split()
)


def load_classifier(
    path: str | os.PathLike,
    dtype=jnp.float32,
    *,
    param_dtype=jnp.float32,
    gradient_checkpointing: bool = False,
    quantize=None,
) -> tuple[Transformer, dict]:
    """Reads a directory such as `LlamaForSequenceClassification` with one label writes.

    Arguments are those of `load_pretrained`.

    Returns:
      The trunk and its parameters with the head among them, see `relax.models.heads`.

    Raises:
      ModelLoadError: it is none, has more labels than one, or as for `load_pretrained`.
    """
    directory = find_directory(path)
    if not directory.is_dir() or not is_classifier(directory):
        raise ModelLoadError(
            f"'{directory}' holds no reward model: the architecture in config.json must end in "
            f"{CLASSIFIER}. Train one with run_reward.py."
        )
    family, config = read_config(directory)
    _check_labels(directory)
    config = trunk_config(config)
    files = tensor_files(directory, ignored=FOLLOWING)
    body = {name: file for name, file in files.items() if name != TENSOR}
    expected = {**expected_in(body, family, config), **_head(config)}
    check_tensors(directory, {name: shape_of(parts) for name, parts in expected.items()}, files)
    params = read_params(directory, expected, files, param_dtype, quantize)
    model = Transformer(config, jnp.dtype(dtype), jnp.dtype(param_dtype), gradient_checkpointing)
    return model, params


def save_classifier(
    path: str | os.PathLike, model: Transformer, params, tokenizer=None, *, dtype=None
) -> Path:
    """Writes a directory that transformers loads as AutoModelForSequenceClassification.

    Arguments, result and what is raised are those of `save_pretrained`. The tokenizer is written
    with the padding that `padded` gives it.
    """
    config = trunk_config(model.config)
    family = family_of(config.model_type)
    tokenizer = padded(tokenizer)
    fields = family.to_hugging_face(config) | {
        "architectures": [class_of(family)],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        **{name: getattr(tokenizer, name, None) for name in TOKEN_IDS},
    }
    expected = {**expected_tensors(family, config), **_head(config)}
    return write_model(path, fields, expected, params, tokenizer, dtype)


def class_of(family: Family) -> str:
    """The class of transformers for such a directory.

    Raises:
      ConfigError: transformers has none for the family.
    """
    if family.model_type in WITHOUT:
        raise ConfigError(
            f"transformers has no sequence classifier of model_type {family.model_type!r}, so that "
            "nothing could load a reward model of it. Choose a model of another family."
        )
    name = family.architecture.removesuffix("ForCausalLM") + CLASSIFIER
    return CLASSES.get(family.model_type, name)


def padded(tokenizer):
    """The tokenizer with a padding token that does not end texts.

    Where its own pads with the end token, or with none, it is a copy that pads with another of its
    special tokens; where it has no other, with none.
    """
    if tokenizer is None or tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return tokenizer
    others = [t for t in tokenizer.all_special_tokens if t != tokenizer.eos_token]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = others[0] if others else None
    return tokenizer


def _head(config: TransformerConfig) -> Tensors:
    return {TENSOR: (Part((HEAD, "kernel"), (1, config.hidden_size), transposed=True),)}


def _check_labels(directory: Path) -> None:
    fields = read_json(directory, "config.json")
    labels = fields.get("id2label")
    # transformers writes neither where there are two.
    count = fields.get("num_labels", len(labels) if isinstance(labels, dict) else 2)
    if count != 1:
        raise ModelLoadError(
            f"{directory / 'config.json'}: a reward model gives one number, and this classifier "
            f"has {count} labels. Give one with num_labels=1."
        )
