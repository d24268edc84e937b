"""Reading JSON and YAML strictly: one object, no repeated key, only finite numbers."""

import json
import re
from pathlib import Path
from typing import Any, NoReturn

from relax.errors import ConfigError

_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_YAML_TAGS = {"null", "bool", "int", "float", "str", "timestamp", "seq", "map"}


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
            raise ValueError(f"key {key!r} stands there twice")
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
    """The value of a YAML node; an alias, which would make it a graph, is refused."""
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
