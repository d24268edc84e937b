"""Reward models among the reward functions of a job."""

import jax.numpy as jnp

from relax.engine.model_source import end_tokens, make_tokenizer
from relax.engine.reward_model import PREFIX, ModelReward, reward_functions


def reward_functions_of(config) -> list:
    """`reward_funcs` of a configuration, `model:DIR` loaded to score for the run's policy."""
    specs, m = config.reward.reward_funcs, config.model
    if not any(spec.startswith(PREFIX) for spec in specs):
        return specs
    tokenizer = make_tokenizer(config)
    ends = end_tokens(m.model_name_or_path, tokenizer)
    dtypes = {"dtype": jnp.dtype(m.dtype), "param_dtype": jnp.dtype(m.param_dtype)}
    return reward_functions(specs, tokenizer, ends, **dtypes)


def shortest(functions: list, positions: int, which: str) -> tuple[int, str]:
    """The positions that policy and reward models all have, and whose they are.

    Args:
      functions: of `reward_functions_of`.
      positions, which: the policy's.
    """
    found = [(positions, which)]
    found += [
        (f.model.config.max_position_embeddings, f"of reward model {f.__name__!r}")
        for f in functions
        if isinstance(f, ModelReward)
    ]
    return min(found, key=lambda pair: pair[0])
