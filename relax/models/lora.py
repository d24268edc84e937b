"""Low-rank adapters of linear layers and experts: initialisation and merging.

    y = x W + dropout(x) A B · s

A and B are leaves `lora_a` [D, r] and `lora_b` [r, F] beside `kernel` [D, F] in the parameters,
with `lora_magnitude` [F] for DoRA; `relax.models.layers.Linear` adds their output. Experts have
`gate_proj_lora_a` [E, D, r] and `gate_proj_lora_b` [E, r, F] beside `gate_proj` [E, D, F], without
dropout; embeddings [V, D] `embed_tokens_lora_a` [V, r] and `embed_tokens_lora_b` [r, D]. A leaf
`lora_scale` beside them, which is not trained, is their s where it differs from that of the others.
Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, section 4.1.
"""

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from relax.errors import ConfigError
from relax.models.config import LoRA
from relax.models.layers import column_norms
from relax.models.quantization import plain

ADAPTER = ("lora_a", "lora_b", "lora_magnitude")
SCALE = "lora_scale"
EMBEDDINGS = ("embed_tokens",)
# All linear layers of the blocks and all experts; neither the output matrix nor the routers.
ALL_LINEAR = "all-linear"
ROUTER = "router"

Path = tuple[str, ...]


def is_adapter(path: Path) -> bool:
    """Whether the leaf at a path belongs to an adapter and is trained."""
    return path[-1].endswith(ADAPTER)


def is_beside(path: Path) -> bool:
    """Whether the leaf at a path belongs to an adapter, its scale included."""
    return path[-1].endswith((*ADAPTER, SCALE))


def adapter_path(weight: Path, part: str) -> Path:
    """The path of a part of the adapter of a weight.

    >>> adapter_path(("layers_0", "q_proj", "kernel"), "lora_a")
    ('layers_0', 'q_proj', 'lora_a')
    >>> adapter_path(("layers_0", "experts", "up_proj"), "lora_a")
    ('layers_0', 'experts', 'up_proj_lora_a')
    """
    return (*weight[:-1], part if weight[-1] == "kernel" else f"{weight[-1]}_{part}")


def layer_name(weight: Path) -> str:
    """The name by which `target_modules` means a weight, such as `q_proj`."""
    return weight[-2] if weight[-1] == "kernel" else weight[-1]


def target_weights(params, lora: LoRA) -> list[Path]:
    """The paths of the weights that `lora.target_modules` names.

    >>> params = {"layers_0": {"q_proj": {"kernel": 1}, "mlp_norm": {"scale": 2}}}
    >>> target_weights(params, LoRA(target_modules=("q_proj",)))
    [('layers_0', 'q_proj', 'kernel')]
    """
    flat = flax.traverse_util.flatten_dict(params)
    experts = {
        path
        for path in flat
        if path[-2:-1] == ("experts",) and not is_beside(path) and not path[-1].endswith("_bias")
    }
    weights = [path for path in flat if path[-1] == "kernel" or path in experts]
    if lora.target_modules == (ALL_LINEAR,):
        return [path for path in weights if path[-1] != ROUTER]
    weights += [EMBEDDINGS] if EMBEDDINGS in flat else []
    known = dict.fromkeys(map(layer_name, weights))
    wrong = [name for name in lora.target_modules if name not in known]
    if wrong or not lora.target_modules:
        raise ConfigError(
            f"lora_target_modules must be {ALL_LINEAR} or names of linear layers, got "
            f"{', '.join(wrong) or 'none'}. This model has {', '.join(known)}."
        )
    return [path for path in weights if layer_name(path) in lora.target_modules]


