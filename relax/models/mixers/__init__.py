"""Sequence mixers behind one interface, `relax.models.mixers.base`; a layer has one of them."""

from relax.models.cache import Cache
from relax.models.config import TransformerConfig
from relax.models.mixers.attention import Attention
from relax.models.mixers.base import Context, Mixer
from relax.models.mixers.convolution import ShortConvolution
from relax.models.mixers.delta import GatedDelta

__all__ = ["MIXERS", "Context", "Mixer", "empty_cache"]

# By the names in `LayerSpec.mixer`.
MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "convolution": ShortConvolution,
    "delta": GatedDelta,
}


def empty_cache(config: TransformerConfig, B: int, S: int, dtype) -> Cache:
    """A cache of B empty slots with S columns."""
    return tuple(
        MIXERS[layer.mixer].empty_state(config, layer, B, S, dtype) for layer in config.layers
    )
