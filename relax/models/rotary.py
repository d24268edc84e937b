"""Rotary positions and their scaling.

Axes: B batch, T token, M = B * T tokens, K key-value heads, G query heads per key-value head,
H head, R the part of a head that turns, in R/2 planes.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from relax.models.rope import Rope, RopeScaling


class Angles(NamedTuple):
    """Rotary positions of tokens, float32."""

    cos: jax.Array  # [M, 1, 1, R/2]
    sin: jax.Array  # [M, 1, 1, R/2]
    query_scale: jax.Array | None = None  # [M, 1, 1, 1], factor of the queries


def frequencies(rope: Rope, R: int, lengths: jax.Array | None = None) -> jax.Array:
    """Radians per position of each plane: theta^(-2i/R), stretched by `rope.scaling`.

    Su et al., RoFormer, 2021, eq. 15; Peng et al., YaRN, 2023, section 3; Ding et al., LongRoPE,
    2024, eq. 2; the llama3 blend is that of Llama 3.1's reference code.

    Args:
      rope: base and stretching.
      R: entries of a head that turn.
      lengths: `[M]` int, how long each token's document is, where the stretching depends on it;
        None: nowhere beyond the original length.

    Returns:
      `[R/2]`, or `[M, R/2]` with `lengths`.
    """
    exponents = np.arange(0, R, 2, dtype=np.float32) / np.float32(R)
    plain = 1.0 / np.float32(rope.theta) ** exponents
    scaling = rope.scaling
    if scaling is None:
        return jnp.asarray(plain)
    if scaling.kind == "linear":
        return jnp.asarray(plain / np.float32(scaling.factor))
    if scaling.kind == "proportional":
        turns = np.arange(R // 2) < scaling.planes
        return jnp.asarray(np.where(turns, plain, 0.0) / np.float32(scaling.factor))
    if scaling.kind == "ntk":
        raised = rope.theta * scaling.factor ** (R / (R - 2))
        return jnp.asarray(1.0 / np.float32(raised) ** exponents)
    if scaling.kind == "llama3":
        return _blend(plain, scaling.factor, _llama3_share(plain, scaling))
    if scaling.kind == "yarn":
        return _blend(plain, scaling.factor, _yarn_share(rope.theta, R, scaling))
    if scaling.kind == "dynamic":
        return (
            jnp.asarray(plain)
            if lengths is None
            else _dynamic(rope.theta, scaling, exponents, lengths)
        )
    if scaling.kind == "longrope":
        factors = (scaling.short_factor, scaling.long_factor)
        short, long = (np.array(factor, np.float32) for factor in factors)
        if lengths is None:
            return jnp.asarray(plain / short)
        is_long = (lengths > scaling.original_max_position_embeddings)[:, None]
        return jnp.where(is_long, (plain / long)[None, :], (plain / short)[None, :])
    raise ValueError(
        f"unknown rope scaling {scaling.kind!r}. Known: linear, proportional, ntk, llama3, "
        "yarn, dynamic, longrope."
    )


def rotary_angles(
    positions: jax.Array, rope: Rope, R: int, segment_ids: jax.Array | None = None
) -> Angles:
    """cos and sin of position times frequency, and the factor of the queries.

    Args:
      positions: `[B, T]` int.
      rope, R: as `frequencies`.
      segment_ids: `[B, T]`, which document a token belongs to, or None: one a row.
    """
    lengths = None
    scaling = rope.scaling
    if scaling is not None and scaling.depends_on_length:
        if positions.shape[1] > scaling.original_max_position_embeddings:
            lengths = _document_lengths(positions, segment_ids).reshape(-1)
    turns = frequencies(rope, R, lengths)
    turns = turns if turns.ndim == 2 else turns[None, :]
    angles = positions.reshape(-1, 1).astype(jnp.float32) * turns  # [M, R/2]
    angles = (-angles if rope.backwards else angles)[:, None, None, :]
    factor = 1.0 if scaling is None else scaling.attention_factor
    return Angles(jnp.cos(angles) * factor, jnp.sin(angles) * factor, _query_scale(positions, rope))


def _query_scale(positions: jax.Array, rope: Rope) -> jax.Array | None:
    """1 + β log(1 + floor(position / length)), as Llama 4 has it; None: 1 everywhere."""
    if not rope.query_beta:
        return None
    lengths = (positions.reshape(-1, 1, 1, 1) // rope.query_length).astype(jnp.float32)
    return 1 + rope.query_beta * jnp.log1p(lengths)


def rotate(x: jax.Array, angles: Angles | None, interleaved: bool = False) -> jax.Array:
    """Turns each plane by its angle; the entries from R on stay.

    Args:
      x: `[M, K, G, H]`.
      angles: None: nothing turns.
      interleaved: planes are (x[2i], x[2i + 1]); else (x[i], x[i + R/2]).
    """
    if angles is None:
        return x
    cos, sin = angles.cos, angles.sin
    half = cos.shape[-1]
    x32, rest = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    if interleaved:
        first, second = x32[..., 0::2], x32[..., 1::2]
    else:
        first, second = x32[..., :half], x32[..., half:]
    turned = (first * cos - second * sin, second * cos + first * sin)
    if interleaved:
        planes = jnp.stack(turned, axis=-1).reshape(x32.shape)
    else:
        planes = jnp.concatenate(turned, axis=-1)
    return jnp.concatenate([planes.astype(x.dtype), rest], axis=-1)


def scale_queries(q: jax.Array, angles: Angles | None) -> jax.Array:
    """Queries `[M, K, G, H]` times the factors of their positions, if there are any."""
    if angles is None or angles.query_scale is None:
        return q
    return q * angles.query_scale.astype(q.dtype)


def _blend(plain, factor: float, keep) -> jax.Array:
    """Blends frequencies: unchanged where `keep` is 1, divided by the factor where it is 0."""
    keep = np.float32(keep)
    return jnp.asarray(keep * plain + (1 - keep) * plain / np.float32(factor))


def _llama3_share(plain, scaling: RopeScaling):
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    # 0 where a plane turns too rarely to have been seen in full, 1 where it turns often.
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return np.clip((turns - low) / (high - low), 0.0, 1.0)


def _yarn_share(theta: float, R: int, scaling: RopeScaling):
    def plane(turns):  # the plane, as a fraction, that turns so often in the original length
        wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return R * math.log(wavelength) / (2 * math.log(theta))

    first, last = plane(scaling.beta_fast), plane(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, R - 1)
    if first == last:
        last += 0.001
    return 1 - np.clip((np.arange(R // 2, dtype=np.float32) - first) / (last - first), 0.0, 1.0)


def _dynamic(theta: float, scaling: RopeScaling, exponents, lengths: jax.Array) -> jax.Array:
    R = 2 * len(exponents)
    original = scaling.original_max_position_embeddings
    ratio = jnp.maximum(lengths, original).astype(jnp.float32) / original
    raised = theta * (scaling.factor * ratio - (scaling.factor - 1)) ** (R / (R - 2))
    return 1.0 / raised[:, None] ** exponents[None, :]


def _document_lengths(positions: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """`[B, T]`: one more than the largest position in each token's document."""
    if segment_ids is None:
        return jnp.broadcast_to(positions.max(axis=1, keepdims=True) + 1, positions.shape)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return jnp.where(same, positions[:, None, :], 0).max(axis=2) + 1
