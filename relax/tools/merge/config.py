"""The configuration of `relax merge`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from relax.config.options import option, section
from relax.config.rules import NoEffect, Rule, Values
from relax.config.settings import Settings

SavedDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(slots=True, kw_only=True)
class SourcesConfig:
    """Models, and the directory of the merged one."""

    models: list[str] = option(
        [],
        "Model directories or hub names, or adapter directories; an adapter counts as its base "
        "with it merged.",
    )
    base_model: str | None = option(
        None,
        "The model that all were trained from, for ties; none = that of the adapters.",
    )
    output_dir: str | None = option(None, "New model directory; a model in it is replaced.")
    dtype: SavedDtype | None = option(
        None, "Precision of the written weights; none = that of the models."
    )


@dataclass(slots=True, kw_only=True)
class MethodConfig:
    """The way of merging."""

    method: Literal["linear", "slerp", "ties"] = option(
        "linear",
        "Weighted mean, spherical interpolation of two models, or trimmed changes of the elected "
        "sign.",
    )
    weights: list[float] | None = option(
        None, "A weight per model, in linear and ties; only their ratios matter; none = all equal."
    )
    t: float = option(
        0.5, "slerp: 0 gives the first model, 1 the second one.", at_least=0, at_most=1
    )
    density: float = option(
        0.2, "ties: share of each tensor's largest changes that is kept.", above=0, at_most=1
    )
    lambda_: float = option(1.0, "ties: factor of the merged change.", flag="lambda")


def _problems(v: Values) -> Iterator[str]:
    models, weights = v["models"], v["weights"]
    if len(models) < 2:
        yield f"models must name at least two, as A,B, got {len(models) or 'none'}"
    elif v["method"] == "slerp" and len(models) != 2:
        yield f"slerp merges two models, got {len(models)}; use linear or ties for more"
    if v["output_dir"] is None:
        yield "output_dir must name a directory, got none"
    elif any(_same(v["output_dir"], name) for name in (*models, v["base_model"])):
        yield f"output_dir must not be one of the models, got {v['output_dir']!r}"
    if weights is not None and len(weights) != len(models):
        yield f"weights must have one number per model, got {len(weights)} for {len(models)} models"
    if weights and abs(sum(weights)) < 1e-6:
        yield f"weights must not sum to 0, got {','.join(map(str, weights))}"
    if weights and v["method"] == "ties" and min(weights) <= 0:
        yield f"weights of ties must be above 0, got {min(weights)}"


def _same(path: str, other: str | None) -> bool:
    return (
        other is not None
        and Path(path).expanduser().resolve() == Path(other).expanduser().resolve()
    )


def _other(method: str):
    return lambda v: v["method"] != method


NO_EFFECT = (
    NoEffect("weights", lambda v: v["method"] == "slerp", "slerp is weighted by t"),
    NoEffect("t", _other("slerp"), "it is for slerp"),
    NoEffect("density lambda base_model", _other("ties"), "it is for ties"),
)


@dataclass(slots=True, kw_only=True)
class MergeConfig(Settings):
    """Merge models, or adapters, into one model directory."""

    algorithm: ClassVar[str] = "merge"
    examples: ClassVar[tuple[str, ...]] = (
        "--models A,B --weights 0.7,0.3 --output_dir MERGED",
        "--models ADAPTER_A,ADAPTER_B --method ties --density 0.5 --output_dir MERGED",
    )
    shared_rules: ClassVar[tuple[Rule, ...]] = (_problems,)
    no_effect: ClassVar[tuple[NoEffect, ...]] = NO_EFFECT

    sources: SourcesConfig = section(SourcesConfig)
    method: MethodConfig = section(MethodConfig)
