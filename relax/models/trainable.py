"""Partition of weights into trained and frozen ones.

Parameters are nested dicts, and a weight is named by its path in them: `embed_tokens`, `lm_head`,
`norm/scale`, `layers_3/q_proj/kernel`, `layers_3/mlp_norm/scale`, `layers_3/experts/router`.
`partition` cuts them in two: what is trained (`TrainState.params`) and what the loss only reads
(`TrainState.frozen`, under "base"). `merge` puts the two together again, inside the loss.
"""

import re
from collections.abc import Callable

import flax.traverse_util
import jax

from relax.errors import ConfigError
from relax.models.config import TransformerConfig
from relax.models.families import family_of
from relax.models.heads import HEAD
from relax.models.lora import init_adapters, is_adapter, is_beside, target_weights
from relax.models.quantization import is_quantized
from relax.models.transformer import Transformer


def merge(params, frozen) -> dict:
    """All parameters of a model: those that are trained and those under "base" in `frozen`.

    >>> merge({"a": {"b": 1}}, {"base": {"a": {"c": 2}, "d": 3}})
    {'a': {'c': 2, 'b': 1}, 'd': 3}
    """
    return _merged(frozen["base"], params) if "base" in frozen else params


def _merged(one, other):
    out = dict(one)
    for name, value in other.items():
        if name in out and not isinstance(value, dict):
            raise ValueError(f"a weight is either trained or frozen, and {name!r} is both.")
        out[name] = _merged(out[name], value) if name in out else value
    return out


def partition(
    model: Transformer, params, key: jax.Array, freeze: str | None = None
) -> tuple[dict, dict]:
    """Splits all parameters of a model into trained and frozen ones.

    Args:
      model: with `lora`, its adapters and a head are trained and all else is frozen.
      params: all of them; adapters that are not among them are made.
      key: makes the adapters.
      freeze: a regular expression: a weight in whose path it is found is frozen.

    Returns:
      `(trained, frozen)` with `merge(trained, frozen)` the whole; `frozen` is empty where all are
      trained.

    Raises:
      ConfigError: `freeze` is no regular expression, or fits no weight or all of them, or is given
        beside adapters; or an adapter's target is no linear layer.
    """
    if model.lora is None:
        return (params, {}) if freeze is None else _freeze(params, freeze)
    if freeze is not None:
        raise ConfigError("freeze has no effect: with adapters all other weights are frozen.")
    names = module_names(model.config, params)
    saved = _saved(model, params, names)
    trained, base = split(params, lambda p: is_adapter(p) or p[0] == HEAD or p in saved)
    if not any(map(is_adapter, flax.traverse_util.flatten_dict(trained))):
        made = init_adapters(key, base, model.lora, lambda path: names[path])
        adapters, scales = split(made, is_adapter)
        trained, base = _merged(trained, adapters), _merged(base, scales)
    return trained, {"base": base}


def module_names(config: TransformerConfig, params) -> dict[tuple[str, ...], str]:
    """Path -> name of the module, or of the parameter of experts, in transformers.

    >>> config = TransformerConfig(2, 2, 2, 1, 1, 1, 2)
    >>> module_names(config, {"layers_0": {"q_proj": {"bias": 0}}})
    {('layers_0', 'q_proj', 'bias'): 'model.layers.0.self_attn.q_proj'}
    """
    family = family_of(config.model_type)
    return {
        path: module_name(family.tensor_name(path, family.in_memory))
        for path in flax.traverse_util.flatten_dict(params)
        if not is_beside(path) and path[0] != HEAD
    }


def module_name(tensor: str) -> str:
    """The module of a tensor; experts in one tensor are parameters of one, and stay named."""
    return tensor.removesuffix(".weight").removesuffix(".bias")


def _saved(model: Transformer, params, names: dict) -> set[tuple[str, ...]]:
    """The paths of what `modules_to_save` names, which is trained in full.

    Raises:
      ConfigError: it names nothing, an adapter's target, experts, what is quantised, or the output
        matrix of a model that has none of its own.
    """
    assert model.lora is not None  # the caller has looked
    lora = model.lora
    found: dict[tuple[str, ...], str] = {}
    flat = flax.traverse_util.flatten_dict(params)
    for name in lora.modules_to_save:
        paths = [path for path, module in names.items() if module.endswith(name)]
        if not paths:
            raise ConfigError(
                f"lora_modules_to_save must name modules of the model, and none ends in {name!r}. "
                "Names are those of transformers, such as embed_tokens, lm_head, norm or q_proj."
            )
        found |= dict.fromkeys(paths, name)
    targets = set(target_weights(params, lora)) if found else set()
    for path, name in found.items():
        if path in targets or (*path[:-1], "kernel") in targets:
            raise ConfigError(
                f"lora_modules_to_save trains {name} in full, and lora_target_modules adapts it: "
                "name it in one of them."
            )
        if path[-2:-1] == ("experts",) or is_quantized(flat[path]):
            what = "experts" if path[-2:-1] == ("experts",) else "quantised weights"
            raise ConfigError(
                f"lora_modules_to_save cannot train {what} in full, got {name}. Adapt them instead."
            )
    return set(found)


def overlaid(params, others) -> dict:
    """Parameters with others in their places, or beside them.

    >>> overlaid({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4})
    {'a': {'b': 3, 'c': 2}, 'd': 4}
    """
    flat = flax.traverse_util.flatten_dict
    return flax.traverse_util.unflatten_dict(flat(params) | flat(others))


def split(params, is_chosen: Callable[[tuple[str, ...]], bool]) -> tuple[dict, dict]:
    """The weights whose paths are chosen, and the others.

    >>> split({"a": {"b": 1, "c": 2}}, lambda path: path[-1] == "b")
    ({'a': {'b': 1}}, {'a': {'c': 2}})
    """
    flat = flax.traverse_util.flatten_dict(params)
    parts: tuple[dict, dict] = ({}, {})
    for path, leaf in flat.items():
        parts[not is_chosen(path)][path] = leaf
    chosen, others = map(flax.traverse_util.unflatten_dict, parts)
    return chosen, others


def _freeze(params, freeze: str):
    try:
        pattern = re.compile(freeze)
    except re.error as error:
        raise ConfigError(
            f"freeze must be a regular expression, got {freeze!r}: {error}."
        ) from error
    frozen, trained = split(params, lambda path: bool(pattern.search("/".join(path))))
    if not frozen or not trained:
        paths = ["/".join(path) for path in flax.traverse_util.flatten_dict(params)]
        raise ConfigError(
            f"freeze must fit some weights and not all, and {freeze!r} fits "
            f"{len(paths) if frozen else 'none'} of {len(paths)}, such as {', '.join(paths[:3])}."
        )
    return trained, {"base": frozen}
