"""Reward functions by name: built-in, `package.module.function`, `path/to/file.py:function`."""

import functools
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping

from relax.config.imports import load_object
from relax.config.names import suggestion
from relax.errors import ConfigError

# Import path of each built-in function or factory.
SHIPPED = {
    "accuracy_reward": "relax.rewards.mathematics.accuracy_reward",
    "cosine_scaled_reward": "relax.rewards.mathematics.get_cosine_scaled_reward",
    "exact_match": "relax.rewards.answers.get_exact_match",
    "json_schema": "relax.rewards.structure.get_json_schema",
    "last_number_match": "relax.rewards.answers.get_last_number_match",
    "reasoning_accuracy_reward": "relax.rewards.mathematics.reasoning_accuracy_reward",
    "reasoning_gym": "relax.rewards.tasks.reasoning_gym",
    "regex_match": "relax.rewards.structure.get_regex_match",
    "repetition_penalty_reward": "relax.rewards.lengths.get_repetition_penalty_reward",
    "soft_overlong_punishment_reward": "relax.rewards.lengths.get_soft_overlong_punishment",
    "think_format_reward": "relax.rewards.structure.think_format_reward",
}

ENVIRONMENTS = {"calculator": "relax.rewards.calculator.Calculator"}


def reward_factory(factory: Callable) -> Callable:
    """Marks a function that makes a reward function from parameters.

    If it is named in `reward_funcs`, it is called with its `reward_kwargs`. A function made in a
    notebook can be made again in another process if the parameters are plain values.
    """

    @functools.wraps(factory)
    def make(*args, **kwargs):
        bound = inspect.signature(factory).bind(*args, **kwargs)
        reward = factory(*args, **kwargs)
        where = f"{factory.__module__}.{factory.__qualname__}"
        reward.reference = (where, dict(bound.arguments))
        return reward

    make.is_reward_factory = True  # type: ignore[attr-defined]  # load_reward reads it
    return make


def load_reward(spec: str, parameters: Mapping | None = None) -> Callable:
    """Finds a reward function.

    Args:
      spec: a built-in name (the prefix `get_` and the suffix `_reward` are optional), a
        dotted path, or `path/to/file.py:function`.
      parameters: arguments of a factory, or keyword arguments to bind to a plain function.

    A function's attribute `prepare`, if any, is called: it imports what the function needs and
    raises if that is not installed.

    Raises:
      ConfigError: there is no such function, or it does not accept these parameters.

    >>> load_reward("soft_overlong_punishment", {"max_completion_len": 9, "soft_punish_cache": 2})(
    ...     completion_ids=[[1] * 8])
    [-0.5]
    """
    found = _find(spec)
    if not callable(found):
        raise ConfigError(f"reward {spec!r} is a {type(found).__name__}, not a function.")
    parameters = dict(parameters or {})
    if getattr(found, "is_reward_factory", False):
        _check_parameters(spec, found, parameters)
        return found(**parameters)
    if isinstance(found, type):
        raise ConfigError(f"reward {spec!r} is a class: name a function or an object of it.")
    getattr(found, "prepare", lambda: None)()
    if parameters:
        _check_parameters(spec, found, parameters, partly=True)
        return functools.partial(found, **parameters)
    return found


def parameters_by_reward(specs: list, given: Mapping | None) -> list[dict]:
    """Assigns `reward_kwargs`, a dict of parameters by reward name, to the rewards.

    Raises:
      ConfigError: a name matches no reward, or parameters are no dict.

    >>> parameters_by_reward(["exact_match", "a.py:f"], {"f": {"k": 2}})
    [{}, {'k': 2}]
    """
    left = dict(given or {})
    parameters = []
    for spec in specs:
        names = _names(spec) if isinstance(spec, str) else []
        key = next((name for name in names if name in left), None)
        value = {} if key is None else left[key]
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"reward_kwargs[{key!r}] must be an object of parameters, got {value!r}."
            )
        parameters.append(dict(value))
    known = {name for spec in specs if isinstance(spec, str) for name in _names(spec)}
    unknown = [name for name in left if name not in known]
    if unknown:
        asked = ", ".join(repr(spec) for spec in specs if isinstance(spec, str)) or "none by name"
        raise ConfigError(
            f"reward_kwargs has parameters for {unknown[0]!r}, which is none of the reward_funcs "
            f"({asked}).{suggestion(unknown[0], sorted(known))}"
        )
    return parameters


