"""Configurations from files and dicts: JSON or YAML, by section or flat, as strict as the flags."""

import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any, NoReturn

from relax.config.foreign import nearest_value, own_value
from relax.config.names import ALIASES, ratio_problem, suggestion, unknown
from relax.config.options import options
from relax.config.schema import Settings
from relax.config.settings import ALGORITHMS
from relax.config.sft import SFTConfig
from relax.config.values import check_value
from relax.errors import ConfigError

_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_YAML_TAGS = {"null", "bool", "int", "float", "str", "timestamp", "seq", "map"}


class ConfigLoader:
    """Reads the configuration of a run: defaults, then the file, then flags.

    Args:
      path: a .json, .yaml or .yml file, by section (as saved) or flat; None for no file.
      config_class: the configuration of the algorithm; None: that of the file's `algorithm`, or
        supervised fine-tuning.
    """

    def __init__(self, path: str | Path | None, config_class: type[Settings] | None = None):
        self.path = path
        self.config_class = config_class

    def load(self) -> Settings:
        """The file over the defaults, checked.

        Raises:
          ConfigError: names every problem, one a line.
        """
        return self.merge_with_cli_args({})

    def merge_with_cli_args(self, args: dict[str, Any] | Namespace) -> Settings:
        """The values of `args` over the file over the defaults, checked.

        Args:
          args: by field name; None in an `argparse.Namespace` means not given.

        Raises:
          ConfigError: names every problem, one a line.
        """
        if isinstance(args, Namespace):
            args = {name: value for name, value in vars(args).items() if value is not None}
        data = {} if self.path is None else read_file(self.path)
        config_class = self.config_class or _class_of(data)
        fields = _fields(data, config_class, f"{self.path}: ")
        return _make(config_class, fields | _fields(args, config_class, ""))


def _class_of(data: dict[str, Any]) -> type[Settings]:
    name = data.get("algorithm", SFTConfig.algorithm)
    if name not in ALGORITHMS:
        raise ConfigError(f"unknown algorithm {name!r}. There are {', '.join(sorted(ALGORITHMS))}.")
    return ALGORITHMS[name]


def from_dict(data: dict[str, Any], config_class: type[Settings] | None = None) -> Settings:
    """A checked configuration from a dict, by section (as `to_dict` gives it) or flat.

    >>> from_dict({"hyperparams": {"seed": 1}, "packing": True}).data.packing
    True
    """
    config_class = config_class or _class_of(data)
    return _make(config_class, _fields(data, config_class, ""))


def create_default_config(
    model_path: str | None = None,
    dataset_path: str | None = None,
    output_dir: str | None = None,
    config_class: type[Settings] = SFTConfig,
    **fields: Any,
) -> Settings:
    """A checked configuration from the most common options, and any `fields` by name."""
    named = {
        "model_name_or_path": model_path,
        "dataset_name": dataset_path,
        "output_dir": output_dir,
    }
    named = {name: value for name, value in named.items() if value is not None}
    both = [name for name in named if name in fields]
    if both:
        raise ConfigError(f"{both[0]} is given twice: as a field and as a path. Give one of them.")
    return from_dict(named | fields, config_class)


def _make(config_class: type[Settings], fields: dict[str, Any]) -> Settings:
    config = config_class().replace(**config_class.defaults_for(fields) | fields)
    config.check()
    return config


def _fields(data: dict[str, Any], config_class: type[Settings], where: str) -> dict[str, Any]:
    """The values of a dict by field name, checked; `where` begins each problem."""
    known = options(config_class)
    sections = list(dict.fromkeys(option.section for option in known.values()))
    # In a file by section, a field may have the name of its attribute.
    flags = {(o.section, o.field): o.name for o in known.values()}
    found: dict[str, Any] = {}
    problems: list[str] = []

    def take(name: str, value: Any) -> None:
        field = ALIASES.get(name, name)
        if field not in known:
            problems.append(unknown(name, [*known, *ALIASES, *sections]))
        elif field in found:
            problems.append(f"{field} is given twice" + f", also as {name}" * (name != field))
        elif problem := ratio_problem(name, value):
            problems.append(problem)
        else:
            found[field] = own_value(field, value)
            try:
                found[field] = check_value(known[field].type, found[field])
            except ValueError as error:
                problems.append(f"{name} {error}{nearest_value(field, value)}")

    for key, value in data.items():
        if key == "algorithm":
            if value != config_class.algorithm:
                ours = config_class.algorithm
                problems.append(f"this is a configuration of {value!r}, not of {ours!r}")
        elif key not in sections or (key in known and not isinstance(value, dict)):
            take(str(key), value)
        elif not isinstance(value, dict):
            hint = suggestion(f"{key}_name", known)
            problems.append(f"{key} is a section and must hold fields, got {value!r}.{hint}")
        else:
            for name, inner in value.items():
                name = flags.get((key, name), name)
                if name in known and known[name].section != key:
                    problems.append(f"{name} belongs to section {known[name].section}, not {key}")
                else:
                    take(str(name), inner)
    if problems:
        raise ConfigError("\n".join(where + problem for problem in problems))
    return found


def read_file(path: str | Path) -> dict[str, Any]:
    """Reads a .json, .yaml or .yml file that holds one object.

    Raises:
      ConfigError: says what is wrong with the file, and where in it.
    """
    path = Path(path)
    readers = {".json": _read_json, ".yaml": _read_yaml, ".yml": _read_yaml}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"a config file ends in .json, .yaml or .yml, got {str(path)!r}")
    try:
        data = reader(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply for a configuration") from None
    except ValueError as error:  # syntax, a repeated key, an endless number, a NUL in the path
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must hold an object of fields, got a {type(data).__name__}")
    return data


def _read_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_once, parse_constant=_not_finite, parse_int=_whole)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} occurs twice")
        found[key] = value
    return found


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"numbers must be finite, got {text}")


def _whole(text: str) -> int:
    if len(text) > 400:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _read_yaml(text: str) -> Any:
    """Reads YAML's syntax with the scalars of JSON.

    PyYAML's own are those of YAML 1.1, where `eval_strategy: no` is False and `1e-4` a text.
    """
    try:
        import yaml
    except ImportError:
        raise ValueError("reading YAML needs `pip install pyyaml`; JSON needs nothing") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    return None if root is None else _plain(root, set())


def _plain(node: Any, seen: set[int]) -> Any:
    """The value of a YAML node; aliases, which would make it a graph, are refused."""
    line = f"line {node.start_mark.line + 1}"
    if node.tag.rpartition(":")[2] not in _YAML_TAGS:
        raise ValueError(f"{line}: the tag {node.tag!r} is not supported")
    if id(node) in seen:
        raise ValueError(f"{line}: anchors and aliases are not supported")
    seen.add(id(node))
    if node.id == "sequence":
        return [_plain(item, seen) for item in node.value]
    if node.id == "mapping":
        if any(key.id != "scalar" for key, _ in node.value):
            raise ValueError(f"{line}: keys must be plain names")
        return _once([(key.value, _plain(value, seen)) for key, value in node.value])
    if node.style is not None:  # quoted or a block
        return node.value
    if _NUMBER.fullmatch(node.value):
        return json.loads(node.value, parse_int=_whole)
    return _WORDS.get(node.value, node.value)
