"""PEFT's adapter_config.json: modules with adapters, their ranks and scales.

A field that would change the computation is supported or an error. Patterns of names are
matched as `peft.utils.other.get_pattern_key` does (0.21): the first key of which
`(.*\\.)?(KEY)$` matches the module's name, so that a dot stands for any character.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from relax.errors import ModelLoadError
from relax.files import read_json
from relax.models.lora import ALL_LINEAR

CONFIG = "adapter_config.json"
WEIGHT = ".weight"

# Fields that would change the computation in unsupported ways, and their supported values; null is
# always supported.
REQUIRED_VALUES: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    "revision": ("main",),
    # The others also change the base's weights, or mean another computation.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    **dict.fromkeys(("fan_in_fan_out", "use_qalora", "lora_bias"), (False,)),
    "layer_replication": ([],),
    **dict.fromkeys(("trainable_token_indices", "alora_invocation_tokens"), ([], {})),
    **dict.fromkeys(("megatron_config", "arrow_config", "kasa_config", "velora_config"), ()),
    **dict.fromkeys(("monteclora_config", "use_bdlora"), (False,)),
}
# Fields that a loaded adapter does not depend on: what made it, and bookkeeping.
IGNORED_FIELDS = set(
    "auto_mapping corda_config eva_config inference_mode "
    "loftq_config lora_ga_config megatron_core peft_version qalora_group_size "
    "runtime_config".split()
)
READ = set(
    "alpha_pattern base_model_name_or_path exclude_modules layers_pattern layers_to_transform "
    "ensure_weight_tying lora_alpha lora_dropout modules_to_save r rank_pattern target_modules "
    "target_parameters use_dora "
    "use_rslora".split()
)

# Keys of patterns are regular expressions, which could run for ever: letters, wildcards, classes
# and unrepeated groups are read, with few repeats. A key is tried on every module of a model.
_ATOM = r"(?:[\w-]|\.|\\[.dw-]|\[[\w-]+\])"
_KEY = re.compile(rf"\^?(?:{_ATOM}[*+?]?|\||\((?:\?:)?|\))*\$?")
KEY_LENGTH, KEY_REPEATS, KEY_GROUPS = 500, 3, 3
PATTERN_KEYS, REPEATING_KEYS = 10_000, 16


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The contents of adapter_config.json.

    Attributes:
      base: directory or hub name of the model that the adapter belongs to.
      r, alpha: rank and numerator of the scale where no pattern says otherwise.
      dropout: share of the adapters' inputs that training drops.
      use_rslora: the scale is alpha / sqrt(r) in place of alpha / r.
      use_dora: every adapter has a vector of norms.
      ranks, alphas: compiled key of a pattern -> value, in the order of the file.
      modules: names of modules or ends of them, `all-linear`, or None: the tensors decide.
      parameters: names of parameters, or ends of them.
      layers: indices of the layers in which ends of names count; None: in all.
      saved: ends of names of modules that are there in full.
      ties: whether a saved embedding is the output matrix too, where the model has them in one.
    """

    base: str
    r: int
    alpha: float
    dropout: float
    use_rslora: bool
    use_dora: bool
    ranks: Mapping[re.Pattern, int]
    alphas: Mapping[re.Pattern, float]
    modules: tuple[str, ...] | None
    parameters: tuple[str, ...]
    layers: frozenset[int] | None
    saved: tuple[str, ...]
    ties: bool

    def rank(self, module: str) -> int:
        """The rank of a module's adapter."""
        return _first_match(self.ranks, module, self.r)

    def scale(self, module: str | None = None) -> float:
        """The factor of a module's A B; None: of modules that no pattern names."""
        r = self.r if module is None else self.rank(module)
        alpha = self.alpha if module is None else _first_match(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    def is_parameter(self, name: str) -> bool:
        """Whether `target_parameters` names a parameter: a module's weight, or one of experts."""
        return _is_named(name, self.parameters)

    def is_target(self, module: str) -> bool | None:
        """Whether a module has an adapter; None: the fields do not say."""
        if self.is_parameter(module + WEIGHT):
            return True
        if self.modules is None:
            return None
        if module in self.modules or self.modules == (ALL_LINEAR,):
            return True  # PEFT does not look at the layers here
        in_layers = self.layers is None or _layer_of(module) in self.layers
        return in_layers and _is_named(module, self.modules)


def read_adapter_config(directory: Path) -> AdapterConfig:
    """Reads adapter_config.json.

    Raises:
      ModelLoadError: a field is unknown, malformed, or asks for what is not implemented.
    """
    where = directory / CONFIG
    fields = read_json(directory, CONFIG)
    unknown = sorted(fields.keys() - REQUIRED_VALUES.keys() - IGNORED_FIELDS - READ)
    if unknown:
        raise ModelLoadError(f"{where}: fields that ReLax does not support: {', '.join(unknown)}.")
    fields = {name: value for name, value in fields.items() if value is not None}
    for name in REQUIRED_VALUES.keys() & fields.keys():
        if fields[name] not in REQUIRED_VALUES[name]:
            raise ModelLoadError(
                f"{where}: {name} is {repr(fields[name])[:80]}, which is not implemented; only "
                f"{' or '.join(map(repr, REQUIRED_VALUES[name])) or 'its absence'} is."
            )
    fields = DEFAULTS | fields
    for name, (fits, wanted) in CHECKS.items():
        if name not in fields or not fits(fields[name]):
            got = repr(fields.get(name))[:80]
            raise ModelLoadError(f"{where}: {name} must be {wanted}, got {got}.")
    return AdapterConfig(
        base=fields["base_model_name_or_path"],
        r=fields["r"],
        alpha=fields["lora_alpha"],
        dropout=fields["lora_dropout"],
        use_rslora=fields["use_rslora"],
        use_dora=fields["use_dora"],
        ranks=_compiled(fields["rank_pattern"]),
        alphas=_compiled(fields["alpha_pattern"]),
        modules=_modules(fields),
        parameters=tuple(fields["target_parameters"]),
        layers=_layers(fields["layers_to_transform"]),
        saved=tuple(fields["modules_to_save"]),
        ties=fields["ensure_weight_tying"],
    )


def _modules(fields: dict) -> tuple[str, ...] | None:
    """Names, where no regular expression has a part in the choice."""
    targets = fields["target_modules"]
    if isinstance(targets, str):
        targets = [ALL_LINEAR] if targets.lower() == ALL_LINEAR else None
    if targets is None or fields["exclude_modules"] or fields["layers_pattern"]:
        return None
    return tuple(targets)


def _is_named(module: str, names: tuple[str, ...]) -> bool:
    return f".{module}".endswith(tuple(f".{name}" for name in names))


def _layers(value: int | list[int]) -> frozenset[int] | None:
    """PEFT takes an empty list for all layers, and 0 for the first one."""
    if isinstance(value, list):
        return frozenset(value) or None
    return frozenset([value])


def _layer_of(module: str) -> int | None:
    """The first numbered part of a module's name, as PEFT finds a layer's index."""
    found = re.match(r"[^.]*\.[^.]*\.(\d+)\.", module)
    return int(found[1]) if found else None


def _compiled(pattern: dict) -> dict[re.Pattern, Any]:
    return {re.compile(rf"(.*\.)?({key})$"): value for key, value in pattern.items()}


def _first_match(pattern: Mapping[re.Pattern, float], module: str, default):
    return next((value for key, value in pattern.items() if key.match(module)), default)


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rank(value) -> bool:
    return _is_integer(value) and 0 < value < 2**20


def _is_positive(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e38


def _are_names(value) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _are_parameters(value) -> bool:
    return _are_names(value) and all(
        name.endswith((WEIGHT, "gate_up_proj", "down_proj")) for name in value
    )


def _are_layers(value) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(_is_integer(index) and index >= 0 for index in values)


def _is_pattern(value, fits) -> bool:
    if not isinstance(value, dict) or len(value) > PATTERN_KEYS:
        return False
    repeating = sum(_repeats(key) > 0 for key in value)
    return repeating <= REPEATING_KEYS and all(
        _is_key(key) and fits(number) for key, number in value.items()
    )


def _is_key(key: str) -> bool:
    """Whether a key is one of the regular expressions that are matched in bounded time."""
    if len(key) > KEY_LENGTH or not _KEY.fullmatch(key) or key.count("(") > KEY_GROUPS:
        return False
    try:
        re.compile(key)
    except re.error:
        return False
    return _repeats(key) <= KEY_REPEATS


def _repeats(key: str) -> int:
    return sum(map(key.replace("(?:", "(").count, "*+?"))


DEFAULTS = {
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_modules": [],
    "target_parameters": [],
    "exclude_modules": [],
    "layers_to_transform": [],
    "layers_pattern": [],
    "modules_to_save": [],
    "ensure_weight_tying": False,
}
# Field -> what it must satisfy, and that in words.
CHECKS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "peft_type": (lambda value: True, "LORA"),
    "base_model_name_or_path": (lambda value: isinstance(value, str) and value, "a text"),
    "r": (_is_rank, "a whole number above 0"),
    "lora_alpha": (_is_positive, "a number above 0"),
    "lora_dropout": (lambda v: v == 0 or _is_positive(v) and v < 1, "from 0 to below 1"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "use_dora": (lambda value: isinstance(value, bool), "true or false"),
    "rank_pattern": (
        functools.partial(_is_pattern, fits=_is_rank),
        "whole numbers by names or simple regular expressions",
    ),
    "alpha_pattern": (
        functools.partial(_is_pattern, fits=_is_positive),
        "numbers by names or simple regular expressions",
    ),
    "target_modules": (lambda v: isinstance(v, str) or _are_names(v), "names of modules"),
    "target_parameters": (_are_parameters, "names of the weights of linear layers or experts"),
    "modules_to_save": (_are_names, "names of modules"),
    "ensure_weight_tying": (lambda value: isinstance(value, bool), "true or false"),
    "layers_to_transform": (_are_layers, "one index or a list of indices from 0 up"),
}
