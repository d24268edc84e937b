"""Adapters in PEFT's layout: a directory with adapter_config.json and adapter_model.safetensors.

A field of the configuration that would change what the adapter computes is honoured or refused.
Linear layers that are one tensor in the files of a family (Phi-3's queries, keys and values) have
one adapter there: read, its A goes to each of ours and its B is cut into their rows; written, its
rank is the sum of ours, and rank_pattern and alpha_pattern say so.
"""

import math
import os
from pathlib import Path

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from relax import parallel
from relax.errors import ModelLoadError
from relax.models.config import LoRA
from relax.models.families import family_of
from relax.models.families.family import LAYER
from relax.models.huggingface import shards
from relax.models.huggingface.directories import new_directory, read_json, write_json
from relax.models.huggingface.pretrained import load_pretrained
from relax.models.lora import ADAPTER, ALL_LINEAR, merge_adapters, target_layers
from relax.models.trainable import merge
from relax.models.transformer import Transformer
from relax.parallel import processes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

Modules = dict[str, list[tuple[str, ...]]]

# Fields that would change the computation in a way we do not have, and the values we do have; null
# is one of them everywhere.
REQUIRED_VALUES = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    "revision": ("main",),
    # The others change the base's weights as well, or stand for another computation.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    **dict.fromkeys(("fan_in_fan_out", "use_dora", "use_qalora", "lora_bias"), (False,)),
    **dict.fromkeys(("modules_to_save", "layer_replication", "target_parameters"), ([],)),
    **dict.fromkeys(("trainable_token_indices", "alora_invocation_tokens"), ([], {})),
    **dict.fromkeys(("megatron_config", "arrow_config", "kasa_config", "velora_config"), ()),
    **dict.fromkeys(("monteclora_config", "use_bdlora"), (False,)),
}
# Fields that a loaded adapter does not depend on: what made it, and bookkeeping.
IGNORED_FIELDS = set(
    "auto_mapping corda_config ensure_weight_tying eva_config inference_mode layers_pattern "
    "loftq_config lora_ga_config megatron_core peft_version qalora_group_size "
    "runtime_config".split()
)
READ = set(
    "alpha_pattern base_model_name_or_path exclude_modules layers_to_transform lora_alpha "
    "lora_dropout r rank_pattern target_modules use_rslora".split()
)


