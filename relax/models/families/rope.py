"""Rotary positions in config.json, as transformers 4 and 5 write them."""

import dataclasses
import math

from relax.models.config import TransformerConfig
from relax.models.families.fields import (
    FLAG,
    NOT_NEGATIVE,
    POSITIVE,
    SIZE,
    Kind,
    is_number,
    lists,
    read_value,
)
from relax.models.families.windows import FULL, SLIDING
from relax.models.rope import RopeScaling

ORIGINAL = "original_max_position_embeddings"
PARTIAL = "partial_rotary_factor"
BETA = "llama_4_scaling_beta"
# What stands beside `alpha` in the files of Hunyuan, and is not read there.
BESIDE_ALPHA = {
    "factor": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
FACTORS = lists(POSITIVE)
SHARE = Kind("a number above 0, at most 1", lambda v: is_number(v) and 0 < v <= 1, float)

# Fields of each kind of rope settings besides its kind and theta.
SETTINGS: dict[str, dict[str, Kind]] = {
    "default": {},
    "linear": {"factor": POSITIVE},
    "proportional": {"factor": POSITIVE, PARTIAL: SHARE},
    "ntk": {"factor": POSITIVE},
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
        "mscale": NOT_NEGATIVE,
        "mscale_all_dim": NOT_NEGATIVE,
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
RARE = ("ntk", "proportional")  # kinds that a family has to name


@dataclasses.dataclass(frozen=True)
class RopeFields:
    """The fields of a family's config.json about rotary positions.

    Attributes:
      theta: default base.
      kinds: supported kinds of rope settings, if not all of ours.
      aliases: other names of kinds.
      partial: default of `partial_rotary_factor`, the rotated share of a head, where it may be set.
      original: default of `original_max_position_embeddings` outside the rope settings, if there.
      by_type: whether rope settings are per layer type. Those of sliding layers are then never
        scaled; their base is that of full layers, unless there is `local_theta`.
      local_theta: default base of sliding layers, if separate; in older files
        `rope_local_base_freq` is that base.
      query_scaling: whether `llama_4_scaling_beta` of the rope settings scales queries.
      absent, absent_local: rope settings of a file without any, and of its sliding layers where
        settings are per layer type.
      ignored: rope settings that do not change what is computed for text.
      nested_only: whether there is `rope_parameters` alone, since the family is younger than
        transformers 4.
    """

    theta: float = 10000.0
    kinds: tuple[str, ...] = tuple(kind for kind in SETTINGS if kind not in RARE)
    aliases: tuple[tuple[str, str], ...] = ()
    partial: float | None = None
    original: int | None = None
    by_type: bool = False
    local_theta: float | None = None
    query_scaling: bool = False
    absent: tuple[tuple[str, object], ...] = ()
    absent_local: tuple[tuple[str, object], ...] = ()
    ignored: tuple[str, ...] = ()
    nested_only: bool = False

    @property
    def names(self) -> set[str]:
        """Names of the fields read here."""
        if self.nested_only:
            return {"rope_parameters"}
        names = {"rope_theta", "rope_scaling", "rope_parameters"}
        names |= {"partial_rotary_factor"} if self.partial else set()
        names |= {ORIGINAL} if self.original else set()
        return names | ({"rope_local_base_freq"} if self.local_theta else set())

    def read(self, fields: dict, head_dim: int, max_position_embeddings: int) -> dict:
        """Reads the fields of `TransformerConfig` about rotary positions; `fields` has no nulls."""
        parameters, local = _object(fields, "rope_parameters"), dict[str, object]()
        if self.by_type:
            parameters, local = _by_type(parameters)
        outer = {"rope_theta"} | ({PARTIAL} if self.partial else set())
        places = [
            {name: fields[name] for name in outer & fields.keys()},
            _normal(_object(fields, "rope_scaling")),
            _normal(parameters),
        ]
        if not {"rope_scaling", "rope_parameters"} & fields.keys():
            places.append(dict(self.absent))
            local = dict(self.absent_local) or local
        rope = _merged(*places)
        ours = self._read_query_scaling(rope, max_position_embeddings)
        kind = self._read_kind(rope)
        partial = {} if PARTIAL in SETTINGS[kind] else rope
        if not self.partial and partial.get(PARTIAL, 1) != 1:
            raise ValueError(
                f"{PARTIAL} is {repr(rope[PARTIAL])[:80]}, which is not implemented; only 1 is."
            )
        turning = int(head_dim * read_value(partial, PARTIAL, SHARE, self.partial or 1))
        known = {"rope_type", "rope_theta", PARTIAL, *self.ignored, *SETTINGS[kind]}
        unknown = sorted(rope.keys() - known)
        if unknown:
            raise ValueError(
                f"rope settings that ReLax does not support for rope_type {kind!r}: "
                f"{', '.join(unknown)}."
            )
        if self.by_type and rope.get("truncate") is False:
            # transformers 5 looks for it beside the layer types, and so does not apply it.
            raise ValueError("truncate is False, which is not implemented; only True is.")
        if self.original:
            original = read_value(fields, ORIGINAL, SIZE, self.original)
            if rope.setdefault(ORIGINAL, original) != original:
                raise ValueError(
                    f"{ORIGINAL} must be the same in the rope settings and outside, got "
                    f"{repr(rope[ORIGINAL])[:80]} and {original}."
                )
        theta = read_value(rope, "rope_theta", POSITIVE, self.theta)
        if self.by_type:
            ours["local_rope_theta"] = self._read_local_theta(fields, local, theta)
        return ours | {
            "rope_theta": theta,
            "rope_scaling": _scaling(kind, rope, turning, max_position_embeddings),
            "rotary_dim": None if turning == head_dim else turning,
        }

    def _read_kind(self, rope: dict) -> str:
        """The kind of rope settings; the `alpha` of `dynamic` ones makes them `ntk`."""
        kind = rope.get("rope_type", "default")
        kind = next((ours for theirs, ours in self.aliases if theirs == kind), kind)
        if "ntk" in self.kinds and kind == "dynamic" and rope.get("alpha"):
            for name, value in BESIDE_ALPHA.items():
                if rope.pop(name, value) != value:
                    raise ValueError(
                        f"{name} of rope settings with alpha has no effect unless it is {value}, "
                        "which is not implemented."
                    )
            rope["factor"] = rope.pop("alpha")
            return "ntk"
        if not isinstance(kind, str) or kind not in set(self.kinds) - {"ntk"}:
            raise ValueError(
                f"rope_type is {repr(kind)[:80]}, which is not implemented; only "
                f"{', '.join(self.kinds)} are."
            )
        return kind

    def _read_query_scaling(self, rope: dict, longest: int) -> dict:
        """Takes the settings that scale queries out of the rope settings."""
        if not self.query_scaling:
            return {}
        if rope.pop("max_position_embeddings", longest) != longest:
            raise ValueError(
                "max_position_embeddings must be the same in the rope settings and outside."
            )
        length = read_value(rope, ORIGINAL, SIZE, longest)
        if rope.get("rope_type", "default") == "default":
            rope.pop(ORIGINAL, None)
        return {
            "query_beta": read_value({BETA: rope.pop(BETA, None)}, BETA, NOT_NEGATIVE),
            "query_length": length,
        }

    def _read_local_theta(self, fields: dict, local: dict, theta: float) -> float:
        """The base of sliding layers, whose settings are `local`."""
        base = fields.get("rope_local_base_freq") if self.local_theta else theta
        local = _merged({} if base is None else {"rope_theta": base}, _normal(local))
        if (
            local.keys() - {"rope_theta", "rope_type"}
            or local.get("rope_type", "default") != "default"
        ):
            raise ValueError(
                f"rope_parameters of sliding_attention are {repr(local)[:80]}, which is not "
                "implemented; only rope_type 'default' is."
            )
        return read_value(local, "rope_theta", POSITIVE, self.local_theta)

    def write(self, config: TransformerConfig) -> dict:
        """Makes the fields of config.json, in the forms of transformers 4 and 5.

        transformers 4 reads `rope_theta` and `rope_scaling`, with its own defaults; 5 reads both.
        """
        scaling = config.rope_scaling
        kind = "default" if scaling is None else scaling.kind
        stretch = self._write_scaling(config)
        name = "dynamic" if kind == "ntk" else kind
        rope = {"rope_type": name, "rope_theta": config.rope_theta, **stretch}
        local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
        if self.nested_only:
            return {"rope_parameters": {FULL: rope, SLIDING: local}}
        fields: dict[str, object] = {"rope_theta": config.rope_theta}
        if scaling is not None or self.absent:
            fields["rope_scaling"] = {"rope_type": name, **stretch}
            if self.original and _follows(scaling, config.max_position_embeddings):
                # transformers 4 accepts nothing else here for Phi-3, and computes the rest.
                names = ("short_factor", "long_factor")
                fields["rope_scaling"] = {"type": kind, **{n: stretch[n] for n in names}}
        if self.partial:
            share = _share(config.rotary_dim, config.head_dim)
            rope[PARTIAL] = fields[PARTIAL] = share
        if self.original:
            fields[ORIGINAL] = rope.get(ORIGINAL, self.original)
        if not self.by_type:
            return fields | {"rope_parameters": rope}
        if self.local_theta:
            fields["rope_local_base_freq"] = config.local_rope_theta
        return fields | {"rope_parameters": {FULL: rope, SLIDING: local}}

    def _write_scaling(self, config: TransformerConfig) -> dict[str, object]:
        """The rope settings besides their kind and theta."""
        scaling = config.rope_scaling
        kind = "default" if scaling is None else scaling.kind
        stretch: dict[str, object] = {}
        for name in SETTINGS[kind]:
            # transformers uses the maximum length as the original length of `dynamic`.
            if hasattr(scaling, name) and (kind, name) != ("dynamic", ORIGINAL):
                value = getattr(scaling, name)
                stretch[name] = list(value) if isinstance(value, tuple) else value
        if kind == "ntk":
            stretch = {"alpha": stretch["factor"], "factor": BESIDE_ALPHA["factor"]}
        if kind == "proportional":
            assert scaling is not None  # it has a kind
            width = config.global_head_dim or config.head_dim
            stretch[PARTIAL] = _share(2 * scaling.planes, width)
            if scaling.factor == 1.0:
                del stretch["factor"]  # of which transformers warns
        if self.query_scaling:
            stretch |= {ORIGINAL: config.query_length, BETA: config.query_beta}
        return stretch


def _follows(scaling: RopeScaling | None, longest: int) -> bool:
    """Whether the factors of `longrope` follow from its two lengths."""
    if scaling is None:
        return False
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


def _by_type(parameters: dict) -> tuple[dict, dict]:
    """The rope settings of full and of sliding layers."""
    unknown = sorted(parameters.keys() - {FULL, SLIDING})
    if unknown:
        raise ValueError(
            "rope_parameters must hold full_attention and sliding_attention, got "
            f"{', '.join(unknown)}."
        )
    return _object(parameters, FULL), _object(parameters, SLIDING)


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
    if kind == "proportional":
        planes = int(given.get(PARTIAL, 1.0) * turning // 2)
        if not planes:
            raise ValueError(
                f"{PARTIAL} of rope_type 'proportional' must turn a plane of a head of {turning}, "
                f"got {given[PARTIAL]}."
            )
        return RopeScaling(kind, given.get("factor", 1.0), planes=planes)
    factor = read_value(given, "factor", POSITIVE)
    if kind == "ntk" and turning <= 2:
        raise ValueError(f"alpha needs more than 2 entries of a head that turn, got {turning}.")
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
    if not above or not below:  # none, or 0 as in Devstral 2
        return 0.1 * math.log(factor) + 1.0
    return (0.1 * above * math.log(factor) + 1.0) / (0.1 * below * math.log(factor) + 1.0)


def _longrope_attention_factor(factor: float, original: int) -> float:
    """Ding et al., LongRoPE, 2024, section 3.3, as in Phi-3."""
    if factor <= 1:
        return 1.0
    if original == 1:
        raise ValueError(f"{ORIGINAL} of rope_type 'longrope' must be above 1, got 1.")
    return math.sqrt(1 + math.log(factor) / math.log(original))
