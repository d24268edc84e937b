"""From arguments to flags: each a known one, given once, with a text that its type takes."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from relax.config.names import ALIASES, normal, ratio_problem, unknown
from relax.config.options import options
from relax.config.schema import Settings
from relax.config.values import is_list, is_number, is_switch, parse_text, type_name
from relax.errors import ConfigError

COMMAND_FLAGS = {"config": str, "print_config": bool, "help": bool}

_FLAG = re.compile(r"--?[^\W\d][\w-]*(=|\Z)|--?\Z")


class Command(NamedTuple):
    """A checked command line."""

    flags: dict[str, str]  # field -> text that its type takes
    config: str | None  # path of a file
    print_config: bool
    help: bool


class _Typed(NamedTuple):
    """A flag as it was typed."""

    spelling: str
    name: str  # as typed, with underscores and without dashes in front
    text: str | None  # None where it stands alone


def read_command(config_class: type[Settings], argv: Sequence[str]) -> Command:
    """Checks all arguments against the fields of a configuration.

    Raises:
      ConfigError: names every problem, one a line.
    """
    if "--help" in argv or "-h" in argv:  # whatever else is wrong
        return Command({}, None, False, True)
    types = {name: option.type for name, option in options(config_class).items()}
    types |= COMMAND_FLAGS
    typed, problems = _split(argv, types)
    texts: dict[str, str] = {}
    spellings: dict[str, str] = {}
    for flag in typed:
        field, negated = _resolve(flag.name, types)
        if field is None:
            problems.append(_unknown(flag, types))
            continue
        if field in spellings:
            same = flag.spelling == spellings[field]
            both = "twice" if same else f"twice, as {spellings[field]} and as {flag.spelling}"
            problems.append(f"--{field} is given {both}. Give it once.")
            continue
        spellings[field] = flag.spelling
        try:
            texts[field] = _text(flag, field, negated, types[field])
        except ValueError as error:
            problems.append(f"{flag.spelling} {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    own = {
        name: parse_text(types[name], texts.pop(name, "false")) for name in ("print_config", "help")
    }
    return Command(flags=texts, config=texts.pop("config", None), **own)


def _split(argv: Sequence[str], types: dict[str, Any]) -> tuple[list[_Typed], list[str]]:
    """Pairs flags with their values; what is neither is a problem."""
    typed: list[_Typed] = []
    problems: list[str] = []
    position = 0
    while position < len(argv):
        token = argv[position]
        position += 1
        if not (token.startswith("--") or _is_flag(token)) or token in ("-", "--"):
            problems.append(_stray(token, typed, types))
            continue
        spelling, equals, text = token.partition("=")
        value = text if equals else None
        if not equals and position < len(argv) and not _is_flag(argv[position]):
            value = argv[position]
            position += 1
        if token.startswith("--"):
            typed.append(_Typed(spelling, normal(spelling[2:]), value))
        else:
            problems.append(_short(spelling, types))
    return typed, problems


def _is_flag(token: str) -> bool:
    """Whether an argument looks like a flag; `-1`, `-inf` and "- a text" are values."""
    return bool(_FLAG.match(token)) and not is_number(token)


def _resolve(name: str, types: dict[str, Any]) -> tuple[str | None, bool]:
    """The field that a name stands for (None: no field), and whether it stands for its negation."""
    name = ALIASES.get(name, name)
    if name in types:
        return name, False
    for prefix in ("no_", "no"):
        if name.startswith(prefix) and name.removeprefix(prefix) in types:
            return name.removeprefix(prefix), True
    return None, False


def _text(flag: _Typed, field: str, negated: bool, annotation: Any) -> str:
    """The text of a flag's value, once its type takes it.

    Raises:
      ValueError: what is wrong, to stand after the flag.
    """
    if negated:
        if not is_switch(annotation):
            raise ValueError(f"negates what is not true or false: write --{field}=VALUE")
        if flag.text is not None:
            raise ValueError(f"takes no value, got {flag.text!r}: write --{field}={flag.text}")
        return "false"
    if flag.text is None:
        if not is_switch(annotation):
            raise ValueError(
                f"needs a value: --{field}={type_name(annotation)} "
                "(the = is needed where a value looks like a flag)"
            )
        return "true"
    value = parse_text(annotation, flag.text)
    if problem := ratio_problem(flag.name, value):
        raise ValueError(problem.removeprefix(f"{flag.name} "))
    return flag.text


def _unknown(flag: _Typed, types: dict[str, Any]) -> str:
    negations = [f"no_{name}" for name, annotation in types.items() if is_switch(annotation)]
    return unknown(flag.name, [*types, *ALIASES, *negations], prefix="--")


def _short(spelling: str, types: dict[str, Any]) -> str:
    name = normal(spelling[1:])
    if len(name) == 1:
        return f"one-letter flags do not exist, got {spelling}. Write the name out."
    if _resolve(name, types)[0]:
        return f"a flag starts with two dashes, got {spelling}. Did you mean --{name}?"
    return unknown(name, [*types, *ALIASES], prefix="--")


def _stray(token: str, before: list[_Typed], types: dict[str, Any]) -> str:
    """Refuses an argument that is neither a flag nor the value of one."""
    text = f"unexpected argument {token!r}: every argument is a --flag or the value of one."
    name, equals, value = token.lstrip("-\u2013\u2014").partition("=")  # also pasted long dashes
    if _resolve(normal(name), types)[0]:
        return f"{text} Did you mean --{name}{equals}{value}?"
    last = before[-1] if before else None
    annotation = types.get(_resolve(last.name, types)[0]) if last else None
    if last is None or last.text is None or annotation is None:
        return text
    if is_list(annotation):
        return f"{text} Lists have commas: {last.spelling} {last.text},{token}"
    return f"{text} A value with spaces is put in quotes."