def _names(spec: str) -> list[str]:
    """The accepted names of a reward in `reward_kwargs`."""
    names = [spec, spec.replace(":", ".").rpartition(".")[2]]
    return names + ([_stem(spec)] if _stem(spec) in _stems() else [])


def _stem(name: str) -> str:
    return name.replace("-", "_").removeprefix("get_").removesuffix("_reward")


def _stems() -> dict[str, str]:
    return {_stem(name): name for name in SHIPPED}


def load_environment(spec: str) -> Callable:
    """Finds the class of an environment: `calculator`, a dotted path, or `path/to/file.py:Class`.

    Raises:
      ConfigError: there is no such class.

    >>> load_environment("calculator")().stop
    ('</calc>',)
    """
    found = _find(ENVIRONMENTS.get(spec, spec), "environment")
    if not callable(found):
        raise ConfigError(f"environment {spec!r} is a {type(found).__name__}, not a class.")
    return found


def load_tool(spec: str) -> Callable:
    """Finds the function of a tool: a dotted path, or `path/to/file.py:function`.

    Raises:
      ConfigError: there is no such function.

    >>> load_tool("relax.rewards.calculator.calculate")("1+2")
    '3'
    """
    if ":" not in spec and "." not in spec:
        raise ConfigError(
            f"unknown tool {spec!r}. A tool is package.module.function or path/to/file.py:function."
        )
    found = load_object(spec, "tool")
    if not callable(found):
        raise ConfigError(f"tool {spec!r} is a {type(found).__name__}, not a function.")
    return found


def tool_specs(spec: str) -> list[str]:
    """One name per function of `path/to/file.py:function[,function]`.

    >>> tool_specs("tools.py:add,multiply"), tool_specs("package.module.f")
    (['tools.py:add', 'tools.py:multiply'], ['package.module.f'])
    """
    path, colon, names = spec.rpartition(":")
    return [f"{path}:{name.strip()}" for name in names.split(",")] if colon else [spec]


def _find(spec: str, what: str = "reward"):
    path, colon, name = spec.rpartition(":")
    if spec.startswith("model:"):
        raise ConfigError(
            f"{what} {spec!r} is a model, which runs with the policy: name it on the command "
            "line, or give relax.engine.reward_model.ModelReward(DIR, tokenizer)."
        )
    if colon or "." in spec:
        return load_object(spec, what)
    shipped = _stems().get(_stem(spec))
    if what == "environment":
        raise ConfigError(
            f"unknown environment {spec!r}. There are {', '.join(ENVIRONMENTS)}, "
            "package.module.Class and path/to/file.py:Class."
        )
    if shipped is None:
        raise ConfigError(
            f"unknown reward {spec!r}.{suggestion(spec, SHIPPED)} There are "
            f"{', '.join(SHIPPED)}, package.module.function and path/to/file.py:function."
        )
    module, _, name = SHIPPED[shipped].rpartition(".")
    return getattr(importlib.import_module(module), name)


def _check_parameters(spec: str, function: Callable, given: dict, partly: bool = False) -> None:
    parameters = inspect.signature(function).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in given.items():
        if name not in parameters and not anything:
            raise ConfigError(
                f"reward {spec!r} has no parameter {name!r}.{suggestion(name, parameters)} "
                f"It has {', '.join(parameters) or 'none'}."
            )
        expected = typing.get_type_hints(function).get(name)
        if not partly and expected is not None and not _fits(value, expected):
            shown = getattr(expected, "__name__", str(expected))
            raise ConfigError(f"reward {spec!r}: {name} must be {shown}, got {value!r}.")
    missing = [name for name, p in parameters.items() if p.default is p.empty and name not in given]
    if missing and not partly:
        example = ", ".join(f'"{name}": ...' for name in missing)
        raise ConfigError(
            f"reward {spec!r} needs {' and '.join(missing)}: pass "
            f"--reward_kwargs '{{\"{spec}\": {{{example}}}}}'."
        )


def _fits(value, expected) -> bool:
    """Whether a value has the annotated type; an int counts as a float, a bool as neither.

    >>> _fits(1, float), _fits(True, int), _fits(None, dict | None)
    (True, False, True)
    """
    is_union = isinstance(expected, types.UnionType)
    for option in typing.get_args(expected) if is_union else (expected,):
        option = typing.get_origin(option) or option
        if option is float and type(value) is int:
            return True
        if isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return True
    return False
