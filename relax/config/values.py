"""Strict checks by type: of Python and JSON values, and of command-line texts."""

import json
import math
import re
import types
import typing
from typing import Any, Literal

from relax.config.text import quote

_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_NONE = ("none", "null")
_INT = re.compile(r"[+-]?[0-9]{1,400}")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_FLOAT_WORD = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)


def split_optional(annotation: Any) -> tuple[Any, bool]:
    """`X | None` gives `(X, True)`, anything else `(X, False)`."""
    if typing.get_origin(annotation) not in (types.UnionType, typing.Union):
        return annotation, False
    inner = [a for a in typing.get_args(annotation) if a is not types.NoneType]
    if len(inner) != 1:
        raise TypeError(f"an option has one type, or one type and None, got {annotation}")
    return inner[0], True


def is_switch(annotation: Any) -> bool:
    """Whether a flag of this type needs no value (`--packing`) and has a negation."""
    return split_optional(annotation)[0] is bool


def is_list(annotation: Any) -> bool:
    """Whether a flag of this type takes several values."""
    return typing.get_origin(split_optional(annotation)[0]) is list


def _of_numbers(annotation: Any) -> bool:
    return typing.get_args(annotation) == (float,)


def type_name(annotation: Any) -> str:
    """The type as `--help` shows it.

    >>> type_name(int | None), type_name(Literal["bfd", "wrapped"]), type_name(list[str])
    ('INT|none', 'bfd|wrapped', 'A,B,...')
    """
    inner, optional = split_optional(annotation)
    if typing.get_origin(inner) is Literal:
        name = "|".join(typing.get_args(inner))
    elif is_list(inner):
        name = "1,0.5,..." if _of_numbers(inner) else "A,B,..."
    else:
        name = {bool: "true|false", int: "INT", float: "FLOAT", str: "TEXT", dict: "JSON"}[inner]
    return name + "|none" * optional


def _expected(annotation: Any) -> str:
    """The type in words, which complete "must be"."""
    inner, optional = split_optional(annotation)
    if typing.get_origin(inner) is Literal:
        text = "one of " + ", ".join(typing.get_args(inner))
    elif is_list(inner):
        text = "a list of numbers" if _of_numbers(inner) else "a list of texts"
    else:
        text = {
            bool: "true or false",
            int: "a whole number",
            float: "a finite number",
            str: "a text",
            dict: "a JSON object",
        }[inner]
    return text + " or none" * optional


def _refuse(annotation: Any, given: str) -> typing.NoReturn:
    raise ValueError(f"must be {_expected(annotation)}, got {given}")


def check_value(annotation: Any, value: Any) -> Any:
    """Checks that a Python or JSON value has exactly this type; an int counts as a float.

    Raises:
      ValueError: "must be ..., got ...", without the name of the field.

    >>> check_value(float, 1)
    1.0
    """
    inner, optional = split_optional(annotation)
    if value is None and optional:
        return None
    origin = typing.get_origin(inner)
    if origin is Literal:
        fits = isinstance(value, str) and value in typing.get_args(inner)
    elif origin is list:
        is_item = _is_finite if _of_numbers(inner) else _is_text
        fits = isinstance(value, list | tuple) and all(map(is_item, value))
        value = list(value) if fits else value
    elif inner is float:
        fits = _is_finite(value)
        value = float(value) if fits else value
    elif inner is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:
        fits = isinstance(value, inner)
    if not fits:
        kinds = {str: "text", bool: "boolean", list: "list", dict: "object", float: "number"}
        word = kinds.get(type(value))
        _refuse(annotation, quote(value) + f" (a {word})" * bool(word))
    if inner is str and not value:
        raise ValueError("must not be empty: omit it to use the default")
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_finite(value: Any) -> bool:
    """Whether a value is a number that a float can hold; a huge int is not."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < 2**1000 and math.isfinite(value)


def parse_text(annotation: Any, text: str) -> Any:
    """Parses the text of a command-line value as this type; a `str` is kept verbatim.

    Raises:
      ValueError: "must be ..., got ...", without the name of the flag.

    >>> parse_text(bool, "no"), parse_text(float, "1e-4"), parse_text(str, "1e10")
    (False, 0.0001, '1e10')
    >>> parse_text(int | None, "none"), parse_text(list[str], "a,b"), parse_text(list[str], "[]")
    (None, ['a', 'b'], [])
    """
    inner, optional = split_optional(annotation)
    if optional and text.lower() in _NONE:
        return None
    if typing.get_origin(inner) is Literal:
        if text not in typing.get_args(inner):
            _refuse(annotation, quote(text))
        return text
    if is_list(inner):
        return _parse_list(annotation, text)
    if inner is dict:
        return _parse_object(annotation, text)
    if inner is bool:
        if text.lower() not in _WORDS:
            _refuse(annotation, quote(text))
        return _WORDS[text.lower()]
    if inner is int:
        if not _INT.fullmatch(text):
            _refuse(annotation, quote(text))
        return int(text)
    if inner is float:
        if not _FLOAT.fullmatch(text) or not math.isfinite(float(text)):
            _refuse(annotation, quote(text))
        return float(text)
    return check_value(annotation, text)


def value_text(value: Any) -> str:
    """A value as it is written on the command line.

    >>> [value_text(value) for value in (True, None, 1e-4, ["a", "b"], [], {"a": 1})]
    ['true', 'none', '0.0001', 'a,b', '[]', '{"a": 1}']
    """
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ",".join(map(value_text, value)) or "[]"
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _parse_list(annotation: Any, text: str) -> list[str]:
    if text.lstrip().startswith("["):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"must be a,b or a JSON list, got {quote(text)}") from None
        return check_value(annotation, value)
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise ValueError(f"must be a list a,b without empty parts, got {quote(text)}")
    if not _of_numbers(split_optional(annotation)[0]):
        return items
    if not all(_FLOAT.fullmatch(item) for item in items):
        _refuse(annotation, quote(text))
    return check_value(annotation, [float(item) for item in items])


def _parse_object(annotation: Any, text: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f'must be a JSON object such as {{"a": 1}}, got {quote(text)}') from None
    return check_value(annotation, value)


def is_number(text: str) -> bool:
    """Whether a text such as `-1` or `-inf` is a number, and so a value rather than a flag."""
    return bool(_FLOAT.fullmatch(text) or _FLOAT_WORD.fullmatch(text))
