"""One file per family of models: how its config.json and its tensor names map to ours.

A family has `MODEL_TYPE`, `from_hugging_face(fields, where) -> TransformerConfig`,
`to_hugging_face(config) -> dict` and `tensor_name(path) -> str`.
"""

from relax.errors import ModelLoadError
from relax.models.families import llama

FAMILIES = {family.MODEL_TYPE: family for family in (llama,)}


def family_of(model_type: str | None, where: str = "config.json"):
    """The family of a `model_type`."""
    if model_type not in FAMILIES:
        raise ModelLoadError(
            f"{where}: unknown architecture: model_type is {model_type!r}. "
            f"Known: {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]
