"""The interface of sequence mixers, the parts of a layer in which tokens see other tokens.

    y, state = mixer(x, context, state)

One call serves training, prefill and decoding:

- `state` None: `x` holds whole rows, `[B * T, D]`, that begin with nothing. The returned state is
  that of each row behind its last real token, for `relax.models.cache`; training ignores it.
- `state` of a cache: `x` holds the new tokens of each slot, `[B * T, D]`, and the returned state
  has them. Decoding is the case T = 1.

A layer with a source (`LayerSpec.source`) is given the state that its source has just returned.

Axes: B rows or slots, T tokens of a row, M = B * T tokens, D model, S keys.
"""

from typing import Any, NamedTuple

import jax

from relax.models.config import LayerSpec, TransformerConfig
from relax.models.layers import LayerPart


class Context(NamedTuple):
    """Properties of the tokens that a layer needs besides their states; no gradients.

    Attributes:
      real: `[B, T]` bool, false for padding.
      angles: of the rotary positions; None: no positions.
      mask: `[B, T, S]` bool, the keys that each query sees in whole rows; None: the layer has no
        attention, or decodes.
      segment_ids: `[B, T]` int, the document of each token of a row; None: one per row.
      parent_ids: `[B, T]` int, the document that a token's own continues; None: no parents.
      positions: `[B, T]` int, those of new tokens behind a cache; None: whole rows.
    """

    real: jax.Array
    angles: Any = None
    mask: jax.Array | None = None
    segment_ids: jax.Array | None = None
    parent_ids: jax.Array | None = None
    positions: jax.Array | None = None


class Mixer(LayerPart):
    """A sequence mixer; its parameters are those of its layer."""

    attn_implementation: str = "auto"

    def __call__(self, x: jax.Array, context: Context, state: Any) -> tuple[jax.Array, Any]:
        """Mixes the tokens of rows, or new tokens with those before them.

        Args:
          x: `[M, D]`, see above.
          context: see `Context`.
          state: see above.

        Returns:
          `[M, D]`, and the state behind the tokens.
        """
        raise NotImplementedError

    @staticmethod
    def empty_state(config: TransformerConfig, layer: LayerSpec, B: int, S: int, dtype) -> Any:
        """The state of B empty slots with S columns."""
        raise NotImplementedError
