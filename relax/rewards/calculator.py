"""An example of an environment: the model may use a calculator before it answers.

model        12 boxes of 7 are <calc>12*7</calc>
environment  <result>84</result>
model        84
"""

import re
from collections.abc import Mapping
from fractions import Fraction

from relax.rewards.answers import last_number_match
from relax.rewards.environment import Observation

MAX_EXPRESSION_LENGTH = 100
_CALL = re.compile(r"<calc>([^<]*)</calc>\s*$")
_TOKEN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|[-+*/()])")


class Calculator:
    """Answers `<calc>expression</calc>` at the end of a turn; any other turn is the last one.

    The last turn's reward is 1 if its last number is the row's `answer`, else 0.

    Args:
      max_calls: maximum number of calls; one more ends the conversation with reward 0.

    >>> calculator = Calculator()
    >>> calculator.reset({"answer": 84})
    >>> calculator.step("<calc>12*7</calc>").text, calculator.step("It is 84.").reward
    ('<result>84</result>', 1.0)
    """

    stop = ("</calc>",)

    def __init__(self, max_calls: int = 8):
        self.max_calls = max_calls

    def reset(self, row: Mapping) -> None:
        self._answer, self._calls = row["answer"], 0

    def step(self, text: str) -> Observation:
        call = _CALL.search(text)
        if call is None:
            return Observation(None, True, last_number_match(text, self._answer))
        self._calls += 1
        if self._calls > self.max_calls:
            return Observation(None, True, 0.0)
        try:
            result = calculate(call[1])
        except ValueError as error:
            result = f"error: {error}"
        return Observation(f"<result>{result}</result>", False)


def calculate(expression: str) -> str:
    """The value of an expression of numbers, + - * / and brackets.

    The computation is exact; fractions are printed with ten significant digits.

    Args:
      expression: for example "12*(3+4)".

    Raises:
      ValueError: the text is no such expression, is too long, or divides by zero.

    >>> calculate("(1 + 2) * -3.5 / 7"), calculate("10/4*2")
    ('-1.5', '5')
    """
    if len(expression) > MAX_EXPRESSION_LENGTH:
        raise ValueError(f"more than {MAX_EXPRESSION_LENGTH} characters")
    tokens = _TOKEN.findall(expression)
    if _TOKEN.sub("", expression).strip():
        raise ValueError("not an expression of numbers, + - * / and brackets")
    value, rest = _sum(tokens)
    if rest:
        raise ValueError(f"unexpected {rest[0]}")
    return str(value) if value.denominator == 1 else f"{float(value):.10g}"


# Each parser takes the remaining tokens and returns a value and the tokens after it.
def _sum(tokens: list[str]) -> tuple[Fraction, list[str]]:
    value, rest = _product(tokens)
    while rest[:1] in (["+"], ["-"]):
        other, tail = _product(rest[1:])
        value, rest = (value + other if rest[0] == "+" else value - other), tail
    return value, rest


def _product(tokens: list[str]) -> tuple[Fraction, list[str]]:
    value, rest = _factor(tokens)
    while rest[:1] in (["*"], ["/"]):
        other, tail = _factor(rest[1:])
        if rest[0] == "/" and not other:
            raise ValueError("division by zero")
        value, rest = (value * other if rest[0] == "*" else value / other), tail
    return value, rest


def _factor(tokens: list[str]) -> tuple[Fraction, list[str]]:
    if not tokens:
        raise ValueError("a number is missing")
    token, *rest = tokens
    if token in "+-":
        value, rest = _factor(rest)
        return (-value if token == "-" else value), rest
    if token == "(":
        value, rest = _sum(rest)
        if rest[:1] != [")"]:
            raise ValueError("a bracket is not closed")
        return value, rest[1:]
    if not token[0].isdigit():
        raise ValueError(f"unexpected {token}")
    return Fraction(token), rest
