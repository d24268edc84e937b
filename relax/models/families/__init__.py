"""Model families, one file each: mappings of config.json and tensor names to ours, as data."""

from relax.errors import ModelLoadError
from relax.models.families import (
    arcee,
    ernie4_5,
    exaone4,
    gemma2,
    gemma3,
    glm4,
    granite,
    granitemoehybrid,
    hunyuan,
    llama,
    ministral3,
    mistral,
    mixtral,
    nanochat,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    seed_oss,
    smollm3,
)
from relax.models.families.family import Family

_MODULES = (
    llama,
    smollm3,
    mistral,
    ministral3,
    qwen2,
    qwen3,
    gemma2,
    gemma3,
    phi3,
    olmo2,
    olmo3,
    exaone4,
    granite,
    granitemoehybrid,
    glm4,
    hunyuan,
    seed_oss,
    ernie4_5,
    arcee,
    nanochat,
    mixtral,
    qwen3_moe,
)
# Models of images and text, and the family of their text part.
TEXT_PARTS = {"gemma3": "gemma3_text", "mistral3": "ministral3"}
FAMILIES = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}


def family_of(model_type, where: str = "config.json") -> Family:
    """The family of a `model_type`."""
    if isinstance(model_type, str) and model_type in TEXT_PARTS:
        raise ModelLoadError(
            f"{where}: model_type is {model_type!r}, a model of images and text. Use a text model, "
            f"of model_type {TEXT_PARTS[model_type]!r}."
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelLoadError(
            f"{where}: unknown architecture: model_type is {model_type!r}. "
            f"Known: {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]
