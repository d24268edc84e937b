"""Rewards that compare a completion with the answer of its row."""

import inspect
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

from relax.rewards.loading import reward_factory
from relax.rewards.protocol import text_of

_DIGITS = str.maketrans({0xFF10 + i: str(i) for i in range(10)})  # full-width, as in Chinese texts
_PLAIN = _DIGITS | str.maketrans("\u2212\ufe63\uff0d\uff0e\uff0f", "---./")  # and typographic signs
_FRAC = re.compile(r"\\[dt]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}")
# A sign counts unless a digit, letter or bracket precedes it: "5-3" holds 5 and 3. A point begins a
# number unless a digit or letter precedes it.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]])[-+])?"
    r"(?:"
    r"(?P<over>(?<![0-9./])[0-9]{1,999})[ ]?/[ ]?(?P<under>0{0,9}[1-9][0-9]{0,999})(?![0-9./])"
    r"|(?P<decimal>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
    r"(?P<exponent>[eE][-+]?[0-9]{1,4}(?![\w]))?"
    r")"
)


def per_completion(name: str, score: Callable, *columns: str) -> Callable:
    """Makes a reward function from `score(text of the completion, *values of the columns)`."""

    def reward(completions, **kwargs):
        values = [kwargs[column] for column in columns]
        return [score(text_of(c), *v) for c, *v in zip(completions, *values, strict=True)]

    keyword = inspect.Parameter.KEYWORD_ONLY
    reward.__name__ = reward.__qualname__ = name
    reward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # describe reads it
        [
            inspect.Parameter("completions", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *(inspect.Parameter(column, keyword) for column in columns),
            inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
        ]
    )
    return reward


@reward_factory
def get_exact_match(column: str = "answer") -> Callable:
    """1 if the completion equals the answer up to surrounding space, else 0.

    Args:
      column: column of the answers, texts or numbers; None in it means not applicable.

    >>> get_exact_match()(["72", " 72\\n", "It is 72"], answer=["72", 72.0, "72"])
    [1.0, 1.0, 0.0]
    """
    return per_completion("exact_match", exact_match, column)


def exact_match(completion: str, answer) -> float | None:
    if answer is None:
        return None
    text = completion.strip()
    # Integers become floats in a column where a value is missing or has a fraction.
    whole = isinstance(answer, float) and answer.is_integer()
    return float(text == str(answer).strip() or (whole and text == str(int(answer))))


@reward_factory
def get_last_number_match(column: str = "answer") -> Callable:
    """1 if the last numbers of completion and answer are equal, else 0.

    Numbers are compared by value: 1,000 = 1000.0 = 1e3, 2/4 = .5, and \u2212 is a minus sign. A
    fraction is one number, also as `\\frac{2}{4}`.

    Args:
      column: column of the answers: numbers, or texts as in GSM8K ("... #### 72"). An answer that
        is None or has no number means not applicable.

    >>> get_last_number_match()(["20+52 is 72.", "72 or 73", "none"], answer=[72, "72", "#### 72"])
    [1.0, 0.0, 0.0]
    """
    return per_completion("last_number_match", last_number_match, column)


def last_number_match(completion: str, answer) -> float | None:
    expected = last_number(str(answer))
    return (
        None
        if answer is None or expected is None
        else float(equal(last_number(completion), expected))
    )


def last_number(text: str) -> Decimal | Fraction | None:
    """The last number in a text.

    >>> last_number("from -3 to 1,234.50 euros")
    Decimal('1234.50')
    >>> last_number("2/4 of them"), last_number("about = .5"), last_number("1e3")
    (Fraction(1, 2), Decimal('0.5'), Decimal('1E+3'))
    """
    plain = _FRAC.sub(r"\1/\2", text.translate(_PLAIN))
    found = list(_NUMBER.finditer(plain))
    if not found:
        return None
    last = found[-1]
    sign = "-" if last["sign"] == "-" else ""
    if last["over"]:
        return Fraction(int(sign + last["over"]), int(last["under"]))
    # Parsed with its sign, since arithmetic would round to 28 digits.
    return Decimal(sign + last["decimal"].replace(",", "") + (last["exponent"] or ""))


def equal(one: Decimal | Fraction | None, other: Decimal | Fraction | None) -> bool:
    """Whether two numbers have the same value; None equals nothing.

    >>> equal(Decimal("0.50"), Fraction(1, 2)), equal(None, Decimal(1))
    (True, False)
    """
    if one is None or other is None:
        return False
    if isinstance(one, Fraction) == isinstance(other, Fraction):
        return one == other
    fraction, decimal = (one, other) if isinstance(one, Fraction) else (other, one)
    return fraction == Fraction(decimal)  # exponents have at most four digits
