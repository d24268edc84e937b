"""Rows from Arrow tables (parquet, `datasets`): JSON columns and nulls added by alignment.

Arrow gives every object of a column the keys of all of them, with null for those that an object
lacks. `without_aligned_nulls` removes these keys again; intended nulls stay.
"""

import json
from collections.abc import Mapping
from typing import Any

from relax.data.limits import parse_json
from relax.data.normalize import CHAT_COLUMNS

COLUMNS = (*CHAT_COLUMNS, "tools", "chat_template_kwargs")

JSON = "json"  # the shape of a JSON text
# A shape locates Arrow structs: {key: shape} for a struct, [shape] for a list, JSON, or None.
Shape = Any


def shape_of_schema(schema) -> dict[str, Shape]:
    """The shape of each column of a pyarrow schema; JSON as `datasets` and Arrow mark it."""
    shapes = {field.name: _of_type(field.type) for field in schema}
    about = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(about)["info"]["features"] if about else {}
    except (ValueError, KeyError, TypeError):
        features = {}
    marked = shape_of_features(features)
    return {name: _merged(shape, marked.get(name)) for name, shape in shapes.items()}


def shape_of_features(features: Mapping, json_shape: Shape = JSON) -> dict[str, Shape]:
    """The shape of each column of `datasets.Features.to_dict()`."""
    return {name: _of_feature(feature, json_shape) for name, feature in features.items()}


def _of_type(kind) -> Shape:
    import pyarrow.types as types

    if getattr(kind, "extension_name", None) == "arrow.json":
        return JSON
    if types.is_struct(kind):
        return {kind.field(i).name: _of_type(kind.field(i).type) for i in range(kind.num_fields)}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [_of_type(kind.value_type)]
    return None


def _of_feature(feature, json_shape: Shape) -> Shape:
    if isinstance(feature, list):
        return [_of_feature(feature[0], json_shape)] if feature else None
    if not isinstance(feature, dict):
        return None
    kind = feature.get("_type")
    if kind == "Json":
        return json_shape
    if kind in ("List", "LargeList", "Sequence"):
        return [_of_feature(feature.get("feature"), json_shape)]
    if isinstance(kind, str):
        return None
    return {name: _of_feature(inner, json_shape) for name, inner in feature.items()}


def _merged(shape: Shape, marked: Shape) -> Shape:
    """The Arrow type's shape, with the JSON columns that only the metadata of `datasets` marks."""
    if marked == JSON:
        return JSON
    if isinstance(shape, list) and isinstance(marked, list):
        return [_merged(shape[0], marked[0])]
    if isinstance(shape, dict) and isinstance(marked, dict):
        return {name: _merged(inner, marked.get(name)) for name, inner in shape.items()}
    return shape


def read_json(value, shape: Shape, where: str):
    """The value with its JSON texts parsed.

    Raises:
      DataError: broken JSON.
    """
    if shape == JSON:
        return parse_json(value, f"{where}: a JSON column") if isinstance(value, str) else value
    if value is None or shape is None or not _has_json(shape):
        return value
    if isinstance(shape, list):
        return [read_json(item, shape[0], where) for item in value]
    return {name: read_json(item, shape.get(name), where) for name, item in value.items()}


def _has_json(shape: Shape) -> bool:
    inner = shape.values() if isinstance(shape, dict) else shape if isinstance(shape, list) else ()
    return shape == JSON or any(map(_has_json, inner))


def without_aligned_nulls(rows: list[dict], shapes: Mapping[str, Shape]) -> list[dict]:
    """Removes the keys that alignment added, from the columns of conversations and tools.

    A key that is null in one object and has a value in another is removed; a key that is null in
    every object was written, and stays. In two places the schema decides: a null argument stays if
    the called function requires it or permits null, and is removed if the function lacks it; a
    `default` of null stays if its schema permits null.

    >>> rows = [{"tools": [{"a": 1, "b": None}]}, {"tools": [{"a": None, "b": 2}]}]
    >>> without_aligned_nulls(rows, {"tools": [{"a": None, "b": None}]})
    [{'tools': [{'a': 1}]}, {'tools': [{'b': 2}]}]
    """
    alignment = Alignment(shapes)
    for row in rows:
        alignment.look(row)
    return [alignment.cleaned(row) for row in rows]


