"""Rewards that compare a completion with the answer of its row."""

import inspect
import re
from collections.abc import Callable
from decimal import Decimal

from relax.rewards.loading import reward_factory
from relax.rewards.protocol import text_of

# A sign counts where no digit, letter or bracket precedes it: "5-3" holds 5 and 3.
_NUMBER = re.compile(r"(?:(?<![\w)\]])[-+])?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")


def per_completion(name: str, score: Callable, *columns: str) -> Callable:
    """The reward function of `score(text of the completion, *values of the columns)`."""

    def reward(completions, **kwargs):
        values = [kwargs[column] for column in columns]
        return [score(text_of(c), *v) for c, *v in zip(completions, *values, strict=True)]

    keyword = inspect.Parameter.KEYWORD_ONLY
    reward.__name__ = reward.__qualname__ = name
    reward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter("completions", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *(inspect.Parameter(column, keyword) for column in columns),
            inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
        ]
    )
    return reward


@reward_factory
def get_exact_match(column: str = "answer") -> Callable:
    """1 where the completion is the answer, but for space around both, else 0.

    Args:
      column: of the answers, texts or numbers; None in it: not applicable.

    >>> get_exact_match()(["72", " 72\\n", "It is 72"], answer=["72", 72, "72"])
    [1.0, 1.0, 0.0]
    """
    return per_completion("exact_match", exact_match, column)


def exact_match(completion: str, answer) -> float | None:
    return None if answer is None else float(completion.strip() == str(answer).strip())


@reward_factory
def get_last_number_match(column: str = "answer") -> Callable:
    """1 where the last numbers of completion and answer are equal, else 0.

    Commas between thousands, leading zeros and trailing decimals do not count: 1,000 = 1000.0.

    Args:
      column: of the answers: numbers, or texts as those of GSM8K ("... #### 72"). Where an answer
        is None or has no number: not applicable.

    >>> get_last_number_match()(["20+52 is 72.", "72 or 73", "none"], answer=[72, "72", "#### 72"])
    [1.0, 0.0, 0.0]
    """
    return per_completion("last_number_match", last_number_match, column)


def last_number_match(completion: str, answer) -> float | None:
    expected = last_number(str(answer))
    return (
        None if answer is None or expected is None else float(last_number(completion) == expected)
    )


def last_number(text: str) -> Decimal | None:
    """The last number in a text.

    >>> last_number("from -3 to 1,234.50 euros")
    Decimal('1234.50')
    """
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None
