"""Options: name, type, default, range and help, read from the dataclasses that declare them."""

import dataclasses
import typing
from typing import Any, NamedTuple

INT_MAX = 2**31 - 1  # step counts and sizes are 32-bit integers on the accelerator


class Option(NamedTuple):
    """One option of a configuration: an attribute, a flag, and a key in a file.

    `name` is the flag and `field` the attribute; they are usually the same.
    """

    name: str
    field: str
    section: str
    type: Any
    default: Any
    help: str
    limits: dict[str, float]  # keys: `above`, `at_least`, `below`, `at_most`
    steps: bool  # >= 1: a whole number; < 1: a fraction of a total


def option(
    default: Any, help: str, *, steps: bool = False, flag: str | None = None, **limits: float
) -> Any:
    """Declares an option: its default, one line of help, and its range.

    Args:
      default: the default; a list or a dict is copied for each instance.
      help: one line, for `--help`.
      steps: a value of 1 or more is a count, one below 1 a fraction of a total.
      flag: its name on the command line, if it is not the field's.
      **limits: any of `above`, `at_least`, `below`, `at_most`.
    """
    metadata = {"help": help, "limits": limits, "steps": steps, "flag": flag}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(section_class: type, **defaults: Any) -> Any:
    """Declares a section of a configuration, with other defaults for some of its options."""
    return dataclasses.field(default_factory=lambda: section_class(**defaults))


_READ: dict[type, dict[str, Option]] = {}


def options(config_class: type) -> dict[str, Option]:
    """The options of a configuration class by name, in the order of their declaration.

    Raises:
      TypeError: two fields share a name; flags are flat, so each name may exist once.
    """
    if config_class not in _READ:
        _READ[config_class] = _read(config_class)
    return _READ[config_class]


def _read(config_class: type) -> dict[str, Option]:
    found: dict[str, Option] = {}
    defaults = config_class()
    for part in dataclasses.fields(config_class):
        values = getattr(defaults, part.name)
        types = typing.get_type_hints(type(values))
        for field in dataclasses.fields(values):
            name = field.metadata["flag"] or field.name
            if name in found:
                raise TypeError(f"{config_class.__name__} has two fields named {name!r}")
            found[name] = Option(
                name=name,
                field=field.name,
                section=part.name,
                type=types[field.name],
                default=getattr(values, field.name),
                help=field.metadata["help"],
                limits=field.metadata["limits"],
                steps=field.metadata["steps"],
            )
    return found


def resolve_steps(value: float, total: int) -> int:
    """Converts a value with `steps` to steps; a fraction gives at least 1.

    >>> resolve_steps(500, total=2000), resolve_steps(0.1, total=30), resolve_steps(0, total=30)
    (500, 3, 0)
    """
    if value >= 1 or value == 0:
        return int(value)
    # Without the margin 0.07 * 100 = 7.000000000000001 would round up to 8.
    return max(1, -int(-(value * total - 1e-9) // 1))
