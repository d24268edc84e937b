"""Rewards of mathematical answers, compared as mathematics by math-verify (the extra [math])."""

import functools
import logging
from collections.abc import Callable

from relax.errors import ConfigError
from relax.rewards.lengths import cosine_scaled
from relax.rewards.loading import reward_factory
from relax.rewards.protocol import text_of


def accuracy_reward(completions, solution, log_extra=None, **kwargs) -> list[float | None]:
    r"""1 where the answer of a completion equals the solution, else 0.

    The answer is what stands in LaTeX: in `\boxed{}` where there is one, else behind words such as
    "the answer is" or between dollar signs. Solutions may be LaTeX or plain expressions; where
    one cannot be read: not applicable. math-verify's own time limit, which makes a slow comparison
    a wrong answer, is off: the limit on reward functions holds.

    Args:
      completions: texts or conversations.
      solution: one text for each.
      log_extra: gets what was read, as columns.
    """
    parse_solution, parse_answer, verify = _math_verify()
    rewards: list[float | None] = []
    read: dict[str, list[str]] = {"gold_parsed": [], "answer_parsed": []}
    for completion, expected in zip(completions, solution, strict=True):
        gold = [] if expected is None else parse_solution(str(expected))
        answer = parse_answer(text_of(completion)) if gold else []
        rewards.append(float(verify(gold, answer)) if gold else None)
        read["gold_parsed"].append(str(gold) if gold else "[unreadable]")
        read["answer_parsed"].append(str(answer) if answer else "[unreadable]")
    if log_extra is not None:
        for column, texts in read.items():
            log_extra(column, texts)
    return rewards


def reasoning_accuracy_reward(
    completions,
    solution,
    reasoning_delimiters=None,
    log_extra=None,
    completion_texts=None,
    **kwargs,
) -> list[float | None]:
    """As `accuracy_reward`, of what follows the reasoning; 0 where the reasoning does not end.

    Args:
      reasoning_delimiters: what ends the reasoning, the first that occurs; None: `</think>`.
      completion_texts: with special tokens, which delimiters may be.
    """
    delimiters = reasoning_delimiters or ["</think>"]
    texts = completion_texts or [text_of(completion) for completion in completions]
    used = [next((d for d in delimiters if d in text), None) for text in texts]
    pairs = list(zip(texts, used, strict=True))
    answers = ["" if d is None else text.rpartition(d)[2] for text, d in pairs]
    rewards = accuracy_reward(answers, solution, log_extra)
    return [0.0 if d is None else r for (_, d), r in zip(pairs, rewards, strict=True)]


@reward_factory
def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> Callable:
    """`accuracy_reward`, scaled by the length in tokens: see `cosine_scaled`.

    Args:
      max_len: tokens from where on the reward stays the same, >= 1.
      min_value_wrong, max_value_wrong: of the shortest and of the longest wrong completion.
      min_value_correct, max_value_correct: of the longest and of the shortest right one.

    References:
      Yeo et al., Demystifying Long Chain-of-Thought Reasoning in LLMs, 2025, appendix C.1.
    """
    if max_len < 1:
        raise ConfigError(f"max_len must be at least 1, got {max_len}.")
    _math_verify()
    scale = functools.partial(
        cosine_scaled,
        max_len=max_len,
        wrong=(min_value_wrong, max_value_wrong),
        right=(min_value_correct, max_value_correct),
    )

    def cosine_scaled_reward(completions, solution, completion_ids, **kwargs):
        accuracy = accuracy_reward(completions, solution)
        return [
            None if right is None else scale(len(ids), bool(right))
            for right, ids in zip(accuracy, completion_ids, strict=True)
        ]

    return cosine_scaled_reward


@functools.cache
def _math_verify() -> tuple[Callable, Callable, Callable]:
    """Readers of solutions and of completions, and the comparison."""
    try:
        import math_verify
        from latex2sympy2_extended import NormalizationConfig
    except ImportError as error:
        raise ConfigError(
            "this reward needs math-verify: pip install 'relax-trainers[math]'."
        ) from error
    for name in ("parser", "grader"):  # they warn that their time limit is off
        logging.getLogger(f"math_verify.{name}").setLevel(logging.ERROR)
    latex = math_verify.LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True),
        boxed_match_priority=0,
        try_extract_without_anchor=False,
    )
    return (
        functools.partial(math_verify.parse, parsing_timeout=None),
        functools.partial(
            math_verify.parse,
            extraction_config=[latex],
            extraction_mode="first_match",
            parsing_timeout=None,
        ),
        functools.partial(math_verify.verify, timeout_seconds=None),
    )


accuracy_reward.prepare = _math_verify  # type: ignore[attr-defined]
reasoning_accuracy_reward.prepare = _math_verify  # type: ignore[attr-defined]
