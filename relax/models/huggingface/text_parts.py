"""Text models inside directories of models of images and text.

Such a directory nests the text model's config.json under `text_config`, and holds tensors of other
parts beside it: a vision tower, a projector, layers that predict further tokens. Those are never
read into a model. Saved beside them, a text model replaces its own tensors; all others stay byte
for byte as they are.
"""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from relax.errors import ModelLoadError
from relax.files import read_json
from relax.models.config import TransformerConfig
from relax.models.families import TEXT_PARTS, Family, family_of
from relax.models.families.family import FOLLOWING
from relax.models.huggingface.shards import (
    INDEX,
    SINGLE,
    Kind,
    are_equal,
    open_tensors,
    tensor_files,
)

NESTED = "text_config"
TIED = "tie_word_embeddings"
# Of these the field outside of `text_config` counts, true where there is none.
OUTER_TIED = ("mistral3",)
PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


class Names(NamedTuple):
    """Names of a text model's tensors in a file.

    Attributes:
      body: what stands in place of `model.`.
      head: what stands in place of `lm_head.weight`.
    """

    body: str = "model."
    head: str = "lm_head.weight"

    def in_file(self, name: str) -> str:
        """The name in the file of a tensor of the text model.

        >>> Names("model.language_model.").in_file("model.norm.weight")
        'model.language_model.norm.weight'
        """
        if not name.startswith("model."):
            return self.head if name == PLAIN.head else name
        return self.body + name.removeprefix("model.")

    def own(self, files: Mapping[str, str]) -> dict[str, str]:
        """The text model's tensors among all, by their names in a directory of its own."""
        if self == PLAIN:
            return dict(files)
        found = {
            "model." + name.removeprefix(self.body): file
            for name, file in files.items()
            if name.startswith(self.body)
        }
        return found | ({PLAIN.head: files[self.head]} if self.head in files else {})


PLAIN = Names()
EMBEDDINGS = "model.embed_tokens.weight"
# In files of transformers 5 and 4.
INNER = (
    Names("model.language_model."),
    Names("language_model.model.", "language_model.lm_head.weight"),
)


def has_text_part(directory: Path) -> bool:
    """Whether a directory holds a model of which only the text part is read."""
    return read_json(directory, "config.json").get("model_type") in TEXT_PARTS


def text_fields(directory: Path) -> tuple[dict, str]:
    """The fields of config.json about the text model of a directory, and where they are."""
    return text_part(read_json(directory, "config.json"), str(directory / "config.json"))


def text_part(fields: dict, where: str) -> tuple[dict, str]:
    """As `text_fields`, for all `fields` of a config.json."""
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in TEXT_PARTS:
        return fields, where
    inner = fields.get(NESTED)
    if not isinstance(inner, dict):
        got = f"{NESTED} must be an object, got {inner!r:.80}."
        raise ModelLoadError(f"{where}: model_type is {kind!r}, so {got}")
    outer = {name: fields[name] for name in (TIED, "quantization_config") if name in fields}
    if kind in OUTER_TIED:
        inner = {name: value for name, value in inner.items() if name != TIED}
        outer.setdefault(TIED, True)
    return {"model_type": TEXT_PARTS[kind], **outer, **inner}, f"{where}, {NESTED}"


def read_config(directory: Path) -> tuple[Family, TransformerConfig]:
    """Reads config.json of a directory, or its part about the text model.

    As transformers 5 does, it takes the embeddings of a text part for untied where the files have
    another output matrix: files of transformers 4 say nothing of it.
    """
    fields, where = text_fields(directory)
    family = family_of(fields.get("model_type"), where)
    config = family.from_hugging_face(fields, where)
    weights = any((directory / name).exists() for name in (SINGLE, INDEX))
    if config.tie_word_embeddings and weights and has_text_part(directory):
        files = tensor_files(directory, ignored=FOLLOWING)
        names = names_in(directory, files)
        head, embeddings = map(names.in_file, (PLAIN.head, EMBEDDINGS))
        if head in files and not are_equal(directory, head, embeddings, files):
            config = dataclasses.replace(config, tie_word_embeddings=False)
    return family, config


def names_in(directory: Path, files: Mapping[str, str]) -> Names:
    """The names of the text model's tensors in the files of a directory."""
    if not has_text_part(directory):
        return PLAIN
    for names in INNER:
        if names.in_file(EMBEDDINGS) in files:
            return names
    raise ModelLoadError(
        f"tensors of '{directory}': no embeddings of a text model, "
        f"{' or '.join(names.in_file(EMBEDDINGS) for names in INNER)}."
    )


class Surroundings:
    """What a directory of a model of images and text holds besides its text model."""

    def __init__(self, directory: Path, config: TransformerConfig):
        """config: of the text model that is to be saved in place of that in the directory.

        Raises:
          ValueError: the two have different sizes.
        """
        family, own_config = read_config(directory)
        if not has_text_part(directory) or own_config != config:
            raise ValueError(
                f"'{directory}' must hold a model of images and text whose text part has the "
                "configuration of the model to save. Save it alone, or name its own directory."
            )
        self.directory = directory
        files = tensor_files(directory, ignored=FOLLOWING)
        self.names = names_in(directory, files)
        used = self.names.own(files).keys() - family.unread(config)
        own = set(map(self.names.in_file, used))
        self.files = {name: file for name, file in files.items() if name not in own}

    def kinds(self) -> dict[str, Kind]:
        """Shape and dtype of each tensor."""
        arrays = ((name, self.read(name)) for name in self.files)
        return {name: (array.shape, array.dtype) for name, array in arrays}

    def read(self, name: str) -> np.ndarray:
        """A tensor, in the dtype of the file."""
        with open_tensors(self.directory, self.files[name]) as tensors:
            array: np.ndarray = tensors.get_tensor(name)
            return array

    def fields(self, dtype: str) -> dict:
        """config.json, which names the dtype of the text model's tensors."""
        fields = read_json(self.directory, "config.json")
        return fields | {"dtype": dtype, NESTED: fields[NESTED] | {"dtype": dtype}}

    def copy_processors(self, directory: Path) -> None:
        """Copies the settings of what turns images into inputs."""
        for name in PROCESSORS:
            if (self.directory / name).is_file():
                shutil.copyfile(self.directory / name, directory / name)
