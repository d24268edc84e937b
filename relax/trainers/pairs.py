"""Token counts of preference batches, for DPO and reward models (`PreferenceLoader`)."""

import jax
import jax.numpy as jnp


def num_tokens(batch) -> jax.Array:
    """Number of tokens in a batch without padding; a prompt counts once per completion."""
    if "segment_ids" in batch:
        return (batch["segment_ids"] > 0).sum().astype(jnp.int32)
    lengths, prompts = batch["completion_lengths"], batch["prompt_lengths"][:, None]
    return jnp.where(lengths > 0, prompts + lengths, 0).sum().astype(jnp.int32)
