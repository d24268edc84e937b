"""Model families, one file each: mappings of config.json and tensor names to ours, as data."""

from relax.errors import ModelLoadError
from relax.models.families import (
    apertus,
    arcee,
    ernie4_5,
    exaone4,
    gemma2,
    gemma3,
    gemma4,
    glm4,
    gpt_oss,
    granite,
    granitemoehybrid,
    hunyuan,
    lfm2,
    lfm3,
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
    qwen3_5,
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
    gemma4,
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
    apertus,
    lfm2,
    lfm3,
    qwen3_5,
    mixtral,
    qwen3_moe,
    gpt_oss,
)
# Models of images and text, and the family of their text part, which alone is computed, where
# its config.json does not name it.
TEXT_PARTS = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "mistral3": "mistral",
    "qwen3_5": "qwen3_5_text",
}
FAMILIES = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}


def family_of(model_type, where: str = "config.json") -> Family:
    """The family of a `model_type`."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelLoadError(
            f"{where}: unknown architecture: model_type is {model_type!r}. "
            f"Known: {', '.join(sorted({*FAMILIES, *TEXT_PARTS}))}."
        )
    return FAMILIES[model_type]
