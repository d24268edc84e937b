"""Groups of completions that share their prompt's computation.

The prompt attends to itself; each completion attends to the prompt and to itself, and its positions
continue from the prompt's. The result equals that of rows of prompt and completion each, for
P prompts of L tokens and G completions of C tokens in P · (L + G · C) tokens of work in place of
P · G · (L + C).

Axes: P prompts, L tokens of a prompt, G completions of a group, C tokens of a completion, D model,
K key-value heads, H head; M = P * (L + G * C) tokens: a prompt's, then those of its completions.
"""

import functools

import jax
import jax.numpy as jnp

from relax.models.attention import attend, attention_mask
from relax.models.block import Context
from relax.models.config import TransformerConfig
from relax.models.moe import total_aux_loss
from relax.models.transformer import Transformer, all_angles, attention_options


def group_hidden_states(
    model: Transformer,
    prompt_ids: jax.Array,
    prompt_lengths: jax.Array,
    completion_ids: jax.Array,
    completion_lengths: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """The hidden states that predict each token of each completion.

    Called as `model.apply({"params": params}, ..., method=group_hidden_states)`.

    Args:
      prompt_ids: `[P, L]` int, padded on the right.
      prompt_lengths: `[P]` int, from 1 to L.
      completion_ids: `[P, G, C]` int, padded on the right.
      completion_lengths: `[P, G]` int.

    Returns:
      `[P, G, C, D]`: entry t is the state before token t, the prompt's last one for t = 0; and the
      routers' load-balancing loss, or None without experts.
    """
    prompt, completion, aux_loss = group_outputs(
        model, prompt_ids, prompt_lengths, completion_ids, completion_lengths
    )
    last = jnp.take_along_axis(prompt, (prompt_lengths - 1)[:, None, None], axis=1)  # [P, 1, D]
    P, G, _, D = completion.shape
    first = jnp.broadcast_to(last[:, :, None], (P, G, 1, D))
    return jnp.concatenate([first, completion[:, :, :-1]], axis=2), aux_loss


def group_outputs(
    model: Transformer,
    prompt_ids: jax.Array,
    prompt_lengths: jax.Array,
    completion_ids: jax.Array,
    completion_lengths: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The hidden states at each token: `[P, L, D]` of prompts, `[P, G, C, D]` of completions.

    Arguments and the third result are those of `group_hidden_states`; a prompt may be empty here.
    """
    config = model.config
    P, L = prompt_ids.shape
    G, C = completion_ids.shape[1:]
    after = prompt_lengths[:, None, None] + jnp.arange(C)[None, None, :]  # [P, 1, C]
    after = jnp.broadcast_to(after, (P, G, C))
    positions = _joined(jnp.broadcast_to(jnp.arange(L)[None, :], (P, L)), after)
    ids = _joined(prompt_ids, completion_ids)
    real = _joined(
        jnp.arange(L)[None, :] < prompt_lengths[:, None],
        jnp.arange(C)[None, None, :] < completion_lengths[:, :, None],
    )

    angles, masks = all_angles(config, positions[:, None]), {}
    for kind in config.layers:
        if kind.window not in masks:
            completion_mask = _completion_mask(prompt_lengths, L, G, C, kind.window)
            masks[kind.window] = (attention_mask(None, P, L, kind.window), completion_mask)
    within_groups = functools.partial(_within_groups, config)
    x, routers = model.embed(ids), []
    for layer, kind in zip(model.layers, config.layers, strict=True):
        context = Context(angles[kind.rope], real, masks[kind.window])
        x, router = model.run(layer, x, context, within_groups)
        routers.append(router)
    prompt, completion = _parted(model.norm(x), P, L)
    return prompt, completion.reshape(P, G, C, -1), total_aux_loss(routers)


def _joined(prompt, completion):
    """Flattens `[P, L]` and `[P, G, C]` to `[M]`."""
    return jnp.concatenate([prompt, completion.reshape(len(prompt), -1)], axis=1).reshape(-1)


def _parted(x, P, L):
    """Splits `[M, ...]` into `[P, L, ...]` and `[P, G * C, ...]`."""
    x = x.reshape(P, -1, *x.shape[1:])
    return x[:, :L], x[:, L:]


def _completion_mask(prompt_lengths, L, G, C, window):
    """`[P * G, C, L + C]`: the tokens of prompt and completion visible to each completion token."""
    t, s, u = jnp.arange(C)[None, :, None], jnp.arange(L)[None, None, :], jnp.arange(C)
    lengths = jnp.repeat(prompt_lengths, G)[:, None, None]
    prompt = jnp.broadcast_to(s < lengths, (len(lengths), C, L))
    own = t - u[None, None, :] >= 0
    if window is not None:
        prompt &= lengths + t - s < window
        own &= t - u[None, None, :] < window
    return jnp.concatenate([prompt, jnp.broadcast_to(own, (len(lengths), C, C))], axis=2)


def _within_groups(config: TransformerConfig, q, k, v, context: Context):
    """An `Attend` of prompts to themselves, and of completions to their prompt and themselves.

    The mask is two: `[P, L, L]` of prompts and `[P * G, C, L + C]` of completions.
    """
    prompt_mask, completion_mask = context.mask
    P, L = prompt_mask.shape[:2]
    N, C = completion_mask.shape[:2]  # N = P * G
    options = attention_options(config)
    (prompt_q, own_q), (prompt_k, own_k), (prompt_v, own_v) = (_parted(x, P, L) for x in (q, k, v))
    out = attend(prompt_q, prompt_k, prompt_v, prompt_mask, **options).reshape(P, L, -1)

    def with_prompt(shared, own):  # [P, L, K, H] and [P, G * C, K, H] -> [N, L + C, K, H]
        own = own.reshape(N, C, *own.shape[2:])
        return jnp.concatenate([jnp.repeat(shared, N // P, axis=0), own], axis=1)

    completions = attend(
        own_q.reshape(N, C, *own_q.shape[2:]),
        with_prompt(prompt_k, own_k),
        with_prompt(prompt_v, own_v),
        completion_mask,
        **options,
    ).reshape(P, -1, out.shape[2])
    return jnp.concatenate([out, completions], axis=1).reshape(len(q), -1), None
