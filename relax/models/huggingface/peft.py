"""Adapters in PEFT's layout: a directory with adapter_config.json and adapter_model.safetensors.

A field of the configuration that would change the computation is supported or an error.
Linear layers that are one tensor in the files of a family (Phi-3's queries, keys and values) have
one adapter there: read, its A goes to each of ours and its B is cut into their rows; written, its
rank is the sum of ours, and rank_pattern and alpha_pattern say so.
"""

import os
import warnings
from pathlib import Path

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from relax import parallel
from relax.config.text import join_some
from relax.errors import ModelLoadError
from relax.models.config import LoRA, TransformerConfig
from relax.models.families import family_of
from relax.models.families.family import LAYER
from relax.models.huggingface import shards
from relax.models.huggingface.directories import new_directory, write_json
from relax.models.huggingface.peft_config import CONFIG, WEIGHT, read_adapter_config
from relax.models.huggingface.pretrained import load_pretrained
from relax.models.lora import ADAPTER, ALL_LINEAR, merge_adapters, target_layers
from relax.models.trainable import merge
from relax.models.transformer import Transformer
from relax.parallel import processes

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

Modules = dict[str, list[tuple[str, ...]]]


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
    assert with_adapter.lora is not None  # load_adapter sets it
    return model, merge_adapters(merge(adapters, {"base": params}), with_adapter.lora)


def load_adapter(path: str | os.PathLike, model: Transformer, params) -> tuple[Transformer, dict]:
    """Reads an adapter.

    Args:
      path: its directory.
      model, params: what it belongs to.

    Returns:
      The model with `lora` set, and the adapters alone, float32, in the nesting of `params`.

    Raises:
      ModelLoadError: the adapter is unsupported or does not fit the model.
    """
    directory = Path(path)
    config = read_adapter_config(directory)
    modules, kernels = _modules(model, params), flax.traverse_util.flatten_dict(params)
    with shards.open_tensors(directory, WEIGHTS) as file:
        files = dict.fromkeys(file.keys(), WEIGHTS)
    adapted = _adapted(directory, config, modules, files)
    shapes, widths = {}, {}
    for name in adapted:
        widths[name] = [kernels[*path, "kernel"].shape[1] for path in modules[name]]
        r = config.rank(name)
        a_name, b_name = _tensor_names(name)
        shapes[a_name] = (r, kernels[*modules[name][0], "kernel"].shape[0])
        shapes[b_name] = (sum(widths[name]), r)
    shards.check_tensors(directory, shapes, files)
    tensors = dict(shards.read_tensors(directory, shapes, files))
    adapters = {}
    for name in adapted:
        a, b = (np.asarray(tensors[half], np.float32) for half in _tensor_names(name))
        b = b * np.float32(config.scale(name) / config.scale())
        rows = np.split(b, np.cumsum(widths[name])[:-1])
        for layer, part in zip(modules[name], rows, strict=True):
            adapters[*layer, "lora_a"] = jnp.asarray(a.T)
            adapters[*layer, "lora_b"] = jnp.asarray(part.T)
    if not adapters:
        raise ModelLoadError(f"{directory / WEIGHTS}: there is no adapter in it.")
    targets = tuple(sorted({layer[-2] for layer in adapters}))
    lora = LoRA(config.r, config.scale() * config.r, config.dropout, targets)
    return model.clone(lora=lora), flax.traverse_util.unflatten_dict(adapters)


def _adapted(directory: Path, config, modules: Modules, files) -> list[str]:
    """The modules that have adapters: those that the fields name, or else those in the file."""
    there = {name for name in modules if any(t in files for t in _tensor_names(name))}
    named = {name: config.is_target(name) for name in modules}
    ignored = sorted(name for name in there if named[name] is False)
    if ignored:
        raise ModelLoadError(
            f"{directory / WEIGHTS} has adapters of {join_some(ignored)}, which {CONFIG} does not "
            "target, so that PEFT would leave them out. Name them in target_modules, or delete "
            "their tensors."
        )
    return [name for name in modules if named[name] or name in there]