def is_adapter_directory(directory: str | os.PathLike) -> bool:
    """Whether a directory holds an adapter in place of a model.

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
    return _read_config(Path(directory))["base_model_name_or_path"]


def load_merged(directory: str | os.PathLike, dtype=jnp.float32, **options):
    """The model that an adapter belongs to, with the adapter merged into it.

    Args:
      directory: with the adapter.
      dtype, **options: as for `load_pretrained`.
    """
    model, params = load_pretrained(base_of(directory), dtype, **options)
    with_adapter, adapters = load_adapter(directory, model, params)
    return model, merge_adapters(merge(adapters, {"base": params}), with_adapter.lora)


def load_adapter(path: str | os.PathLike, model: Transformer, params) -> tuple[Transformer, dict]:
    """Reads an adapter.

    Args:
      path: its directory.
      model, params: what it belongs to.

    Returns:
      The model with `lora` set, and the adapters alone, float32, in the nesting of `params`.

    Raises:
      ModelLoadError: the adapter computes what we do not, or does not fit the model.
    """
    directory = Path(path)
    fields = _read_config(directory)
    modules, kernels = _modules(model, params), flax.traverse_util.flatten_dict(params)
    with shards.open_tensors(directory, WEIGHTS) as file:
        files = dict.fromkeys(file.keys(), WEIGHTS)
    shapes, widths = {}, {}
    adapted = _adapted(fields, modules, files)
    for name in adapted:
        widths[name] = [kernels[*path, "kernel"].shape[1] for path in modules[name]]
        r = _of(fields, "rank_pattern", name, fields["r"])
        a, b = _tensor_names(name)
        shapes[a] = (r, kernels[*modules[name][0], "kernel"].shape[0])
        shapes[b] = (sum(widths[name]), r)
    shards.check_tensors(directory, shapes, files)
    tensors = dict(shards.read_tensors(directory, shapes, files))
    scale, adapters = _scale(fields, ""), {}
    for name in adapted:
        a, b = (np.asarray(tensors[half], np.float32) for half in _tensor_names(name))
        b = b * np.float32(_scale(fields, name) / scale)
        rows = np.split(b, np.cumsum(widths[name])[:-1])
        for path, part in zip(modules[name], rows, strict=True):
            adapters[*path, "lora_a"] = jnp.asarray(a.T)
            adapters[*path, "lora_b"] = jnp.asarray(part.T)
    if not adapters:
        raise ModelLoadError(f"{directory / WEIGHTS}: there is no adapter in it.")
    targets = tuple(sorted({path[-2] for path in adapters}))
    lora = LoRA(fields["r"], scale * fields["r"], fields["lora_dropout"], targets)
    return model.clone(lora=lora), flax.traverse_util.unflatten_dict(adapters)


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
    tensors, ranks = {}, {}
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
    fields = _fields(model.lora, list(modules), ranks) | {"base_model_name_or_path": base}
    if not processes.is_main():
        return Path(path)
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
        name = family.tensor_name((*path, "kernel")).removesuffix(".weight")
        modules.setdefault(name, []).append(path)
    return modules


# Reading.


def _read_config(directory: Path) -> dict:
    where = directory / CONFIG
    fields = read_json(directory, CONFIG)
    unknown = sorted(fields.keys() - REQUIRED_VALUES.keys() - IGNORED_FIELDS - READ)
    if unknown:
        raise ModelLoadError(
            f"{where}: fields that ReLax does not know, and so cannot honour: {', '.join(unknown)}."
        )
    fields = {name: value for name, value in fields.items() if value is not None}
    for name in REQUIRED_VALUES.keys() & fields.keys():
        if fields[name] not in REQUIRED_VALUES[name]:
            raise ModelLoadError(
                f"{where}: {name} is {repr(fields[name])[:80]}, which is not implemented; only "
                f"{' or '.join(map(repr, REQUIRED_VALUES[name])) or 'its absence'} is."
            )
    fields = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False} | fields
    fields = {"rank_pattern": {}, "alpha_pattern": {}, "target_modules": ""} | fields
    for name, fits, wanted in (
        ("peft_type", lambda v: True, "LORA"),
        ("base_model_name_or_path", lambda v: isinstance(v, str) and v, "a text"),
        ("r", _is_rank, "a whole number above 0"),
        ("lora_alpha", _is_positive, "a number above 0"),
        ("lora_dropout", lambda v: v == 0 or _is_positive(v) and v < 1, "from 0 to below 1"),
        ("use_rslora", lambda v: isinstance(v, bool), "true or false"),
        ("rank_pattern", lambda v: _is_pattern(v, _is_rank), "whole numbers by plain names"),
        ("alpha_pattern", lambda v: _is_pattern(v, _is_positive), "numbers by plain names"),
    ):
        if name not in fields or not fits(fields[name]):
            got = repr(fields.get(name))[:80]
            raise ModelLoadError(f"{where}: {name} must be {wanted}, got {got}.")
    return fields


def _is_rank(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**20


def _is_positive(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e38


def _is_pattern(value, fits) -> bool:
    """PEFT takes the names for regular expressions; those that are none are all we need."""
    return isinstance(value, dict) and all(
        name.replace(".", "_").isidentifier() and fits(number) for name, number in value.items()
    )


def _of(fields: dict, pattern: str, name: str, default):
    """The value of the first key that is the module's name, or the end of it."""
    found = [v for key, v in fields[pattern].items() if f".{name}".endswith(f".{key}")]
    return found[0] if found else default


def _scale(fields: dict, name: str) -> float:
    r = _of(fields, "rank_pattern", name, fields["r"])
    alpha = _of(fields, "alpha_pattern", name, fields["lora_alpha"])
    return alpha / (math.sqrt(r) if fields["use_rslora"] else r)


def _adapted(fields: dict, modules: Modules, files) -> list[str]:
    """The modules that have adapters: those in the file, and those that the fields name."""
    targets = fields["target_modules"]
    if fields.get("layers_to_transform") or fields.get("exclude_modules"):
        targets = ""  # the file alone tells
    ends = tuple(f".{target}" for target in targets) if isinstance(targets, list) else ()
    return [
        name
        for name in modules
        if targets == ALL_LINEAR
        or f".{name}".endswith(ends)
        or any(tensor in files for tensor in _tensor_names(name))
    ]


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


def _fields(lora: LoRA, modules: list[str], ranks: dict[str, int]) -> dict:
    def number(value):
        return int(value) if value == int(value) else value

    others = _short({name: r for name, r in ranks.items() if r != lora.r}, modules)
    scale = lora.alpha / lora.r
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": number(lora.alpha),
        "lora_dropout": lora.dropout,
        "target_modules": sorted(_short(ranks, modules)),
        "rank_pattern": others,
        "alpha_pattern": {name: number(scale * r) for name, r in others.items()},
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
