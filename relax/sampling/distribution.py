"""Sampling of a token from logits: bias, penalty, temperature, truncation and the draw.

Axes: B rows, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from relax.sampling.selection import BANNED, draw, draw_coupled, greedy, largest, nucleus

Array = jax.Array | np.ndarray
Scalar = jax.Array | np.float32


class Rules(NamedTuple):
    """Changes of the logits, in order; None: off, and compiled away."""

    logit_bias: Array | None = None  # [V]
    repetition_penalty: Scalar | None = None
    eos_token_ids: Array | None = None  # [E] int, banned until the minimum length
    temperature: Scalar | None = None  # None: greedy
    top_p: Scalar | None = None
    min_p: Scalar | None = None


def sample_token(
    logits: jax.Array,
    keys: jax.Array,
    rules: Rules,
    *,
    top_k: int = 0,
    seen: jax.Array | None = None,
    too_short: jax.Array | None = None,
    coupled: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Samples one token per row, with its log-probability.

    Args:
      keys: `[B]`, one per row; unused without a temperature (greedy).
      logits, rules, top_k, seen, too_short: as for `process_logits`.
      coupled: draw by `draw_coupled`.

    Returns:
      Tokens `[B]` int32 and log-probabilities `[B]` float32 under the distribution that was sampled
      from; under temperature 1 if greedy.
    """
    processed = process_logits(logits, rules, top_k=top_k, seen=seen, too_short=too_short)
    if rules.temperature is None:
        return greedy(processed)
    return draw_coupled(keys, processed) if coupled else draw(keys, processed)


def process_logits(
    logits: jax.Array,
    rules: Rules,
    *,
    top_k: int = 0,
    seen: jax.Array | None = None,
    too_short: jax.Array | None = None,
) -> jax.Array:
    """Logits of the sampling distribution; -inf for tokens that cannot be sampled.

    Args:
      logits: `[B, V]` float32.
      rules: the changes.
      top_k: number of largest logits to keep; 0: all.
      seen: `[B, V]` bool, tokens in prompt and completion, for the repetition penalty.
      too_short: `[B]` bool, rows that must not end yet.
    """
    if rules.logit_bias is not None:
        logits = logits + rules.logit_bias[None, :]
    if rules.repetition_penalty is not None:
        if seen is None:
            raise ValueError("repetition_penalty needs `seen`, the tokens in each row so far.")
        penalty = rules.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if rules.eos_token_ids is not None and too_short is not None:
        ends = jnp.zeros(logits.shape[1], bool).at[rules.eos_token_ids].set(True)
        logits = jnp.where(too_short[:, None] & ends[None, :], BANNED, logits)
    if rules.temperature is None:
        return logits
    return truncate(logits / rules.temperature, rules, top_k)


def truncate(logits: jax.Array, rules: Rules, top_k: int) -> jax.Array:
    """Bans tokens below the thresholds of top-k, top-p and min-p; ties at a threshold stay.

    Each option applies to the tokens left by the previous one, as in transformers.
    """
    top = logits.max(axis=-1)
    lowest, head = jnp.full_like(top, BANNED), logits
    if top_k:
        head = largest(logits, top_k)
        lowest = head[:, -1]
    if rules.top_p is not None:
        lowest = jnp.maximum(lowest, nucleus(head, rules.top_p))
    if rules.min_p is not None:
        lowest = jnp.maximum(lowest, top + jnp.log(rules.min_p))
    return jnp.where(logits >= lowest[:, None], logits, BANNED)