class Alignment:
    """Finds the keys that alignment added: `look` at all rows, then `cleaned` removes them.

    Attributes:
      columns: those of conversations and tools that hold objects or lists.
    """

    def __init__(self, shapes: Mapping[str, Shape]):
        self.shapes = shapes
        self.columns = [name for name in COLUMNS if isinstance(shapes.get(name), dict | list)]
        self._found: set[tuple] = set()

    def look(self, row: dict) -> None:
        for name in self.columns:
            _find_values(row.get(name), self.shapes[name], (name,), self._found)

    def cleaned(self, row: dict) -> dict:
        return _cleaned_row(row, self.columns, self.shapes, self._found)


def _cleaned_row(row: dict, columns: list[str], shapes, found: set[tuple]) -> dict:
    new = dict(row)
    for name in columns:
        if row.get(name) is not None:
            new[name] = _cleaned(row[name], shapes[name], (name,), found)
    schemas = _schemas(new.get("tools"))
    for name in columns:
        if isinstance(new.get(name), list) and _has_argument_structs(shapes[name]):
            _clean_calls(new[name], row[name], schemas)
    return new


def _has_argument_structs(shape: Shape) -> bool:
    """Whether a column's messages have calls whose arguments are Arrow structs."""
    for step in (0, "tool_calls", 0):
        if not isinstance(shape, list if step == 0 else dict):
            return False
        shape = shape[0] if isinstance(shape, list) else shape.get(step)
    call = shape.get("function", shape) if isinstance(shape, dict) else None
    return isinstance(call, dict) and isinstance(call.get("arguments"), dict)


def _find_values(value, shape: Shape, path: tuple, found: set[tuple]) -> None:
    """Adds the paths of struct fields that have a value."""
    if isinstance(shape, list):
        for item in value if isinstance(value, list | tuple) else ():
            _find_values(item, shape[0], (*path, 0), found)
    elif isinstance(shape, dict) and isinstance(value, dict):
        for key, item in value.items():
            if item is not None:
                inner = (*path, key)
                found.add(inner)
                if isinstance(shape.get(key), dict | list):
                    _find_values(item, shape[key], inner, found)


def _cleaned(value, shape: Shape, path: tuple, found: set[tuple]):
    if isinstance(shape, list) and isinstance(value, list | tuple):
        return [_cleaned(item, shape[0], (*path, 0), found) for item in value]
    if not isinstance(shape, dict) or not isinstance(value, dict):
        return value
    kept = {}
    for key, item in value.items():
        inner = (*path, key)
        written = item is not None or inner not in found
        if written or (key == "default" and _permits_null(value)):
            kept[key] = _cleaned(item, shape.get(key), inner, found)
    return kept


def _permits_null(schema: Mapping) -> bool:
    """Whether a JSON schema lets a value be null."""
    kinds = schema.get("type")
    enum = schema.get("enum")
    return (
        bool(schema.get("nullable"))
        or kinds == "null"
        or (isinstance(kinds, list) and "null" in kinds)
        or (isinstance(enum, list) and None in enum)
        or any(
            isinstance(option, Mapping) and _permits_null(option)
            for name in ("anyOf", "oneOf")
            for option in schema.get(name) or ()
        )
    )


def _schemas(tools) -> dict[Any, dict]:
    """The parameters of each function of `tools`."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            return {}
    schemas: dict[Any, dict] = {}
    for tool in tools if isinstance(tools, list) else ():
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(function, dict) and isinstance(function.get("parameters"), dict):
            schemas[function.get("name")] = function["parameters"]
    return schemas


def _clean_calls(messages: list, given: list, schemas: dict[Any, dict]) -> None:
    """Keeps or removes the null arguments of calls to known functions, in place."""
    for message, original in zip(messages, given, strict=True):
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        if not isinstance(calls, list) or not isinstance(original, dict):
            continue
        for call, source in zip(calls, original["tool_calls"], strict=True):
            if not isinstance(call, dict):
                continue
            function, source = call.get("function", call), source.get("function", source)
            schema = schemas.get(function.get("name")) if isinstance(function, dict) else None
            if schema is None or not isinstance(function.get("arguments"), dict):
                continue
            properties = schema.get("properties") or {}
            required = schema.get("required") or ()
            arguments = {}
            for key, value in source["arguments"].items():
                about = properties.get(key)
                stays = about is not None and (
                    key in required
                    or key in function["arguments"]
                    or (isinstance(about, dict) and _permits_null(about))
                )
                if value is not None or stays:
                    arguments[key] = function["arguments"].get(key)
            function["arguments"] = arguments
