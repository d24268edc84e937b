"""Low-rank adapters of linear layers: initialisation and merging.

    y = x W + dropout(x) A B · alpha / r

A and B are leaves `lora_a` [D, r] and `lora_b` [r, F] beside `kernel` [D, F] in the parameters;
`relax.models.layers.Linear` adds their output. Hu et al., LoRA: Low-Rank Adaptation of Large
Language Models, 2021, section 4.1.
"""

import functools
import zlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from relax.errors import ConfigError
from relax.models.config import LoRA

ADAPTER = ("lora_a", "lora_b")
ALL_LINEAR = "all-linear"  # all linear layers of the blocks; the output matrix is none of them


def is_adapter(path: tuple[str, ...]) -> bool:
    """Whether the leaf at a path belongs to an adapter."""
    return path[-1] in ADAPTER


def target_layers(params, lora: LoRA) -> list[tuple[str, ...]]:
    """The paths of the linear layers that `lora.target_modules` names, as in `partition`.

    >>> params = {"layers_0": {"q_proj": {"kernel": 1}, "mlp_norm": {"scale": 2}}}
    >>> target_layers(params, LoRA(target_modules=("q_proj",)))
    [('layers_0', 'q_proj')]
    """
    flat = flax.traverse_util.flatten_dict(params)
    layers = [path[:-1] for path in flat if path[-1] == "kernel"]
    if lora.target_modules == (ALL_LINEAR,):
        return layers
    known = dict.fromkeys(path[-1] for path in layers)
    wrong = [name for name in lora.target_modules if name not in known]
    if wrong or not lora.target_modules:
        raise ConfigError(
            f"lora_target_modules must be {ALL_LINEAR} or names of linear layers, got "
            f"{', '.join(wrong) or 'none'}. This model has {', '.join(known)}."
        )
    return [path for path in layers if path[-1] in lora.target_modules]


def init_adapters(key: jax.Array, params, lora: LoRA) -> dict:
    """Adapters in float32 that change nothing yet: A ~ U(−1/√D, 1/√D), B = 0.

    Args:
      key: an adapter's own key follows from this one and its path.
      params: the parameters with the adapted kernels.
      lora: which layers, and the rank.

    Returns:
      The adapters alone, in the nesting of `params`.
    """
    flat = flax.traverse_util.flatten_dict(params)
    key, adapters = jax.random.fold_in(key, zlib.crc32(b"adapters")), {}
    for path in target_layers(params, lora):
        D, F = flat[*path, "kernel"].shape
        place = np.uint32(zlib.crc32("/".join(path).encode()))
        adapters[*path, "lora_a"] = _uniform(key, place, D, lora.r)
        adapters[*path, "lora_b"] = jnp.zeros((lora.r, F), jnp.float32)
    return flax.traverse_util.unflatten_dict(adapters)


# Compiled once per shape: one program for all adapters of a deep model takes minutes to compile.
@functools.partial(jax.jit, static_argnums=(2, 3))
def _uniform(key, place, D, r):
    return jax.random.uniform(
        jax.random.fold_in(key, place), (D, r), jnp.float32, -(D**-0.5), D**-0.5
    )


def merge_adapters(params, lora: LoRA) -> dict:
    """W + A B · alpha / r in place of every kernel that has an adapter: the plain model again.

    Args:
      params: kernels and adapters, see `relax.models.trainable.merge`.

    Returns:
      Parameters without adapters, of the kernels' dtypes; what had no adapter is not copied.
    """
    flat = flax.traverse_util.flatten_dict(params)
    merged = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
    for path in flat:
        if path[-1] == "lora_a":
            kernel, b = (*path[:-1], "kernel"), flat[*path[:-1], "lora_b"]
            merged[kernel] = _merged(flat[kernel], flat[path], b, lora.alpha / lora.r)
    return flax.traverse_util.unflatten_dict(merged)


@jax.jit
def _merged(kernel, a, b, scale):
    change = jnp.matmul(
        a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return (kernel.astype(jnp.float32) + change * scale).astype(kernel.dtype)
