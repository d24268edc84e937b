"""Settings of rotary positions, frozen and hashable; `relax.models.rotary` computes with them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies beyond the original training length of a model.

    Attributes:
      kind: `linear` divides every frequency by `factor`; `ntk` multiplies the base by
        factor^(R / (R - 2)), R the rotated entries of a head; `llama3` divides the low frequencies
        only and blends between `low_freq_factor` and `high_freq_factor` (wavelengths in units of
        `original_max_position_embeddings`); `yarn` blends between the planes that rotate
        `beta_fast` and `beta_slow` times; `proportional` divides every frequency by `factor`, and
        only the first `planes` planes turn, paired as if all did; in documents longer than
        `original_max_position_embeddings`, `dynamic` raises the base, and `longrope` uses
        `long_factor` instead of `short_factor`.
      attention_factor: multiplies cosines and sines (yarn, longrope).
      short_factor, long_factor: one divisor per plane (longrope).
      truncate: whether the blend of yarn starts and ends at whole planes.
      planes: number of planes that turn (proportional).
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    planes: int = 0

    @property
    def depends_on_length(self) -> bool:
        """Whether a token's rotation depends on the length of its document."""
        return self.kind in ("dynamic", "longrope")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: frequencies theta^(-2i/R), scaled by `scaling`.

    With `backwards` planes turn by the negative angle.
    Queries are also multiplied by 1 + query_beta log(1 + floor(position / query_length)).
    """

    theta: float = 10000.0
    scaling: RopeScaling | None = None
    query_beta: float = 0.0
    query_length: int = 1
    backwards: bool = False
