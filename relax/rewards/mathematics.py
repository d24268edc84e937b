"""Rewards for mathematical answers, compared by math-verify (the extra [math])."""

import functools
import logging
from collections.abc import Callable

from relax.errors import ConfigError
from relax.rewards.lengths import cosine_scaled
from relax.rewards.loading import reward_factory
from relax.rewards.protocol import text_of


def accuracy_reward(completions, solution, log_extra=None, **kwargs) -> list[float | None]:
    r"""1 if the answer of a completion equals the solution, else 0.

    The answer is the LaTeX in `\boxed{}` if there is one, else behind words such as "the answer
    is"; a bare number, or LaTeX elsewhere, is none. Solutions may be LaTeX or plain expressions;
    one that cannot be parsed means not applicable. math-verify's own time limit, which turns a slow
    comparison into a wrong answer, is off; the time limit of reward functions applies.

    Args:
      completions: texts or conversations.
      solution: one text per completion.
      log_extra: receives the parsed answers, as columns.
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
    """As `accuracy_reward`, for the text after the reasoning; 0 if the reasoning does not end.

    Args:
      reasoning_delimiters: texts that end the reasoning; None: `</think>`.
      completion_texts: texts with special tokens, since delimiters may be special.
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
      max_len: tokens beyond which the reward is constant, >= 1.
      min_value_wrong, max_value_wrong: rewards of the shortest and longest wrong completion.
      min_value_correct, max_value_correct: rewards of the longest and shortest right one.

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
    """Parsers of solutions and completions, and the comparison."""
    try:
        import math_verify
        from latex2sympy2_extended import NormalizationConfig
    except ImportError as error:
        raise ConfigError(
            "this reward needs math-verify: pip install 'relax-trainers[math]'."
        ) from error
    for name in ("parser", "grader"):  # it warns that its time limit is off
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


accuracy_reward.prepare = _math_verify  # type: ignore[attr-defined]  # load_reward calls it
reasoning_accuracy_reward.prepare = _math_verify  # type: ignore[attr-defined]  # as above
