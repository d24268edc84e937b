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
    mixtral,
    qwen3_moe,
)
FAMILIES = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}


def family_of(model_type, where: str = "config.json") -> Family:
    """The family of a `model_type`."""
    if model_type == "gemma3":
        raise ModelLoadError(
            f"{where}: model_type is 'gemma3', a model of images and text. Use a text model, of "
            "model_type 'gemma3_text'."
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelLoadError(
            f"{where}: unknown architecture: model_type is {model_type!r}. "
            f"Known: {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]
