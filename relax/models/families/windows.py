"""Layers with sliding windows, in the forms used by families."""

from relax.models.config import TransformerConfig

FULL, SLIDING = "full_attention", "sliding_attention"


def of_types(values: dict, types: tuple[str, ...], window: int | None) -> dict:
    """Makes the fields of `TransformerConfig`; drops a window that no layer has.

    `layer_types` of config.json, if present, overrides `types`.
    """
    given, count = values.get("layer_types"), values["num_hidden_layers"]
    types = types if given is None else given
    if len(types) != count:
        raise ValueError(
            f"layer_types must name every layer, got {len(types)} types for {count} layers."
        )
    if SLIDING not in types:
        return {"layer_types": (), "sliding_window": None}
    if window is None:
        raise ValueError(
            "sliding layers, of layer_types or of the family, need sliding_window, and "
            "use_sliding_window where the family has it."
        )
    return {"layer_types": types, "sliding_window": window}


def everywhere(values: dict) -> dict:
    """All layers have `sliding_window`, if set; `layer_types` may say the same."""
    window = values["sliding_window"]
    types = (FULL if window is None else SLIDING,) * values["num_hidden_layers"]
    given = values.get("layer_types")
    if given is not None and tuple(given) != types:
        raise ValueError(
            f"layer_types must be {types[0]} in every layer, as sliding_window {window} says, got "
            f"{', '.join(sorted(set(given)))} in {len(given)} layers."
        )
    return of_types(values, types, window)


def from_layer(values: dict) -> dict:
    """With `use_sliding_window`, windows from layer `max_window_layers` on, or by `layer_types`."""
    window = values["sliding_window"] if values["use_sliding_window"] else None
    count, first = values["num_hidden_layers"], values["max_window_layers"]
    types = (FULL if window is None or i < first else SLIDING for i in range(count))
    return of_types(values, tuple(types), window)


def to_layer(config: TransformerConfig) -> dict:
    """The inverse of `from_layer`."""
    types = types_of(config)
    return {
        "layer_types": list(types),
        "max_window_layers": (*types, SLIDING).index(SLIDING),
        "sliding_window": config.sliding_window,
        "use_sliding_window": SLIDING in types,
    }


def in_turns(values: dict, step: int) -> dict:
    """Every `step`-th layer is full, unless `layer_types` is set."""
    types = (SLIDING if (i + 1) % step else FULL for i in range(values["num_hidden_layers"]))
    return of_types(values, tuple(types), values["sliding_window"])


def types_of(config: TransformerConfig) -> tuple[str, ...]:
    """The type of every layer."""
    return config.layer_types or (FULL,) * config.num_hidden_layers
