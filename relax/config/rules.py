"""Checking a configuration: types, ranges, contradictions, and options without effect.

Contradictions are functions of the values; options without effect are rows of a table, `NoEffect`,
evaluated by one loop. An option that has no effect is an error where it betrays a mistake, and a
warning where a sweep over another option may hold it fixed.

An option counts as given if it differs from its default and from that of the demo run: a saved
configuration lists every field, and must load again.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from relax.config.foreign import nearest_value
from relax.config.names import suggestion
from relax.config.options import INT_MAX, Option
from relax.config.text import quote
from relax.config.values import check_value, value_text
from relax.config.watch_rules import is_reference

_LIMITS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "above": (lambda value, limit: value > limit, "above"),
    "at_least": (lambda value, limit: value >= limit, "at least"),
    "below": (lambda value, limit: value < limit, "below"),
    "at_most": (lambda value, limit: value <= limit, "at most"),
}


class Values(dict[str, Any]):
    """The values of a configuration by field name.

    Args:
      known: its options.
      values: all of its values.
      demo: the defaults of the demo run.
    """

    def __init__(
        self, known: Mapping[str, Option], values: Mapping[str, Any], demo: Mapping[str, Any]
    ):
        super().__init__(values)
        self._given = {
            name
            for name, value in values.items()
            if value not in (known[name].default, demo.get(name, known[name].default))
        }

    def given(self, *names: str) -> bool:
        """Whether any of these fields exists and differs from its defaults."""
        return not self._given.isdisjoint(names)

    def holds_out(self) -> bool:
        """Whether there are rows to evaluate on."""
        asked = self["eval_strategy"] != "no" or self["eval_on_start"]
        named = self.given("eval_dataset_name", "test_size")
        return asked or named or self["dataset_name"] is None


Rule = Callable[[Values], Iterable[str]]  # yields a sentence for each contradiction


class NoEffect(NamedTuple):
    """Options that have no effect under a condition.

    Attributes:
      fields: their names, separated by spaces.
      when: the condition.
      reason: why, with the values of fields in braces.
      warn: whether it is a warning, not an error.
    """

    fields: str
    when: Callable[[Values], bool]
    reason: str
    warn: bool = False


def warns(fields: str, when: Callable[[Values], bool], reason: str) -> NoEffect:
    """A `NoEffect` that is a warning."""
    return NoEffect(fields, when, reason, warn=True)


def needs(fields: str, other: str, *values: str, warn: bool = False) -> NoEffect:
    """Options without effect unless another option is set, or is one of `values`."""
    if values:
        reason = f"{other} is {{{other}}}; make it {' or '.join(values)}"
        return NoEffect(fields, lambda v: v[other] not in values, reason, warn)
    return NoEffect(fields, lambda v: not v.get(other), f"{other} is {{{other}}}; give it", warn)


def unknown_choice(name: str, value: str, known: Iterable[str]) -> Iterator[str]:
    """Refuses a value that is neither known nor a function in a file or a package."""
    known = list(known)
    if value not in known and not is_reference(value):
        yield (
            f"{name} must be one of {', '.join(known)}, or path/to/file.py:function, got "
            f"{quote(value)}.{suggestion(value, known)}"
        )


def without_effect(table: Iterable[NoEffect], values: Values) -> dict[str, tuple[str, bool]]:
    """Maps each given field without effect to a sentence and whether it only warns."""
    found: dict[str, tuple[str, bool]] = {}
    texts = {name: value_text(value) for name, value in values.items()}
    for row in table:
        for name in row.fields.split():
            if values.given(name) and name not in found and row.when(values):
                found[name] = f"{name} has no effect: {row.reason.format_map(texts)}", row.warn
    return found


def type_problems(known: Mapping[str, Option], values: Mapping[str, Any]) -> Iterator[str]:
    """Values of a wrong type, one sentence each."""
    for name, option in known.items():
        try:
            check_value(option.type, values[name])
        except ValueError as error:
            yield f"{name} {error}{nearest_value(name, values[name])}"


def range_problems(known: Mapping[str, Option], values: Mapping[str, Any]) -> Iterator[str]:
    """Values out of their range, one sentence each; their types are right."""
    for name, option in known.items():
        value = values[name]
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        whole = isinstance(value, int) or option.steps
        limits = ({"at_most": INT_MAX} if whole else {}) | option.limits
        broken = [
            f"{word} {limits[kind]}"
            for kind, (holds, word) in _LIMITS.items()
            if kind in limits and not holds(value, limits[kind])
        ]
        if broken:
            yield f"{name} must be {broken[0]}, got {quote(value)}"
        elif option.steps and value > 1 and value != int(value):
            yield f"{name} must be a whole number, or a ratio below 1, got {value}"
