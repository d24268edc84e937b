"""Flax Linen decoder-only transformers, and Hugging Face directories."""

from relax.models.config import TransformerConfig
from relax.models.huggingface.pretrained import (
    load_pretrained,
    read_generation_config,
    read_pretrained_config,
    save_pretrained,
)
from relax.models.rope import RopeScaling
from relax.models.transformer import Transformer

__all__ = [
    "RopeScaling",
    "Transformer",
    "TransformerConfig",
    "load_pretrained",
    "read_generation_config",
    "read_pretrained_config",
    "save_pretrained",
]
