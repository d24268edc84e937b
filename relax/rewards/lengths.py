"""Rewards for the length of a completion and its repetitions, in tokens."""

import math
from collections.abc import Callable

from relax.errors import ConfigError
from relax.rewards.loading import reward_factory


@reward_factory
def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> Callable:
    """Penalises completions close to the maximum length L.

        0 up to L - c;  ((L - c) - length) / c up to L;  -1 beyond

    Args:
      max_completion_len: L, tokens, >= 1.
      soft_punish_cache: c, tokens before L over which the penalty grows, 0 to L.

    References:
      Yu et al., DAPO: An Open-Source LLM Reinforcement Learning System at Scale, 2025, eq. 13.

    >>> get_soft_overlong_punishment(100, 20)([[1] * 50, [1] * 90, [1] * 110])
    [0.0, -0.5, -1.0]
    """
    if not 0 <= soft_punish_cache <= max_completion_len or max_completion_len < 1:
        raise ConfigError(
            "soft_punish_cache must be from 0 to max_completion_len, got "
            f"soft_punish_cache={soft_punish_cache}, max_completion_len={max_completion_len}."
        )
    free = max_completion_len - soft_punish_cache

    def soft_overlong_punishment_reward(completion_ids, **kwargs):
        return [
            -1.0
            if len(ids) > max_completion_len
            else min(0, free - len(ids)) / max(1, soft_punish_cache)
            for ids in completion_ids
        ]

    return soft_overlong_punishment_reward


@reward_factory
def get_repetition_penalty_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> Callable:
    """Penalises repeated n-grams of tokens.

        max_penalty * (1 - distinct n-grams / n-grams);  0 for completions shorter than n

    Args:
      ngram_size: n, >= 1.
      max_penalty: limit for a text of repetitions only, <= 0.

    References:
      Yeo et al., Demystifying Long Chain-of-Thought Reasoning in LLMs, 2025, appendix C.2.

    >>> get_repetition_penalty_reward(2)([[5] * 5, [1, 2, 3, 4], [1]])
    [-0.75, 0.0, 0.0]
    """
    if ngram_size < 1 or max_penalty > 0:
        raise ConfigError(
            "ngram_size must be at least 1 and max_penalty at most 0, got "
            f"ngram_size={ngram_size}, max_penalty={max_penalty}."
        )

    def repetition_penalty_reward(completion_ids, **kwargs):
        return [max_penalty * share or 0.0 for share in map(repeated, completion_ids)]

    def repeated(ids) -> float:
        total = len(ids) - ngram_size + 1
        if total < 1:
            return 0.0
        return 1 - len({tuple(ids[i : i + ngram_size]) for i in range(total)}) / total

    return repetition_penalty_reward


def cosine_scaled(
    length: int,
    correct: bool,
    max_len: int,
    *,
    wrong: tuple[float, float] = (-1.0, -0.5),
    right: tuple[float, float] = (0.5, 1.0),
) -> float:
    """Rewards short right completions more than long ones, and long wrong ones more than short.

        end + (start - end) * (1 + cos(pi * min(1, length / max_len))) / 2

    Args:
      length: tokens.
      correct: selects one of the two curves.
      max_len: length at which a curve reaches its end.
      wrong: start and end of the curve for wrong completions.
      right: end and start of the curve for right ones.

    >>> cosine_scaled(50, True, 100), cosine_scaled(0, False, 100)
    (0.75, -1.0)
    """
    end, start = right if correct else reversed(wrong)
    progress = min(1.0, length / max_len)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
