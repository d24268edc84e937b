"""Groups of completions of one prompt, whose prompt is computed once.

The prompt attends to itself; each completion attends to the prompt and to itself, and its positions
go on from the prompt's. What comes out is what rows of prompt and completion each would give, for
P prompts of L tokens and G completions of C tokens in P · (L + G · C) tokens of work in place of
P · G · (L + C).

Axes: P prompts, L tokens of a prompt, G completions of a group, C tokens of a completion, D model,
K key-value heads, H head; M = P * L + P * G * C tokens.
"""

import jax
import jax.numpy as jnp

from relax.models.attention import attend, attention_mask
from relax.models.moe import total_aux_loss
from relax.models.rotary import rotary_angles
from relax.models.transformer import Transformer, attention_options


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
    positions = _flat(jnp.broadcast_to(jnp.arange(L)[None, :], (P, L)), after, G)
    ids = jnp.concatenate([prompt_ids.reshape(-1), completion_ids.reshape(-1)])
    real_prompt = jnp.arange(L)[None, :] < prompt_lengths[:, None]
    real_completion = jnp.arange(C)[None, None, :] < completion_lengths[:, :, None]
    real = jnp.concatenate([real_prompt.reshape(-1), real_completion.reshape(-1)])

    R = config.rotary_dim or config.head_dim
    angles, masks = {None: None}, {}
    for kind in config.layer_kinds:
        if kind.rope not in angles:
            angles[kind.rope] = rotary_angles(positions[:, None], kind.rope, R)
        if kind.window not in masks:
            completion_mask = _completion_mask(prompt_lengths, L, G, C, kind.window)
            masks[kind.window] = (attention_mask(None, P, L, kind.window), completion_mask)
    x, routers = model.embed(ids), []
    for layer, kind in zip(model.layers, config.layer_kinds, strict=True):
        x, router = model.run(layer, x, (angles[kind.rope], masks[kind.window], real), _over_groups)
        routers.append(router)
    x = model.norm(x)
    prompt, completion = x[: P * L].reshape(P, L, -1), x[P * L :].reshape(P, G, C, -1)
    return prompt, completion, total_aux_loss(routers)


def _flat(prompt, completion, G):
    """`[P, L]` and `[P, 1, C]` -> `[M]`, the second for each of G completions."""
    completion = jnp.broadcast_to(completion, (completion.shape[0], G, completion.shape[2]))
    return jnp.concatenate([prompt.reshape(-1), completion.reshape(-1)])


def _completion_mask(prompt_lengths, L, G, C, window):
    """`[P * G, C, L + C]`: what each token of a completion sees of the prompt and of itself."""
    t, s, u = jnp.arange(C)[None, :, None], jnp.arange(L)[None, None, :], jnp.arange(C)
    lengths = jnp.repeat(prompt_lengths, G)[:, None, None]
    prompt = jnp.broadcast_to(s < lengths, (len(lengths), C, L))
    own = t - u[None, None, :] >= 0
    if window is not None:
        prompt &= lengths + t - s < window
        own &= t - u[None, None, :] < window
    return jnp.concatenate([prompt, jnp.broadcast_to(own, (len(lengths), C, C))], axis=2)


def _over_groups(config, layer, x, constants):
    """A layer over prompts and completions: `(x, router)`."""
    angles, (prompt_mask, completion_mask), real = constants
    P, L = prompt_mask.shape[:2]
    N, C = completion_mask.shape[:2]  # N = P * G

    def attention(q, k, v):
        options = attention_options(config)
        prompt = [a[: P * L].reshape(P, L, *a.shape[1:]) for a in (q, k, v)]
        out = attend(*prompt, prompt_mask, **options).reshape(P * L, -1)
        q, k, v = (a[P * L :].reshape(N, C, *a.shape[1:]) for a in (q, k, v))
        keys, values = (
            jnp.concatenate([jnp.repeat(shared, N // P, axis=0), own], axis=1)
            for shared, own in zip(prompt[1:], (k, v), strict=True)
        )
        completions = attend(q, keys, values, completion_mask, **options).reshape(N * C, -1)
        return jnp.concatenate([out, completions]), None

    x, _, router = layer(x, angles, attention, real)
    return x, router
