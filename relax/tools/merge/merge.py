"""Merges models tensor by tensor into a new model directory.

A tensor is read, merged and written in parts; what is held at once is its merged numbers and, in
`ties`, one of its changes in float32.
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from relax.errors import ModelLoadError, RelaxError
from relax.models.huggingface.pretrained import config_fields, write_directory
from relax.models.huggingface.tensors import shape_of
from relax.tools.merge.config import MergeConfig, MethodConfig
from relax.tools.merge.methods import linear, shares, slerp_factors, ties, trim_threshold
from relax.tools.merge.sources import (
    MergeSource,
    check_same,
    find_source,
    parts_of,
)


def merge(config: MergeConfig) -> Path:
    """Writes the merged model of a configuration, completely or not at all.

    Returns:
      The new directory, with the tokenizer and generation settings of the first model.

    Raises:
      ModelLoadError: a model is unsupported, differs from the first one, or holds numbers that are
        NaN or infinite; or `ties` lacks a base. Nothing is written.
      RelaxError: a merged number is too large for the dtype, or `output_dir` holds other files.
    """
    s, m = config.sources, config.method
    assert s.output_dir is not None  # guaranteed by the rules of the configuration
    sources = [find_source(name) for name in s.models]
    base = _base(s.base_model, sources) if m.method == "ties" else None
    everything = sources if base is None else [*sources, base]
    check_same(everything, s.dtype is not None)
    for source in everything:
        source.check_numbers()
    first = sources[0]
    tokenizers = [source.tokenizer for source in sources if source.tokenizer is not None]
    tokenizer = tokenizers[0] if tokenizers else None
    if any(other.chat_template != tokenizers[0].chat_template for other in tokenizers):
        print(
            "note: the chat templates differ; that of the first model is written", file=sys.stderr
        )
    dtype = np.dtype(first.dtype if s.dtype is None else jnp.dtype(s.dtype))
    fields, generation = config_fields(first.config, tokenizer, first.source.generation_config)

    def read(name: str) -> np.ndarray:
        return merged_tensor(name, sources, base, m, dtype)

    return write_directory(s.output_dir, fields, first.tensors, read, tokenizer, dtype, generation)


def merged_tensor(
    name: str,
    sources: Sequence[MergeSource],
    base: MergeSource | None,
    method: MethodConfig,
    dtype: np.dtype,
) -> np.ndarray:
    """One merged tensor.

    Args:
      name: its name in the files.
      sources: the models.
      base: the model that they were trained from, for `ties`.
      method: its settings.
      dtype: dtype of the result; the arithmetic is float32.

    Raises:
      RelaxError: a number is too large for `dtype`.
    """
    shape = shape_of(sources[0].tensors[name])
    weights = method.weights or [1.0] * len(sources)
    with contextlib.ExitStack() as stack:
        rows = [stack.enter_context(source.rows(name)) for source in sources]
        if base is not None:
            origin = stack.enter_context(base.rows(name))
            cuts = [_threshold(part, origin, shape, method.density) for part in rows]

            def merged(*span: int) -> np.ndarray:
                start = origin(*span)
                changes = [part(*span) - start for part in rows]
                return start + np.float32(method.lambda_) * ties(changes, cuts, weights)

        else:
            slerp = method.method == "slerp"
            factors = _slerp(rows, shape, method.t) if slerp else shares(weights)

            def merged(*span: int) -> np.ndarray:
                return linear([part(*span) for part in rows], factors)

        result = np.empty(shape, dtype)
        for first, last in parts_of(shape):
            with np.errstate(over="ignore"):  # told below
                result[first:last] = part = merged(first, last)
            if not np.isfinite(result[first:last]).all():
                raise RelaxError(
                    f"the merged {name} has numbers too large for {dtype}, up to "
                    f"{np.abs(part).max():.3g}; write it with --dtype float32, or give smaller "
                    "weights."
                )
    return result


def _threshold(rows, origin, shape: tuple[int, ...], density: float) -> float:
    change = np.empty(shape, np.float32)
    for span in parts_of(shape):
        change[slice(*span)] = rows(*span) - origin(*span)
    return trim_threshold(change, density)


def _slerp(rows, shape: tuple[int, ...], t: float) -> tuple[float, float]:
    dot = a_square = b_square = 0.0
    for span in parts_of(shape):
        a, b = (part(*span).astype(np.float64).reshape(-1) for part in rows)
        dot, a_square, b_square = dot + a @ b, a_square + a @ a, b_square + b @ b
    return slerp_factors(dot, a_square, b_square, t)


def _base(name: str | None, sources: Sequence[MergeSource]) -> MergeSource:
    """The model that changes are measured from."""
    if name is not None:
        return find_source(name)
    bases = sorted({str(source.base) for source in sources if source.source.is_adapter})
    if len(bases) != 1 or not all(source.source.is_adapter for source in sources):
        raise ModelLoadError(
            "ties needs the model that all were trained from: name it with --base_model; it is "
            "known only where all models are adapters of one base, got "
            f"{len(bases)} bases."
        )
    return find_source(bases[0])
