"""Generation: checks a request and runs it through `relax.sampling.batch`."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from relax import parallel
from relax.errors import ConfigError
from relax.models.quantization import is_quantized
from relax.models.transformer import Transformer
from relax.sampling import step
from relax.sampling.batch import Batch, Row
from relax.sampling.config import SamplingConfig, check_request, checked_prompts
from relax.sampling.drafts import Verified, check_drafts, verify_drafts
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
    drafts: Sequence[Sequence[int] | np.ndarray] | None = None,
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
      drafts: for each row the tokens that an earlier policy sampled with its key, or none; with
        them the same completions take less time, see `relax.sampling.drafts`. None: no drafts.

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
    params, told = weights_for(model, params), on_tokens or (lambda number, new: None)
    verified = Verified({}, 0)
    if drafts is not None:
        check_drafts(drafts, len(rows), model, config)
        verified = verify_drafts(model, params, rows, drafts, keys, config, decode)
        for row in (row for row in rows if row.tokens):
            told(row.number, row.tokens)
    if left := [row for row in rows if row.reason is None]:
        batch = Batch(model, params, config, keys, left, decode, prefilled=verified.prefilled)
        while batch.under_way():
            batch.fill()
            for row, new in batch.advance():
                told(row.number, new)
    output = padded([(row.tokens, row.logprobs, row.reason or "length") for row in rows])
    return output._replace(reused=verified.accepted)


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

    def narrow(x):
        return x if is_quantized(x) or x.ndim < 2 else x.astype(like.dtype)

    return parallel.unshard_fsdp(jax.tree.map(narrow, params, is_leaf=is_quantized))


def weights_for(model: Transformer, params):
    """Parameters for generation, with matrices in the dtype of the computation.

    The output matrix has that of the hidden states.
    """
    narrow = _narrowed(params, model.dtype)
    if not model.cast_lm_head_to_fp32:
        return narrow
    name = "embed_tokens" if model.config.tie_word_embeddings else "lm_head"
    return {**narrow, **_narrowed({name: params[name]}, np.dtype(np.float32))}


def _narrowed(params, dtype):
    """Casts matrices to the computation's dtype once for all steps; not norms and biases.

    Quantised ones stay so: each step makes the matrix of a layer where it is used.
    """
    if parallel.layout() is not None:
        return _gathered(params, np.zeros((), dtype))
    leaves, structure = jax.tree.flatten(params, is_leaf=is_quantized)
    wide = [
        i
        for i, leaf in enumerate(leaves)
        if leaf.ndim > 1 and not is_quantized(leaf) and leaf.dtype != dtype
    ]
    if wide:
        cast = _cast([leaves[i] for i in wide], np.zeros((), dtype))
        for i, leaf in zip(wide, cast, strict=True):
            leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)
