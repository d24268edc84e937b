"""The losses of supervised fine-tuning, as functions of the log-probability of a target.

`SFT_LOSSES` has all of them by name. `linear_cross_entropy` computes a loss and its gradient in one
pass over the logits, so a loss of your own costs no more than the built-in ones:

    @register_loss("mine", "sft")
    def mine(logprobs):  # [C] -> [C], elementwise
        return -jnp.maximum(logprobs, -5.0)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from relax.losses.registry import Registry

SFT_LOSSES: Registry[Callable[[jax.Array], jax.Array]] = Registry("loss_type")


@SFT_LOSSES.register("nll")
def nll(logprobs: jax.Array) -> jax.Array:
    """-log p(target): cross-entropy."""
    return -logprobs


@SFT_LOSSES.register("dft")
def dft(logprobs: jax.Array) -> jax.Array:
    """-sg(p(target)) log p(target): each token's gradient is weighted by its probability.

    Tokens that the model finds unlikely no longer dominate, as they do in `nll`, whose gradient is
    that of a reward of 1 / p.

    Wu et al., On the Generalization of SFT: A Reinforcement Learning Perspective with Reward
    Rectification (dynamic fine-tuning), 2025, https://arxiv.org/abs/2508.05629, eq. 7; as TRL's
    `dft`
    """
    return -jax.lax.stop_gradient(jnp.exp(logprobs)) * logprobs
