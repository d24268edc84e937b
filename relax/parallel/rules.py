"""Sharding rules: a table from a weight's path to a partition spec.

Optimizer state of a weight ends in the weight's path, so it is sharded like the weight.

Axes of weights: V vocabulary, D model, F outputs, E experts, r rank of an adapter.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jax.sharding import PartitionSpec as P

from relax.config.mesh import AXES
from relax.errors import ConfigError


class Rule(NamedTuple):
    """The spec of paths that end in `pattern`, a regular expression."""

    pattern: str
    spec: P


# Of attention and feed-forward blocks, and of convolutions and delta rules.
_BY_COLUMNS, _BY_ROWS = "((q|k|v|g|gate|up)_proj|in_proj(_.*)?)", "(o|down|out)_proj"

# The first match applies. Weights are gathered over fsdp when they are used, a layer at a time;
# along tensor each device keeps its columns (or rows, if the preceding columns are sharded).
RULES = (
    Rule("embed_tokens(_per_layer)?|lm_head", P("tensor", "fsdp")),  # [V, D]
    Rule("per_layer_(input_gate|model_projection)/kernel", P("fsdp", None)),  # [D, F]
    Rule("per_layer_projection/kernel", P(None, "fsdp")),  # [F, D]
    Rule("experts/(gate|up)_proj", P(None, "fsdp", "tensor")),  # [E, D, F]
    Rule("experts/down_proj", P(None, "tensor", "fsdp")),  # [E, F, D]
    Rule("experts/(gate|up)_proj_lora_b", P(None, None, "tensor")),  # [E, r, F]
    Rule("experts/down_proj_lora_a", P(None, "tensor", None)),  # [E, F, r]
    Rule("experts/(gate|up)_proj_bias", P(None, "tensor")),  # [E, F]
    Rule("experts/router", P("fsdp", None)),  # [D, E]
    Rule(f"{_BY_COLUMNS}/kernel", P("fsdp", "tensor")),  # [D, F]
    Rule(f"{_BY_ROWS}/kernel", P("tensor", "fsdp")),  # [F, D]
    Rule(f"{_BY_COLUMNS}/bias", P("tensor")),
    Rule(f"{_BY_COLUMNS}/lora_b", P(None, "tensor")),  # [r, F]
    Rule(f"{_BY_COLUMNS}/lora_magnitude", P("tensor")),
    Rule(f"{_BY_ROWS}/lora_a", P("tensor", None)),  # [F, r]
    Rule("score/kernel", P("fsdp", None)),  # [D, 1]
    Rule(".*", P()),  # norms and the rest: replicated
)

_HEADS = re.compile(r"(^|/)[qkvgo]_proj/")


def spec_of(
    path: str,
    shape: Sequence[int],
    rules: Sequence[Rule],
    sizes: Mapping[str, int],
    heads: int | None = None,
) -> P:
    """The partition spec of a leaf.

    Args:
      path: a path such as `params/layers_0/q_proj/kernel`.
      shape: shape of the leaf, which is replicated if its rank differs from the rule's.
      rules: see `RULES`; the last one must match everything.
      sizes: sizes of the mesh's axes.
      heads: key-value heads; if `tensor` does not divide them, attention weights are not sharded.

    Returns:
      One entry per dimension up to the last sharded one, as XLA writes it; an axis of size 1 or one
      that does not divide its dimension is omitted.

    >>> sizes = {"data": 1, "fsdp": 2, "tensor": 4}
    >>> tuple(spec_of("opt/0/mu/layers_0/q_proj/kernel", (6, 8), RULES, sizes, heads=4))
    ('fsdp', 'tensor')
    >>> tuple(spec_of("layers_0/q_proj/kernel", (6, 8), RULES, sizes, heads=1))
    ('fsdp',)
    """
    path = path.removesuffix("/codes").removesuffix("/scales")  # of a quantised array
    spec = next(rule.spec for rule in rules if fits(rule, path))
    if len(spec) != len(shape):
        return P()
    whole = {"tensor"} if heads and heads % sizes["tensor"] and _HEADS.search(path) else set()

    def kept(entry, dim):
        axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        axes = tuple(axis for axis in axes if axis not in whole and sizes[axis] > 1)
        if not axes or dim % math.prod(sizes[axis] for axis in axes):
            return None
        return axes[0] if len(axes) == 1 else axes

    entries = [kept(entry, dim) for entry, dim in zip(spec, shape, strict=True)]
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def fits(rule: Rule, path: str) -> bool:
    """Whether a path ends in the rule's pattern, matching whole names."""
    return re.search(rf"(^|/)({rule.pattern})$", path) is not None


def read_rules(file: str | Path) -> tuple[Rule, ...]:
    """Reads rules from a file, which precede the built-in ones.

    A line is a pattern and an axis for each dimension, `-` for none and `data+fsdp` for two; a `#`
    starts a comment:

        layers_0/.*_proj/kernel   -     tensor
        lm_head                   fsdp  -

    Raises:
      ConfigError: the file cannot be read, or a line (named by number) is not a rule.
    """
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"sharding_rules: '{file}' cannot be read: {error}.") from error
    rules = []
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if words:
            rules.append(_rule(words, f"{file}:{number}"))
    return (*rules, *RULES)


def _rule(words: list[str], where: str) -> Rule:
    pattern, *entries = words
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{where}: {pattern!r} is no regular expression: {error}.") from error
    axes = [() if entry == "-" else tuple(entry.split("+")) for entry in entries]
    used = [axis for entry in axes for axis in entry]
    if not axes or len(set(used)) < len(used) or set(used) - set(AXES):
        raise ConfigError(
            f"{where}: a rule is a pattern and, for each dimension, '-' or some of "
            f"{', '.join(AXES)}, each at most once, got {' '.join(words)!r}."
        )
    return Rule(pattern, P(*(a[0] if len(a) == 1 else a or None for a in axes)))
