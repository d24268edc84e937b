"""Losses as pure functions: no classes, no parameters, no state."""

from relax.losses.cross_entropy import (
    IGNORED,
    TokenSums,
    linear_cross_entropy,
    next_token_targets,
    target_hits,
)

__all__ = ["IGNORED", "TokenSums", "linear_cross_entropy", "next_token_targets", "target_hits"]
