"""Writing of adapters as PEFT reads them, see `relax.models.huggingface.peft`."""

import math
import os
import warnings
from pathlib import Path
from typing import TypeVar

import flax.traverse_util
import numpy as np

from relax import parallel
from relax.models.config import LoRA
from relax.models.families import family_of
from relax.models.huggingface import shards
from relax.models.huggingface.directories import new_directory, write_json
from relax.models.huggingface.peft import (
    PREFIX,
    WEIGHTS,
    is_experts,
    magnitude_name,
    modules_of,
    tensor_names,
)
from relax.models.huggingface.peft_config import CONFIG, WEIGHT
from relax.models.huggingface.tensors import expected_tensors, from_params, places
from relax.models.lora import SCALE, adapter_path
from relax.models.lora import Path as Weight
from relax.models.quantization import plain
from relax.models.trainable import module_name
from relax.models.transformer import Transformer
from relax.parallel import processes

T = TypeVar("T")


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
    scales: dict[str, float] = {}
    modules = modules_of(model, params)
    flat = flax.traverse_util.flatten_dict(params)
    family = family_of(model.config.model_type)
    adapted = {
        name: paths
        for name, paths in modules.items()
        if any(adapter_path(path, "lora_a") in flat for path in paths)
    }
    if not adapted:
        raise ValueError("params hold no adapter to save: pass those that a trainer has trained.")
    for name, paths in adapted.items():
        halves = ("lora_a", "lora_b")
        pairs = [[_whole(flat.get(adapter_path(path, h))) for h in halves] for path in paths]
        scales[name] = _scale(flat, paths, model.lora)
        widths = [flat[path].shape[-1] for path in paths]
        a, b = _joined(pairs, widths, family.alternating)
        ranks[name] = a.shape[-1]
        tensors |= zip(tensor_names(name, adapted), _to_file(a, b), strict=True)
        if model.lora.use_dora:
            tensors[magnitude_name(name)] = np.concatenate([_norms(flat, path) for path in paths])
    if model.lora.modules_to_save:
        for name, parts in expected_tensors(family, model.config).items():
            if model.lora.is_saved(module_name(name)):
                tensors[PREFIX + name] = from_params(parts, flat, np.dtype(np.float32))
    if not processes.is_main():
        return Path(path)
    alphas = {name: _alpha(model.lora, scales[name], r) for name, r in ranks.items()}
    fields = _fields(model.config.num_experts > 0, model.lora, list(modules), ranks, alphas)
    fields["ensure_weight_tying"] = model.config.tie_word_embeddings and any(
        "embed_tokens".endswith(end) for end in model.lora.modules_to_save
    )
    fields["base_model_name_or_path"] = base
    with new_directory(path) as (temporary, final):
        shards.write_shard(temporary / WEIGHTS, tensors)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        write_json(temporary / CONFIG, fields)
    return final


def _scale(flat: dict, paths: list[Weight], lora: LoRA) -> float:
    """The scale of a module's adapter, whose parts have the same."""
    own = [flat[path] for path in (adapter_path(path, SCALE) for path in paths) if path in flat]
    return float(_whole(own[0])) if own else lora.scale


def _norms(flat: dict, path: Weight) -> np.ndarray:
    """The trained norms of a layer's columns, or those that it has where it has no adapter."""
    trained = flat.get(adapter_path(path, "lora_magnitude"))
    if trained is not None:
        return np.asarray(_whole(trained), np.float32)
    return np.linalg.norm(np.asarray(_whole(plain(flat[path])), np.float32), axis=0)


def _whole(leaf):
    return None if leaf is None else parallel.to_host(leaf)


def _to_file(a, b) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of what reading does."""
    if a.ndim == 2:
        return a.T, b.T
    E, D, r = a.shape
    return a.transpose(0, 2, 1).reshape(E * r, D), b.transpose(2, 1, 0).reshape(-1, r * E)


def _joined(pairs, widths, alternating):
    """Adapters of layers with the same input as one: A side by side, B in blocks."""
    a = np.concatenate([np.asarray(a, np.float32) for a, _ in pairs if a is not None], axis=-1)
    b = np.zeros((*a.shape[:-2], a.shape[-1], sum(widths)), np.float32)
    row = 0
    for (_, part), place in zip(pairs, places(widths, alternating), strict=True):
        if part is not None:
            r = part.shape[-2]
            b[..., row : row + r, place] = part
            row += r
    return a, b


def _fields(
    has_experts: bool,
    lora: LoRA,
    modules: list[str],
    ranks: dict[str, int],
    alphas: dict[str, float],
) -> dict:
    """adapter_config.json.

    PEFT 0.21 with transformers 5 takes every target of a model with experts that ends in
    `gate_proj`, `up_proj` or `down_proj` for the experts, whatever stands before it. The feed-
    forward blocks beside experts, and routers, are therefore named by their weights, and experts by
    their parameters. PEFT adapts all of these without dropout.
    """

    def number(value):
        return int(value) if value == int(value) else value

    by_weight = [n for n in ranks if has_experts and ".mlp." in n]
    parameters = {_in_layer(n) if is_experts(n) else n + WEIGHT for n in by_weight}
    if by_weight and lora.dropout:
        warnings.warn(
            f"lora_dropout {lora.dropout} is written as 0: PEFT has none for the experts, routers "
            "and dense layers of a model with experts.",
            stacklevel=3,
        )
    others = _short({name: r for name, r in ranks.items() if r != lora.r}, modules)
    other_alphas = _short({n: a for n, a in alphas.items() if a != number(lora.alpha)}, modules)
    plain = {name: r for name, r in ranks.items() if name not in by_weight}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": number(lora.alpha),
        "lora_dropout": 0.0 if by_weight else lora.dropout,
        "target_modules": sorted(_short(plain, modules)),
        **({"target_parameters": sorted(parameters)} if by_weight else {}),
        "rank_pattern": others,
        "alpha_pattern": {name: number(alpha) for name, alpha in other_alphas.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": list(lora.modules_to_save) or None,
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
    }


def _in_layer(name: str) -> str:
    """`mlp.experts.down_proj` of `model.layers.0.mlp.experts.down_proj`."""
    return name.split(".", 3)[3]


def _alpha(lora: LoRA, scale: float, r: int) -> float:
    """The alpha with which an adapter of rank r has a scale."""
    alpha = scale * (math.sqrt(r) if lora.use_rslora else r)
    return round(alpha) if abs(alpha - round(alpha)) < 1e-5 else alpha


def _short(values: dict[str, T], modules: list[str]) -> dict[str, T]:
    """`q_proj` for all modules that end so, where they have one value; else their full names."""
    short: dict[str, T] = {}
    for name, value in values.items():
        last = name.rsplit(".", 1)[-1]
        alike = [module for module in modules if module.rsplit(".", 1)[-1] == last]
        short[last if all(values.get(module) == value for module in alike) else name] = value
    return short