def init_adapters(
    key: jax.Array, params, lora: LoRA, name_of: Callable[[Path], str] = layer_name
) -> dict:
    """Adapters in float32 that change nothing yet: A ~ U(−1/√D, 1/√D), B = 0, m = ‖W‖.

    Those of embeddings have A = 0 and B ~ N(0, 1), as in PEFT.

    Args:
      key: an adapter's own key follows from this one and its path.
      params: the parameters with the adapted kernels.
      lora: which layers, and the rank.
      name_of: gives the name of the module of a weight, for the patterns of `lora`.

    Returns:
      The adapters alone, with scales of their own, in the nesting of `params`.

    Raises:
      ConfigError: a pattern fits no module with an adapter, or an adapter of embeddings is DoRA.
    """
    flat = flax.traverse_util.flatten_dict(params)
    key = jax.random.fold_in(key, zlib.crc32(b"adapters"))
    adapters: dict[Path, jax.Array] = {}
    targets = target_weights(params, lora)
    _check_patterns(lora, [name_of(path) for path in targets])
    for path in targets:
        own = lora.of_module(name_of(path))
        if own.scale != lora.scale:
            adapters[adapter_path(path, SCALE)] = jnp.float32(own.scale)
        *E, D, F = flat[path].shape
        names = path[:-1] if path[-1] == "kernel" else path
        place = np.uint32(zlib.crc32("/".join(names).encode()))
        if path == EMBEDDINGS:
            if lora.use_dora:
                raise ConfigError(
                    "use_dora has no adapter of embeddings here: leave embed_tokens out."
                )
            a = jnp.zeros((D, own.r), jnp.float32)
            b = jax.random.normal(jax.random.fold_in(key, place), (own.r, F), jnp.float32)
        else:
            a = _uniform(key, place, (*E, D, own.r))
            b = jnp.zeros((*E, own.r, F), jnp.float32)
        adapters |= {adapter_path(path, "lora_a"): a, adapter_path(path, "lora_b"): b}
        if lora.use_dora:
            norms = _norms(flat[path], a, b, own.scale)
            adapters[adapter_path(path, "lora_magnitude")] = norms
    return flax.traverse_util.unflatten_dict(adapters)


def _check_patterns(lora: LoRA, modules: list[str]) -> None:
    for name in ("rank_pattern", "alpha_pattern"):
        for key, _ in getattr(lora, name):
            try:
                pattern = re.compile(rf"(.*\.)?({key})$")
            except re.error as error:
                raise ConfigError(f"{name}: {key!r} is no regular expression: {error}.") from error
            if not any(map(pattern.match, modules)):
                raise ConfigError(
                    f"{name}: {key!r} fits no module with an adapter, such as "
                    f"{', '.join(modules[:3])}. Correct or remove it."
                )


# Compiled once per shape: one program for all adapters of a deep model takes minutes to compile.
@functools.partial(jax.jit, static_argnums=2)
def _uniform(key, place, shape):
    most = shape[-2] ** -0.5
    return jax.random.uniform(jax.random.fold_in(key, place), shape, jnp.float32, -most, most)


_norms = jax.jit(column_norms)


def merge_adapters(params, lora: LoRA) -> dict:
    """W + s A B, or its columns with the norms m, in place of every weight that has an adapter.

    Args:
      params: kernels and adapters, see `relax.models.trainable.merge`.

    Returns:
      Parameters without adapters, of the weights' dtypes; what had no adapter is not copied. A
      weight in its file (`relax.models.huggingface.quantized`) stays there until it is read.
    """
    flat = flax.traverse_util.flatten_dict(params)
    merged = {path: leaf for path, leaf in flat.items() if not is_beside(path)}
    for path, leaf in list(merged.items()):
        a, b, magnitude = (flat.get(adapter_path(path, part)) for part in ADAPTER)
        if a is not None:
            scale = flat.get(adapter_path(path, SCALE), lora.scale)
            merge = functools.partial(_merged_expert, a, b, magnitude, scale)
            in_file = hasattr(leaf, "merge")
            merged[path] = dataclasses.replace(leaf, merge=merge) if in_file else merge(leaf)
    return flax.traverse_util.unflatten_dict(merged)


def _merged_expert(a, b, magnitude, scale, kernel, expert=...):
    """The merged kernel, of one of several experts or of all."""
    return _merged(kernel, a[expert], b[expert], magnitude, scale)


@jax.jit
def _merged(kernel, a, b, magnitude, scale):
    change = jnp.matmul(
        a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    kernel = plain(kernel)
    whole = kernel.astype(jnp.float32) + change * scale
    if magnitude is not None:
        whole = whole * (magnitude / column_norms(kernel, a, b, scale))[None, :]
    return whole.astype(kernel.dtype)
