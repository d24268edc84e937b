"""Generation: checks a request and runs it through `relax.sampling.batch`."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from relax import parallel
from relax.errors import ConfigError
from relax.models.transformer import Transformer
from relax.sampling import step
from relax.sampling.batch import Batch, Row
from relax.sampling.config import SamplingConfig, check_request, checked_prompts
from relax.sampling.output import SampleOutput, padded
from relax.sampling.stops import Decode


def generate(
    model: Transformer,
    params,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    config: SamplingConfig,
    *,
    decode: Decode | None = None,
    on_tokens: Callable[[int, list[int]], None] | None = None,
    limits: Sequence[int] | None = None,
) -> SampleOutput:
    """Samples `config.n` completions of every prompt.

    Args:
      model, params: as `load_pretrained` gives them.
      prompts: lists of token ids, of any lengths.
      key: one key, from which row i * n + j gets fold_in(fold_in(key, i), j); or an array with one
        key per row. A row depends only on its prompt and its key, not on the rows beside it.
      config: sampling options.
      decode: turns ids into text for stop strings: `relax.sampling.stops.stop_decoder(tokenizer)`.
      on_tokens: called with a row's number and its new tokens as they are sampled.
      limits: maximum new tokens of each row, up to `config.max_new_tokens`; None: that for all.

    Returns:
      The completions, in the order of the prompts.

    Raises:
      ConfigError: a prompt or an option is invalid.
      NonFiniteError: the model's logits are NaN or infinite.
    """
    arrays = checked_prompts(prompts, model.config)
    most = _limits(limits, len(arrays) * config.n, config)
    longest = most.reshape(len(arrays), config.n).max(axis=1)
    check_request(config, model.config, arrays, longest, decodes=decode is not None)
    keys = _Keys(key, len(arrays), config.n)
    rows = [
        Row(number, number // config.n, arrays[number // config.n], int(limit))
        for number, limit in enumerate(most)
    ]
    batch = Batch(model, _narrowed(params, model.dtype), config, keys, rows, decode)
    while batch.under_way():
        batch.fill()
        for row, new in batch.advance():
            if on_tokens is not None:
                on_tokens(row.number, new)
    return padded([(row.tokens, row.logprobs, row.reason or "length") for row in rows])


class _Keys:
    """Makes the keys of rows."""

    def __init__(self, key: jax.Array, prompts: int, n: int):
        rows = prompts * n
        typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if not typed or key.shape not in ((), (rows,)):
            raise ConfigError(
                "key must be one key of jax.random.key, or one for each of the "
                f"{rows} rows, got {jax.typeof(key) if typed else type(key).__name__}."
            )
        self.key, self.n = key, n

    def __call__(self, numbers: list[int]) -> jax.Array:
        index = np.array(numbers, np.int32)
        if self.key.shape:
            return self.key[index]
        return step.row_keys(self.key, index // self.n, index % self.n)


def _limits(limits: Sequence[int] | None, rows: int, config: SamplingConfig) -> np.ndarray:
    if limits is None:
        return np.full((rows,), config.max_new_tokens)
    array = np.asarray(limits)
    if array.shape != (rows,) or array.dtype.kind not in "iu":
        raise ConfigError(f"limits must hold one number per row, got {limits!r:.80}.")
    if array.min() < 1 or array.max() > config.max_new_tokens:
        raise ConfigError(
            f"limits must be from 1 to max_new_tokens {config.max_new_tokens}, got from "
            f"{array.min()} to {array.max()}."
        )
    return array


@jax.jit
def _cast(leaves, like):
    return [leaf.astype(like.dtype) for leaf in leaves]


@jax.jit
def _gathered(params, like):
    """As `_narrowed`, and gathered along fsdp, which would dominate the time of every step."""
    cast = jax.tree.map(lambda x: x.astype(like.dtype) if x.ndim > 1 else x, params)
    return parallel.unshard_fsdp(cast)


def _narrowed(params, dtype):
    """Casts matrices to the computation's dtype once for all steps; not norms and biases."""
    if parallel.layout() is not None:
        return _gathered(params, np.zeros((), dtype))
    leaves, structure = jax.tree.flatten(params)
    wide = [i for i, leaf in enumerate(leaves) if leaf.ndim > 1 and leaf.dtype != dtype]
    if wide:
        cast = _cast([leaves[i] for i in wide], np.zeros((), dtype))
        for i, leaf in zip(wide, cast, strict=True):
            leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)
