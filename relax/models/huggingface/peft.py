"""Adapters in PEFT's layout: a directory with adapter_config.json and adapter_model.safetensors.

A field of the configuration that would change the computation is supported or an error.
Linear layers that are one tensor in the files of a family (Phi-3's queries, keys and values) have
one adapter there: read, its A goes to each of ours and its B is cut into their rows; written, its
rank is the sum of ours, and rank_pattern and alpha_pattern say so.

Experts are named as parameters (`target_parameters`). PEFT 0.21 has one tensor for all experts of a
layer, A [E r, in] and B [out, r E], in which the numbers of an expert lie one after the other in A
and E apart in B. It wraps the module of the experts once per parameter, so that the adapter of
`gate_up_proj` is that of a `base_layer` where `down_proj` has one too.
"""

import math
import os
from collections.abc import Collection
from pathlib import Path

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from relax.config.text import join_some
from relax.errors import ModelLoadError
from relax.models.config import LoRA
from relax.models.families import family_of
from relax.models.families.family import LAYER, module_of
from relax.models.huggingface import shards
from relax.models.huggingface.peft_config import CONFIG, WEIGHT, read_adapter_config
from relax.models.huggingface.pretrained import load_pretrained
from relax.models.huggingface.tensors import expected_tensors, places, shape_of, to_params
from relax.models.lora import (
    ALL_LINEAR,
    EMBEDDINGS,
    ROUTER,
    SCALE,
    adapter_path,
    layer_name,
    merge_adapters,
    target_weights,
)
from relax.models.lora import Path as Weight
from relax.models.trainable import module_name, overlaid
from relax.models.transformer import Transformer

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

Modules = dict[str, list[Weight]]
EMBEDDING = "model.embed_tokens"
# What PEFT saves beside an adapter of embeddings: them and the output matrix, as in the base.
_BESIDE = (
    f"{PREFIX}{EMBEDDING}.base_layer.weight",
    f"{PREFIX}{EMBEDDING}.weight",
    f"{PREFIX}lm_head.weight",
)


def is_adapter_directory(directory: str | os.PathLike) -> bool:
    """Whether a directory holds an adapter instead of a model.

    Raises:
      ModelLoadError: it holds both.
    """
    directory = Path(directory)
    adapter, model = (directory / name for name in (CONFIG, "config.json"))
    if adapter.is_file() and model.is_file():
        raise ModelLoadError(
            f"'{directory}' holds both an adapter and a model, {CONFIG} and config.json: it is not "
            "told which one is meant. Move one of them to a directory of its own."
        )
    return adapter.is_file()


def base_of(directory: str | os.PathLike) -> str:
    """The directory or hub name of the model that an adapter belongs to."""
    return read_adapter_config(Path(directory)).base


def load_merged(directory: str | os.PathLike, dtype=jnp.float32, **options):
    """The model that an adapter belongs to, with the adapter merged into it.

    Args:
      directory: with the adapter.
      dtype, **options: as for `load_pretrained`.
    """
    model, params = load_pretrained(base_of(directory), dtype, **options)
    with_adapter, adapters = load_adapter(directory, model, params)
    check_mergeable(with_adapter)
    assert with_adapter.lora is not None  # load_adapter sets it
    return model, merge_adapters(overlaid(params, adapters), with_adapter.lora)


def check_mergeable(model: Transformer) -> None:
    """Refuses to merge what would change more than the adapter does.

    Raises:
      ModelLoadError: an adapter of embeddings that are the output matrix too.
    """
    assert model.lora is not None  # of an adapter
    if model.config.tie_word_embeddings and "embed_tokens" in model.lora.target_modules:
        raise ModelLoadError(
            "an adapter of embed_tokens cannot be merged where the embeddings are the output "
            "matrix too, which it leaves as it is. Keep the adapter: no merge_lora."
        )


