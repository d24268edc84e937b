"""Types and defaults of the fields of a config.json."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeGuard


@dataclasses.dataclass(frozen=True)
class Kind:
    """A type of values.

    Attributes:
      wanted: description of the type for messages.
      fits: whether a JSON value is of this type.
      convert: converts the value for `TransformerConfig`.
    """

    wanted: str
    fits: Callable[[object], bool]
    convert: Callable = lambda value: value


def integers(low: int, high: int) -> Kind:
    """The integers from `low` to `high`."""

    def fits(value):
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return Kind(f"an integer from {low} to {high}", fits)


def words(*known: str, **aliases: str) -> Kind:
    """One of several words, or an alias of one."""
    *others, last = known
    return Kind(
        f"{', '.join(others)} or {last}",
        lambda value: isinstance(value, str) and value in {*known, *aliases},
        lambda value: aliases.get(value, value),
    )


def lists(kind: Kind) -> Kind:
    """Lists of values of one type."""
    return Kind(
        f"a list of which each is {kind.wanted}",
        lambda value: isinstance(value, list) and all(map(kind.fits, value)),
        lambda value: tuple(map(kind.convert, value)),
    )


def is_number(value) -> TypeGuard[float]:
    """Whether a value of a JSON file is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
POSITIVE = Kind("a finite number above 0", lambda v: is_number(v) and 0 < v < 1e38, float)
NOT_NEGATIVE = Kind("a finite number from 0 up", lambda v: is_number(v) and 0 <= v < 1e38, float)
SIZE = integers(1, 2**24 - 1)  # above all real models, and no sum of sizes overflows
LAYERS = integers(1, 2**12 - 1)
EXPERTS = integers(1, 2**10)
GATES = words("silu", "gelu", "gelu_pytorch_tanh", "relu2", swish="silu")
LAYER_TYPES = lists(words("full_attention", "sliding_attention"))

REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of config.json.

    Attributes:
      kind: type of its values.
      default: value if the file has none.
      ours: fields of `TransformerConfig` that it sets; None: the one of the same name; empty: none,
        but its family derives others from it.
      null: whether null is a value, different from absence.
    """

    kind: Kind
    default: object = REQUIRED
    ours: tuple[str, ...] | None = None
    null: bool = False


def derived(kind: Kind, default=REQUIRED, null: bool = False) -> Field:
    """A field from which a family derives others."""
    return Field(kind, default, (), null)


def common(
    *,
    max_position_embeddings: int,
    rms_norm_eps: float,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    tie_word_embeddings: bool = False,
    vocab_size: object = REQUIRED,
    num_attention_heads: object = REQUIRED,
) -> dict[str, Field]:
    """The common fields of all families, with a family's defaults.

    `num_key_value_heads` defaults to the number of heads, `head_dim` to `hidden_size` divided by
    it.
    """
    return {
        "vocab_size": Field(SIZE, vocab_size),
        "hidden_size": Field(SIZE),
        "intermediate_size": Field(SIZE),
        "num_hidden_layers": Field(LAYERS),
        "num_attention_heads": Field(SIZE, num_attention_heads),
        "num_key_value_heads": Field(SIZE, num_key_value_heads, null=True),
        "head_dim": Field(SIZE, head_dim, null=head_dim is None),
        "max_position_embeddings": Field(SIZE, max_position_embeddings),
        "rms_norm_eps": Field(POSITIVE, rms_norm_eps),
        "tie_word_embeddings": Field(FLAG, tie_word_embeddings),
        "initializer_range": Field(POSITIVE, 0.02),
    }


HIDDEN_ACT = Field(GATES, "silu")
ATTENTION_BIAS = Field(FLAG, False, ("attention_bias", "output_bias"))


def read_value(fields: Mapping, name: str, kind: Kind, default=None):
    """Reads a field, or its default, and checks its type."""
    value = fields.get(name, default)
    if not kind.fits(value):
        got = "none" if value is None else repr(value)
        raise ValueError(f"{name} must be {kind.wanted}, got {got[:80]}.")
    return kind.convert(value)


def read_values(fields: Mapping, table: Mapping[str, Field]) -> dict:
    """Reads the values of all fields of a table.

    Raises:
      ValueError: one is missing or of a wrong type.
    """
    missing = [n for n, f in table.items() if f.default is REQUIRED and fields.get(n) is None]
    if missing:
        raise ValueError(f"missing fields: {', '.join(missing)}.")
    values = {}
    for name, field in table.items():
        value = fields.get(name)
        if value is None:
            values[name] = None if field.null and name in fields else field.default
        else:
            values[name] = read_value(fields, name, field.kind)
    return values
