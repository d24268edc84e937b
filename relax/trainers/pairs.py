"""What batches of pairs have in common, whatever is learned from them (`PreferenceLoader`)."""

import jax
import jax.numpy as jnp


def num_tokens(batch) -> jax.Array:
    """Real tokens of a batch; prompts count once per answer."""
    if "segment_ids" in batch:
        return (batch["segment_ids"] > 0).sum().astype(jnp.int32)
    lengths, prompts = batch["completion_lengths"], batch["prompt_lengths"][:, None]
    return jnp.where(lengths > 0, prompts + lengths, 0).sum().astype(jnp.int32)
