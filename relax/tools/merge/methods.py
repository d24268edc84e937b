"""Ways of merging tensors that have the same shape, in float32.

All work on parts of a tensor, given numbers that are computed from the whole of it first: the two
factors of `slerp`, and the thresholds of `ties`.
"""

import math
from collections.abc import Sequence

import numpy as np

PARALLEL = 0.9995  # |cos| of tensors above which the sine of their angle is too small to divide by


def linear(tensors: Sequence[np.ndarray], factors: Sequence[float]) -> np.ndarray:
    """The sum of `factor · tensor`, float32, of tensors of one shape.

    >>> linear([np.array([1.0, 2.0]), np.array([3.0, 0.0])], [0.5, 0.25])
    array([1.25, 1.  ], dtype=float32)
    """
    merged = np.zeros(tensors[0].shape, np.float32)
    for tensor, factor in zip(tensors, factors, strict=True):
        merged += np.float32(factor) * tensor
    return merged


def shares(weights: Sequence[float]) -> list[float]:
    """The weights, divided by their sum.

    >>> shares([1.0, 3.0])
    [0.25, 0.75]
    """
    return [weight / sum(weights) for weight in weights]


def slerp_factors(dot: float, a_square: float, b_square: float, t: float) -> tuple[float, float]:
    """The factors of two tensors in their spherical interpolation, each taken as one vector.

        sin((1 - t) Ω) / sin Ω · a + sin(t Ω) / sin Ω · b,  cos Ω = a · b / (|a| |b|)

    Vectors that are almost parallel or opposite, or 0, are interpolated linearly.
    Shoemake, Animating Rotation with Quaternion Curves, 1985, section 3.3.

    Args:
      dot, a_square, b_square: a · b, |a|² and |b|².
      t: from 0, which gives a, to 1, which gives b.
    """
    norms = math.sqrt(a_square * b_square)
    cosine = dot / norms if norms else 1.0
    if abs(cosine) > PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def trim_threshold(change: np.ndarray, density: float) -> float:
    """The magnitude of the smallest number that trimming keeps, at least one number.

    Args:
      change: a whole tensor, which is overwritten.
      density: share of the numbers that is kept.
    """
    flat = np.abs(change, out=change).reshape(-1)
    kept = max(1, round(density * flat.size))
    flat.partition(flat.size - kept)
    return float(flat[-kept])


def ties(
    changes: Sequence[np.ndarray], thresholds: Sequence[float], weights: Sequence[float]
) -> np.ndarray:
    """The merged change: each is trimmed, a sign is elected, and those with that sign are averaged.

        τ_i = change_i where |change_i| ≥ threshold_i, else 0
        γ = sign(Σ w_i τ_i),  A = {i: sign(τ_i) = γ}
        Σ_A w_i τ_i / Σ_A w_i

    0 where all are trimmed, or their weighted sum is 0.
    Yadav et al., TIES-Merging: Resolving Interference When Merging Models, 2023, algorithm 1.

    Args:
      changes: tensors of one shape, model minus base.
      thresholds: of each, see `trim_threshold`.
      weights: of each, above 0.
    """
    trimmed = [
        np.where(np.abs(change) >= threshold, change, np.float32(0))
        for change, threshold in zip(changes, thresholds, strict=True)
    ]
    elected = np.sign(linear(trimmed, weights))
    total, weight = np.zeros_like(elected), np.zeros_like(elected)
    for change, factor in zip(trimmed, weights, strict=True):
        agrees = (np.sign(change) == elected) & (elected != 0)
        total += np.float32(factor) * change * agrees
        weight += np.float32(factor) * agrees
    return np.divide(total, weight, out=np.zeros_like(total), where=weight != 0)
