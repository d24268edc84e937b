"""One file per family of models: how its config.json and its tensor names map to ours.

A family has `MODEL_TYPE`, `from_hugging_face(fields, where) -> TransformerConfig`,
`to_hugging_face(config) -> dict`, `tensor_name(path) -> str`, and `DERIVED`: how the tensors are
named that old files hold though they follow from config.json, and that are not read.
"""

from relax.errors import ModelLoadError
from relax.models.families import llama

FAMILIES = {family.MODEL_TYPE: family for family in (llama,)}


def family_of(model_type, where: str = "config.json"):
    """The family of a `model_type`."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelLoadError(
            f"{where}: unknown architecture: model_type is {model_type!r}. "
            f"Known: {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]
