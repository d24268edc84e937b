"""Rotary positions in config.json, as transformers 4 and 5 write them."""

import dataclasses
import math

from relax.models.config import RopeScaling, TransformerConfig
from relax.models.families.fields import FLAG, POSITIVE, SIZE, Kind, is_number, lists, read_value

ORIGINAL = "original_max_position_embeddings"
FACTORS = lists(POSITIVE)
SHARE = Kind("a number above 0, at most 1", lambda v: is_number(v) and 0 < v <= 1, float)

# Fields of each kind of rope settings besides its kind and theta.
SETTINGS: dict[str, dict[str, Kind]] = {
    "default": {},
    "linear": {"factor": POSITIVE},
    "dynamic": {"factor": POSITIVE, ORIGINAL: SIZE},
    "llama3": {
        "factor": POSITIVE,
        "low_freq_factor": POSITIVE,
        "high_freq_factor": POSITIVE,
        ORIGINAL: SIZE,
    },
    "yarn": {
        "factor": POSITIVE,
        ORIGINAL: SIZE,
        "attention_factor": POSITIVE,
        "beta_fast": POSITIVE,
        "beta_slow": POSITIVE,
        "mscale": POSITIVE,
        "mscale_all_dim": POSITIVE,
        "truncate": FLAG,
    },
    "longrope": {
        "factor": POSITIVE,
        ORIGINAL: SIZE,
        "attention_factor": POSITIVE,
        "short_factor": FACTORS,
        "long_factor": FACTORS,
    },
}


@dataclasses.dataclass(frozen=True)
class RopeFields:
    """The fields of a family's config.json about rotary positions.

    Attributes:
      theta: default base.
      kinds: supported kinds of rope settings, if not all of ours.
      aliases: other names of kinds.
      partial: whether `partial_rotary_factor` sets the rotated share of a head.
      original: default of `original_max_position_embeddings` outside the rope settings, if there.
      local_theta: default base of sliding layers, if separate: rope settings are then per layer
        type, or in older files `rope_local_base_freq` is that base.
    """

    theta: float = 10000.0
    kinds: tuple[str, ...] = tuple(SETTINGS)
    aliases: tuple[tuple[str, str], ...] = ()
    partial: bool = False
    original: int | None = None
    local_theta: float | None = None

    @property
    def names(self) -> set[str]:
        """Names of the fields read here."""
        names = {"rope_theta", "rope_scaling", "rope_parameters"}
        names |= {"partial_rotary_factor"} if self.partial else set()
        names |= {ORIGINAL} if self.original else set()
        return names | ({"rope_local_base_freq"} if self.local_theta else set())

    def read(self, fields: dict, head_dim: int, max_position_embeddings: int) -> dict:
        """Reads the fields of `TransformerConfig` about rotary positions; `fields` has no nulls."""
        parameters, ours = _object(fields, "rope_parameters"), {}
        if self.local_theta:
            parameters, ours["local_rope_theta"] = self._split(fields, parameters)
        outer = {"rope_theta"} | ({"partial_rotary_factor"} if self.partial else set())
        rope = _merged(
            {name: fields[name] for name in outer & fields.keys()},
            _normal(_object(fields, "rope_scaling")),
            _normal(parameters),
        )
        kind = rope.get("rope_type", "default")
        kind = next((ours for theirs, ours in self.aliases if theirs == kind), kind)
        if not isinstance(kind, str) or kind not in self.kinds:
            raise ValueError(
                f"rope_type is {repr(kind)[:80]}, which is not implemented; only "
                f"{', '.join(self.kinds)} are."
            )
        name = "partial_rotary_factor"
        if not self.partial and rope.get(name, 1) != 1:
            raise ValueError(
                f"{name} is {repr(rope[name])[:80]}, which is not implemented; only 1 is."
            )
        turning = int(head_dim * read_value(rope, name, SHARE, 1))
        unknown = sorted(rope.keys() - {"rope_type", "rope_theta", name, *SETTINGS[kind]})
        if unknown:
            raise ValueError(
                f"rope settings that ReLax does not support for rope_type {kind!r}: "
                f"{', '.join(unknown)}."
            )
        if self.original:
            original = read_value(fields, ORIGINAL, SIZE, self.original)
            if rope.setdefault(ORIGINAL, original) != original:
                raise ValueError(
                    f"{ORIGINAL} must be the same in the rope settings and outside, got "
                    f"{repr(rope[ORIGINAL])[:80]} and {original}."
                )
        return ours | {
            "rope_theta": read_value(rope, "rope_theta", POSITIVE, self.theta),
            "rope_scaling": _scaling(kind, rope, turning, max_position_embeddings),
            "rotary_dim": None if turning == head_dim else turning,
        }

    def _split(self, fields: dict, parameters: dict) -> tuple[dict, float]:
        """Splits off the settings of full layers and the base of sliding ones."""
        full, local = (_object(parameters, n) for n in ("full_attention", "sliding_attention"))
        unknown = sorted(parameters.keys() - {"full_attention", "sliding_attention"})
        if unknown:
            raise ValueError(
                "rope_parameters must hold full_attention and sliding_attention, got "
                f"{', '.join(unknown)}."
            )
        base = fields.get("rope_local_base_freq")
        local = _merged({} if base is None else {"rope_theta": base}, _normal(local))
        if (
            local.keys() - {"rope_theta", "rope_type"}
            or local.get("rope_type", "default") != "default"
        ):
            raise ValueError(
                f"rope_parameters of sliding_attention are {repr(local)[:80]}, which is not "
                "implemented; only rope_type 'default' is."
            )
        return full, read_value(local, "rope_theta", POSITIVE, self.local_theta)

    def write(self, config: TransformerConfig) -> dict:
        """Makes the fields of config.json, in the forms of transformers 4 and 5.

        transformers 4 reads `rope_theta` and `rope_scaling`, with its own defaults; 5 reads both.
        """
        scaling = config.rope_scaling
        kind = "default" if scaling is None else scaling.kind
        stretch: dict[str, object] = {}
        for name in SETTINGS[kind]:
            # transformers uses the maximum length as the original length of `dynamic`.
            if hasattr(scaling, name) and (kind, name) != ("dynamic", ORIGINAL):
                value = getattr(scaling, name)
                stretch[name] = list(value) if isinstance(value, tuple) else value
        rope = {"rope_type": kind, "rope_theta": config.rope_theta, **stretch}
        fields: dict[str, object] = {"rope_theta": config.rope_theta}
        if scaling is not None:
            fields["rope_scaling"] = {"rope_type": kind, **stretch}
            if self.original and _follows(scaling, config.max_position_embeddings):
                # transformers 4 accepts nothing else here for Phi-3, and computes the rest.
                names = ("short_factor", "long_factor")
                fields["rope_scaling"] = {"type": kind, **{n: stretch[n] for n in names}}
        if self.partial:
            share = _share(config.rotary_dim, config.head_dim)
            rope["partial_rotary_factor"] = fields["partial_rotary_factor"] = share
        if self.original:
            fields[ORIGINAL] = rope.get(ORIGINAL, self.original)
        if not self.local_theta:
            return fields | {"rope_parameters": rope}
        local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
        fields["rope_local_base_freq"] = config.local_rope_theta
        return fields | {"rope_parameters": {"full_attention": rope, "sliding_attention": local}}


