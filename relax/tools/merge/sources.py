"""The models to merge: what must be equal between them, and their tensors, read in parts."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from relax.config.text import join_some
from relax.engine.model_source import ModelSource
from relax.errors import ModelLoadError
from relax.models.config import LoRA, TransformerConfig
from relax.models.huggingface import mxfp4
from relax.models.huggingface.peft import check_mergeable, load_adapter
from relax.models.huggingface.pretrained import checked_files
from relax.models.huggingface.shards import open_tensors, read_tensors
from relax.models.huggingface.tensors import Tensors, leaf_shapes, shape_of
from relax.models.huggingface.text_parts import has_text_part
from relax.models.lora import SCALE, adapter_path
from relax.models.transformer import Transformer

PART = 1 << 20  # numbers of a tensor that are merged at a time
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@dataclasses.dataclass(frozen=True)
class MergeSource:
    """A model directory, or an adapter's with its base.

    Attributes:
      source: its directories.
      config: the model's configuration.
      tensors: name of a tensor -> what it holds.
      files: name of a tensor -> its file in `source.base_directory`.
      dtypes: name of a tensor -> its dtype.
      adapter: settings and leaves of the adapter, if it is one.
      tokenizer: None if there is none.
    """

    source: ModelSource
    config: TransformerConfig
    tensors: Tensors
    files: Mapping[str, str]
    dtypes: Mapping[str, np.dtype]
    adapter: tuple[LoRA, dict] | None
    tokenizer: Any

    @property
    def base(self) -> Path:
        """The directory of the model itself."""
        assert self.source.base_directory is not None
        return self.source.base_directory

    @property
    def dtype(self) -> np.dtype:
        """The narrowest dtype that holds all tensors exactly."""
        return np.dtype(jnp.result_type(*self.dtypes.values()))

    def check_numbers(self) -> None:
        """Reads every tensor once.

        Raises:
          ModelLoadError: a number is NaN or infinite.
        """
        for _ in read_tensors(self.base, self.files, self.files):
            pass

    @contextlib.contextmanager
    def rows(self, name: str):
        """Opens a tensor: `(first, last) -> float32`, of rows or of the numbers of a vector."""
        changes = list(self._changes(name))

        def read(first: int, last: int) -> np.ndarray:
            rows = held[first:last].astype(np.float32)
            for start, stop, change in changes:
                span = slice(max(start - first, 0), max(min(stop, last) - first, 0))
                if span.start < span.stop:
                    rows[span] = change(rows[span], first + span.start - start)
            return rows

        with open_tensors(self.base, self.files[name]) as file:
            held = file.get_slice(name)
            yield read

    def _changes(self, name: str) -> Iterator[tuple[int, int, Callable]]:
        """First and last row of each part with an adapter, and what merges it into rows."""
        if self.adapter is None:
            return
        lora, leaves = self.adapter
        stop = 0
        for part in self.tensors[name]:
            if adapter_path(part.path, "lora_a") not in leaves:
                stop += part.shape[part.axis]
                continue
            if len(part.shape) != 2:
                raise ModelLoadError(
                    f"'{self.source.path}': {name} holds all experts in one tensor, whose adapter "
                    "is not merged here; save the base with one tensor per expert."
                )
            a, b = (leaves[adapter_path(part.path, half)] for half in ("lora_a", "lora_b"))
            norms = leaves.get(adapter_path(part.path, "lora_magnitude"))
            if part.expert is not None:
                a, b = a[part.expert], b[part.expert]
            start, stop = stop, stop + part.shape[0]
            scale = leaves.get(adapter_path(part.path, SCALE), lora.scale)
            a, b = np.asarray(a, np.float32).T, np.asarray(b, np.float32).T * np.float32(scale)
            if not part.transposed:  # embeddings, whose rows are inputs
                a, b = b.T, a.T
            yield start, stop, functools.partial(_merged, a, b, norms)


def _merged(a, b, norms, rows: np.ndarray, first: int) -> np.ndarray:
    """W + B A for some rows of W; with the given norms in DoRA."""
    span = slice(first, first + len(rows))
    whole = rows + b[span] @ a
    if norms is None:
        return whole
    scale = np.asarray(norms)[span] / np.linalg.norm(whole, axis=1)
    return whole * scale[:, None]


def find_source(name: str) -> MergeSource:
    """Resolves a path or hub name, and checks all but the numbers.

    Raises:
      ModelLoadError: the directory is unsupported, or a tensor is missing, extra or misshapen.
    """
    source = ModelSource.find(name)
    assert source.base_directory is not None  # a name is given
    if has_text_part(source.base_directory):
        raise ModelLoadError(
            f"'{source.base_directory}' holds a model of images and text, which is neither merged "
            "nor exported; give a directory with a text model alone."
        )
    config, expected, files = checked_files(source.base_directory)
    if any(mxfp4.is_packed(name, files) for name in expected):
        raise ModelLoadError(
            f"'{source.base_directory}' holds experts in MXFP4, which are neither merged nor "
            "exported; write it in bfloat16 first, with load_pretrained and save_pretrained."
        )
    adapter = None
    if source.is_adapter:
        shapes = {p: jax.ShapeDtypeStruct(s, np.float32) for p, s in leaf_shapes(config).items()}
        tree = flax.traverse_util.unflatten_dict(shapes)
        model, leaves = load_adapter(source.files, Transformer(config), tree)
        check_mergeable(model)
        assert model.lora is not None  # load_adapter sets it
        if model.lora.modules_to_save:
            raise ModelLoadError(
                f"'{source.path}' trained {', '.join(model.lora.modules_to_save)} in full, which "
                "this program does not read; train with --merge_lora to get a whole model."
            )
        adapter = model.lora, flax.traverse_util.flatten_dict(leaves)
    dtypes: dict[str, np.dtype] = {}
    for file in sorted(set(files.values())):
        with open_tensors(source.base_directory, file) as tensors:
            inside = [tensor for tensor in files if files[tensor] == file]
            dtypes |= {n: _dtype(tensors.get_slice(n).get_dtype()) for n in inside}
    places = (source.files, source.base_directory)
    there = any((place / file).is_file() for place in places for file in TOKENIZER_FILES)
    tokenizer = source.tokenizer() if there else None
    return MergeSource(source, config, expected, files, dtypes, adapter, tokenizer)


def check_same(sources: Sequence[MergeSource], dtype_given: bool) -> None:
    """Refuses models of which one differs from the first.

    Raises:
      ModelLoadError: in family or sizes, tensors, or tokenizer; or in dtype, without one given.
    """
    first = sources[0]
    for other in sources[1:]:
        names = f"'{first.source.path}' and '{other.source.path}'"
        differing = _differing(first.config, other.config)
        if differing:
            raise ModelLoadError(
                f"merged models must have one architecture, but {names} differ in "
                f"{join_some(differing)}."
            )
        shapes = [{n: shape_of(parts) for n, parts in s.tensors.items()} for s in (first, other)]
        if shapes[0] != shapes[1]:
            names_differing = sorted(n for n, _ in shapes[0].items() ^ shapes[1].items())
            raise ModelLoadError(
                f"merged models must have the same tensors, but {names} differ in "
                f"{join_some(names_differing)}."
            )
        if not dtype_given and first.dtype != other.dtype:
            raise ModelLoadError(
                f"merged models must have one dtype, but {names} have {first.dtype} and "
                f"{other.dtype}; choose what is written with --dtype."
            )
    _check_tokenizers(sources)


def _check_tokenizers(sources: Sequence[MergeSource]) -> None:
    named = [(s.source.path, s.tokenizer) for s in sources if s.tokenizer is not None]
    for path, tokenizer in named[1:]:
        ours, theirs = named[0][1].get_vocab(), tokenizer.get_vocab()
        if ours != theirs:
            tokens = sorted({token for token, _ in ours.items() ^ theirs.items()})
            raise ModelLoadError(
                "merged models must have one tokenizer, but those of "
                f"'{named[0][0]}' and '{path}' differ in {len(tokens)} tokens: "
                f"{join_some([repr(token) for token in tokens])}."
            )


def parts_of(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The first and last row of parts of about `PART` numbers.

    >>> list(parts_of((3, 1 << 19)))
    [(0, 2), (2, 3)]
    """
    row = int(np.prod(shape[1:]))
    step = max(1, PART // row)
    yield from ((i, min(i + step, shape[0])) for i in range(0, shape[0], step))


def _dtype(code: str) -> np.dtype:
    return np.dtype(jnp.dtype({"BF16": "bfloat16"}.get(code, code.replace("F", "float"))))


def _differing(first: TransformerConfig, other: TransformerConfig) -> list[str]:
    ours, theirs = (dataclasses.asdict(config) for config in (first, other))
    del ours["initializer_range"]  # does not change the computation
    return [
        f"{name} ({ours[name]!r} and {theirs[name]!r})"
        for name in ours
        if ours[name] != theirs[name]
    ]
