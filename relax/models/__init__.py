"""Flax Linen decoder-only transformers, and Hugging Face directories."""

from relax.models.config import RopeScaling, TransformerConfig
from relax.models.transformer import Transformer

__all__ = ["RopeScaling", "Transformer", "TransformerConfig"]