def load_adapter(path: str | os.PathLike, model: Transformer, params) -> tuple[Transformer, dict]:
    """Reads an adapter.

    Args:
      path: its directory.
      model, params: what it belongs to.

    Returns:
      The model with `lora` set, and the adapters alone, float32, with the modules that were trained
      in full, in the nesting of `params`: see `relax.models.trainable.overlaid`.

    Raises:
      ModelLoadError: the adapter is unsupported or does not fit the model.
    """
    directory = Path(path)
    config = read_adapter_config(directory)
    modules, flat = modules_of(model, params), flax.traverse_util.flatten_dict(params)
    family = family_of(model.config.model_type)
    with shards.open_tensors(directory, WEIGHTS) as file:
        files = dict.fromkeys(file.keys(), WEIGHTS)
    adapted = _adapted(directory, config, modules, files)
    shapes: dict[str, tuple[int, ...]] = {}
    widths: dict[str, list[int]] = {}
    for name in adapted:
        widths[name] = [flat[path].shape[-1] for path in modules[name]]
        *E, D, _ = flat[modules[name][0]].shape
        r = config.rank(name) * math.prod(E)
        a_name, b_name = tensor_names(name, adapted)
        shapes[a_name] = (r, D)
        shapes[b_name] = (sum(widths[name]), r)
        if config.use_dora:
            shapes[magnitude_name(name)] = (sum(widths[name]),)
    saved = _saved(directory, config, model)
    shapes |= {name: shape_of(parts) for name, parts in saved.items()}
    if EMBEDDING in adapted:
        files = {n: file for n, file in files.items() if n in shapes or n not in _BESIDE}
    shards.check_tensors(directory, shapes, files)
    tensors = dict(shards.read_tensors(directory, shapes, files))
    adapters = {}
    for name in adapted:
        a, b = (np.asarray(tensors[half], np.float32) for half in tensor_names(name, adapted))
        a, b = _from_file(a, b, flat[modules[name][0]].shape[:-2])
        outputs = places(widths[name], family.alternating)
        for weight, place in zip(modules[name], outputs, strict=True):
            adapters[adapter_path(weight, "lora_a")] = jnp.asarray(a)
            adapters[adapter_path(weight, "lora_b")] = jnp.asarray(b[..., place])
            if config.scale(name) != config.scale():
                adapters[adapter_path(weight, SCALE)] = jnp.float32(config.scale(name))
            if config.use_dora:
                norms = np.asarray(tensors[magnitude_name(name)], np.float32)
                adapters[adapter_path(weight, "lora_magnitude")] = jnp.asarray(norms[place])
    if not adapters:
        raise ModelLoadError(f"{directory / WEIGHTS}: there is no adapter in it.")
    full = to_params(saved, ((name, tensors[name]) for name in saved), jnp.float32)
    targets = tuple(sorted({layer_name(path) for name in adapted for path in modules[name]}))
    alpha, use_dora = config.scale() * config.r, config.use_dora
    lora = LoRA(
        config.r, alpha, config.dropout, targets, use_dora=use_dora, modules_to_save=config.saved
    )
    found = flax.traverse_util.unflatten_dict(adapters)
    return model.clone(lora=lora), overlaid(found, full)


def _saved(directory: Path, config, model: Transformer) -> dict:
    """Name of a tensor -> what it holds, of the modules that are there in full."""
    if not config.saved:
        return {}
    expected = expected_tensors(family_of(model.config.model_type), model.config)
    found = {n: p for n, p in expected.items() if module_name(n).endswith(config.saved)}
    unknown = [end for end in config.saved if not any(module_name(n).endswith(end) for n in found)]
    tied = model.config.tie_word_embeddings and any(p[0].path == EMBEDDINGS for p in found.values())
    if (
        unknown
        or (tied and not config.ties)
        or any(p[0].expert is not None for p in found.values())
    ):
        why = f"{join_some(unknown)} names no module of the model"
        if not unknown:
            why = "it names experts, which are read as adapters only"
            if tied and not config.ties:
                why = (
                    "embed_tokens would be trained apart from the output matrix, which the model "
                    "has in one with it; ensure_weight_tying true is read"
                )
        raise ModelLoadError(f"{directory / CONFIG}: modules_to_save {list(config.saved)}: {why}.")
    return {PREFIX + name: parts for name, parts in found.items()}


def _adapted(directory: Path, config, modules: Modules, files) -> list[str]:
    """The modules that have adapters: those that the fields name, or else those in the file."""
    experts = [name for name in modules if is_experts(name) and config.is_parameter(name)]
    modules = {name: paths for name, paths in modules.items() if not is_experts(name)}
    there = {name for name in modules if any(t in files for t in tensor_names(name))}
    named = {name: config.is_target(name) for name in modules}
    ignored = sorted(name for name in there if named[name] is False)
    if ignored:
        raise ModelLoadError(
            f"{directory / WEIGHTS} has adapters of {join_some(ignored)}, which {CONFIG} does not "
            "target, so that PEFT would leave them out. Name them in target_modules, or delete "
            "their tensors."
        )
    return [name for name in modules if named[name] or name in there] + experts


def modules_of(model: Transformer, params) -> Modules:
    """Name of a module, or of a parameter of experts, in transformers -> the paths of the weights
    of ours that it consists of, in order."""
    family = family_of(model.config.model_type)
    order = {module: place for place, module in enumerate(LAYER)}
    weights = [EMBEDDINGS, *target_weights(params, LoRA(target_modules=(ALL_LINEAR,)))]
    if model.config.num_experts:
        weights += target_weights(params, LoRA(target_modules=(ROUTER,)))
    modules: dict[str, list] = {}
    for path in sorted(weights, key=lambda p: order.get(module_of(p), -1) if p[1:] else -1):
        name = family.tensor_name(path, family.in_memory).removesuffix(WEIGHT)
        modules.setdefault(name, []).append(path)
    return modules


def is_experts(module: str) -> bool:
    return ".experts." in module


def tensor_names(module: str, adapted: Collection[str] = ()) -> tuple[str, str]:
    """The names of A and B, given all that have adapters."""
    if is_experts(module):
        module, parameter = module.rsplit(".", 1)
        if parameter == "gate_up_proj" and f"{module}.down_proj" in adapted:
            module += ".base_layer"
    if module == EMBEDDING:
        return f"{PREFIX}{module}.lora_embedding_A", f"{PREFIX}{module}.lora_embedding_B"
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def _from_file(a, b, experts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A and B of a file -> `[in, r]` and `[r, out]`, or `[E, in, r]` and `[E, r, out]`."""
    if not experts:
        return a.T, b.T
    (E,) = experts
    a = a.reshape(E, -1, a.shape[1]).transpose(0, 2, 1)
    return a, b.reshape(len(b), -1, E).transpose(2, 1, 0)


def magnitude_name(module: str) -> str:
    return f"{PREFIX}{module}.lora_magnitude_vector"