def save_adapter(
    path: str | os.PathLike, model: Transformer, params, base: str, tokenizer=None
) -> Path:
    """Writes adapters as PEFT reads them.

    The directory appears whole or not at all; one that is there is replaced.

    Args:
      path: the directory.
      model: with `lora`.
      params: all parameters; of these, the adapters are written.
      base: the directory or hub name of the model that they belong to.
      tokenizer: written beside them.
    """
    if model.lora is None:
        raise ValueError("a model without adapters has none to save: its lora is None.")
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    modules = _modules(model, params)
    flat = flax.traverse_util.flatten_dict(params)
    for name, paths in modules.items():
        pairs = [[_whole(flat.get((*path, half))) for half in ADAPTER] for path in paths]
        if all(a is None for a, _ in pairs):
            continue
        widths = [flat[*path, "kernel"].shape[1] for path in paths]
        a, b = _joined(pairs, widths)
        ranks[name] = a.shape[0]
        tensors |= zip(_tensor_names(name), (a, b), strict=True)
    if not processes.is_main():
        return Path(path)
    fields = _fields(model.config, model.lora, list(modules), ranks)
    fields["base_model_name_or_path"] = base
    with new_directory(path) as (temporary, final):
        shards.write_shard(temporary / WEIGHTS, tensors)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        write_json(temporary / CONFIG, fields)
    return final


def _whole(leaf):
    return None if leaf is None else parallel.to_host(leaf)


def _modules(model: Transformer, params) -> Modules:
    """Name of a linear layer in transformers -> the paths of ours that it consists of, in order."""
    family, order = family_of(model.config.model_type), list(LAYER)
    layers = target_layers(params, LoRA(target_modules=(ALL_LINEAR,)))
    modules: dict[str, list] = {}
    for path in sorted(layers, key=lambda path: order.index(path[-1])):
        name = family.tensor_name((*path, "kernel")).removesuffix(WEIGHT)
        modules.setdefault(name, []).append(path)
    return modules


def _tensor_names(module: str) -> tuple[str, str]:
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


# Writing.


def _joined(pairs, widths):
    """Adapters of layers with the same input as one: A stacked, B in blocks."""
    a = [np.asarray(a, np.float32).T for a, _ in pairs if a is not None]
    b = np.zeros((sum(widths), sum(len(rows) for rows in a)), np.float32)
    row = column = 0
    for (_, part), width in zip(pairs, widths, strict=True):
        if part is not None:
            part = np.asarray(part, np.float32).T
            b[row : row + width, column : column + part.shape[1]] = part
            column += part.shape[1]
        row += width
    return np.ascontiguousarray(np.concatenate(a)), b


def _fields(
    config: TransformerConfig, lora: LoRA, modules: list[str], ranks: dict[str, int]
) -> dict:
    """adapter_config.json.

    PEFT 0.21 with transformers 5 takes every target of a model with experts that ends in
    `gate_proj`, `up_proj` or `down_proj` for the experts, whatever stands before it. The feed-
    forward blocks beside experts are therefore named by their weights, which PEFT adapts without
    dropout.
    """

    def number(value):
        return int(value) if value == int(value) else value

    by_weight = [n for n in ranks if config.num_experts and ".mlp." in n]
    if by_weight and lora.dropout:
        warnings.warn(
            f"lora_dropout {lora.dropout} is written as 0: PEFT has none for the dense layers of "
            "a model with experts.",
            stacklevel=3,
        )
    others = _short({name: r for name, r in ranks.items() if r != lora.r}, modules)
    plain = {name: r for name, r in ranks.items() if name not in by_weight}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": number(lora.alpha),
        "lora_dropout": 0.0 if by_weight else lora.dropout,
        "target_modules": sorted(_short(plain, modules)),
        **({"target_parameters": [name + WEIGHT for name in by_weight]} if by_weight else {}),
        "rank_pattern": others,
        "alpha_pattern": {name: number(lora.alpha / lora.r * r) for name, r in others.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _short(values: dict[str, int], modules: list[str]) -> dict[str, int]:
    """`q_proj` for all modules that end so, where they have one value; else their full names."""
    short = {}
    for name, value in values.items():
        last = name.rsplit(".", 1)[-1]
        alike = [module for module in modules if module.rsplit(".", 1)[-1] == last]
        short[last if all(values.get(module) == value for module in alike) else name] = value
    return short