def _follows(scaling: RopeScaling, longest: int) -> bool:
    """Whether the factors of `longrope` follow from its two lengths."""
    original = scaling.original_max_position_embeddings
    if scaling.kind != "longrope" or not original or scaling.factor != longest / original:
        return False
    return scaling.attention_factor == _longrope_attention_factor(scaling.factor, original)


def _share(turning: int | None, head_dim: int) -> float:
    """A share that gives `turning` when multiplied by `head_dim` and truncated.

    >>> 30 / 44 * 44, int(_share(30, 44) * 44)
    (29.999999999999996, 30)
    """
    share = 1.0 if turning is None else turning / head_dim
    return (
        share if turning is None or int(head_dim * share) == turning else math.nextafter(share, 2)
    )


def _object(fields: dict, name: str) -> dict:
    inner = fields.get(name)
    if inner is None:
        return {}
    if not isinstance(inner, dict):
        raise ValueError(f"{name} must be an object, got {repr(inner)[:80]}.")
    return {key: value for key, value in inner.items() if value is not None}


def _normal(rope: dict) -> dict:
    """Renames `type`, the name of `rope_type` before transformers 4.43."""
    kind = rope.get("rope_type", rope.get("type"))
    rope = {name: value for name, value in rope.items() if name not in ("type", "rope_type")}
    return rope if kind is None else rope | {"rope_type": kind}


def _merged(*places: dict) -> dict:
    """Merges the rope settings of several places in config.json."""
    rope: dict = {}
    for place in places:
        differing = sorted(n for n in place.keys() & rope.keys() if place[n] != rope[n])
        if differing:
            raise ValueError(
                f"rope settings in several places disagree about {', '.join(differing)}. Keep "
                "those of rope_parameters."
            )
        rope |= place
    return rope


def _scaling(kind: str, rope: dict, turning: int, longest: int) -> RopeScaling | None:
    if kind == "default":
        return None
    given = {n: read_value(rope, n, k) for n, k in SETTINGS[kind].items() if n in rope}
    original = longest
    if ORIGINAL in SETTINGS[kind]:
        original = given.setdefault(ORIGINAL, longest)
    if kind in ("yarn", "longrope") and ORIGINAL in rope:
        given.setdefault("factor", longest / original)
    factor = read_value(given, "factor", POSITIVE)
    if kind == "dynamic" and (original != longest or turning <= 2):
        raise ValueError(
            f"rope_type 'dynamic' needs {ORIGINAL} equal to max_position_embeddings and more than "
            f"2 entries of a head that turn, got {original}, {longest} and {turning}."
        )
    if kind == "llama3":
        low, high = (read_value(given, f"{n}_freq_factor", POSITIVE) for n in ("low", "high"))
        if low >= high:
            raise ValueError(
                f"low_freq_factor must be below high_freq_factor, got {low} and {high}."
            )
    if kind == "yarn":
        scales = [given.pop(name, None) for name in ("mscale", "mscale_all_dim")]
        given.setdefault("attention_factor", _yarn_attention_factor(factor, *scales))
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            if len(read_value(rope, name, FACTORS)) != turning // 2:
                raise ValueError(
                    f"{name} must have one number for each of {turning // 2} planes, got "
                    f"{len(given[name])}."
                )
        given.setdefault("attention_factor", _longrope_attention_factor(factor, original))
    return RopeScaling(kind, **given)


def _yarn_attention_factor(factor: float, above: float | None, below: float | None) -> float:
    """Peng et al., YaRN, 2023, eq. 22; the quotient of two such factors with two scales."""
    if factor <= 1:
        return 1.0
    if above is None or below is None:
        return 0.1 * math.log(factor) + 1.0
    return (0.1 * above * math.log(factor) + 1.0) / (0.1 * below * math.log(factor) + 1.0)


def _longrope_attention_factor(factor: float, original: int) -> float:
    """Ding et al., LongRoPE, 2024, section 3.3, as in Phi-3."""
    if factor <= 1:
        return 1.0
    if original == 1:
        raise ValueError(f"{ORIGINAL} of rope_type 'longrope' must be above 1, got 1.")
    return math.sqrt(1 + math.log(factor) / math.log(original))
