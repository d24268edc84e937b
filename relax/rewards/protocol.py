"""The protocol of reward functions: arguments, results and names.

    f(prompts, completions, **columns) -> list of float or None, plain or async

The protocol is TRL's: functions written for its GRPOTrainer run unchanged. Arguments are passed by
name, and only those in the signature: `prompts`, `completions`, `completion_ids`, `trainer_state`,
`log_extra(column, values)`, `log_metric(name, value)`, and every other column of the rows. None
means that the function does not apply to that completion.

`completions` contain no special tokens. A function that names `completion_texts` or `prompt_texts`
among its arguments gets the texts with all special tokens, except the end token of a completion:
tags may be special tokens, and a chat template may open one in the prompt.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from relax.config.names import suggestion
from relax.config.text import quote
from relax.errors import ConfigError, DataError

# Passed to every function that takes them; no column may have these names.
TEXTS = ("prompt_texts", "completion_texts")
GIVEN = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    *TEXTS,
)
# Columns that functions get in another form.
_CONSUMED = ("prompt", "completion", "completion_ids")


@dataclass(frozen=True)
class RewardInfo:
    """Properties of a function's signature.

    Attributes:
      name: name of its metrics.
      required: arguments without a default.
      accepted: all named arguments.
      takes_any: whether it has `**kwargs` and so gets every column.
    """

    name: str
    required: tuple[str, ...]
    accepted: tuple[str, ...]
    takes_any: bool

    def takes(self, argument: str) -> bool:
        return self.takes_any or argument in self.accepted


def describe(function: Callable, name: str | None = None) -> RewardInfo:
    """Reads a signature.

    Raises:
      ConfigError: the function cannot be called with keyword arguments.

    >>> describe(lambda completions, answer, **kwargs: [], "f").required
    ('completions', 'answer')
    """
    name = name or name_of(function)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"reward {name!r} has no signature that can be read: wrap it in a function "
            "f(completions, **kwargs)."
        ) from error
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and _required(p)]
    if positional:
        raise ConfigError(
            f"reward {name!r} takes {positional[0]!r} by position only, but arguments come by "
            "name: remove the '/' from its signature."
        )
    return RewardInfo(
        name,
        tuple(p.name for p in named if _required(p)),
        tuple(p.name for p in named),
        any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def _required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty


def name_of(function: Callable) -> str:
    """`__name__`, also within `functools.partial`; for other callables that of their class.

    >>> name_of(functools.partial(len))
    'len'
    """
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", None) or type(function).__name__
    return "lambda" if name == "<lambda>" else name


def distinct(names: Iterable[str]) -> list[str]:
    """Numbers repeated names.

    >>> distinct(["f", "g", "f"])
    ['f', 'g', 'f_2']
    """
    found: list[str] = []
    for name in names:
        new, number = name, 2
        while new in found:
            new, number = f"{name}_{number}", number + 1
        found.append(new)
    return found


def check_columns(infos: Iterable[RewardInfo], columns: Iterable[str]) -> None:
    """Refuses functions that need a column that no row has.

    Raises:
      ConfigError: names the function, the missing column and the existing columns.
    """
    present = [name for name in columns if name not in _CONSUMED]
    for name in present:
        if name in GIVEN:
            raise ConfigError(
                f"the rows have a column {name!r}, which is the name of what every reward function "
                "is given: rename the column."
            )
    for info in infos:
        for argument in info.required:
            if argument not in GIVEN and argument not in present:
                shown = ", ".join(map(repr, present)) or "none besides the prompt and completion"
                raise ConfigError(
                    f"reward {info.name!r} needs the column {argument!r}, which the rows do not "
                    f"have. They have {shown}.{suggestion(argument, present)}"
                )


def check_values(infos: Iterable[RewardInfo], columns: Mapping[str, "Column"], count: int) -> None:
    """Refuses functions that need a column without a single value, on which none would apply.

    Args:
      columns: what is known of the columns of `count` rows.

    Raises:
      ConfigError: names the function, the column and the columns with values.
    """
    empty = {name for name, column in columns.items() if not column.has_values}
    for info in infos:
        for argument in info.required:
            if argument in empty:
                shown = ", ".join(repr(n) for n in columns if n not in empty) or "none"
                raise ConfigError(
                    f"reward {info.name!r} needs the column {argument!r}, which is None in all "
                    f"{count} rows. Columns with values: {shown}. Use a reward "
                    "that reads one of them, or add the values."
                )


def collect_columns(rows: Sequence[Mapping]) -> dict[str, list]:
    """The columns for reward functions, one value per row; None where a row has none.

    >>> collect_columns([{"prompt": "1+1=", "answer": "2"}, {"prompt": "?"}])
    {'answer': ['2', None]}
    """
    names = dict.fromkeys(name for row in rows for name in row if name not in _CONSUMED)
    return {name: [row.get(name) for row in rows] for name in names}


class Column(NamedTuple):
    """What is known of a column.

    Attributes:
      has_values: some row has a value that is not None.
      odd_row: the first row with a value that JSON does not preserve, see `check_plain`; None: all
        values can be sent to another process.
    """

    has_values: bool
    odd_row: int | None = None


def describe_columns(rows: Iterable[Mapping]) -> dict[str, Column]:
    """What is known of every column, by one pass over the rows.

    >>> describe_columns([{"prompt": "1+1=", "answer": "2"}, {"day": {1, 2}, "none": None}])["day"]
    Column(has_values=True, odd_row=1)
    """
    has_values: dict[str, bool] = {}
    odd: dict[str, int] = {}
    for i, row in enumerate(rows):
        for name, value in row.items():
            if type(value) is not str and name not in odd and not is_plain(value):
                odd[name] = i
            has_values[name] = has_values.get(name, False) or value is not None
    return {name: Column(found, odd.get(name)) for name, found in has_values.items()}


def is_plain(value) -> bool:
    """Whether JSON preserves a value."""
    try:
        check_plain(value, "")
    except DataError:
        return False
    return True


def check_plain(value, where: str) -> None:
    """Refuses values that JSON does not preserve.

    Raises:
      DataError: names the place and the type.
    """
    if value is None or type(value) in (str, int, float, bool):
        return
    if type(value) is list:
        for item in value:
            check_plain(item, where)
        return
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise DataError(f"{where} holds a dict with the key {key!r}: keys must be strings.")
            check_plain(item, where)
        return
    raise DataError(
        f"{where} holds a {type(value).__name__}: reward functions run in their own process and "
        "are sent texts, numbers, booleans, None, lists and dicts. Convert the column or leave it "
        "out."
    )


# Larger rewards are refused like infinity. The square of this one, as in variances and the critic's
# loss, is still a finite float32.
MAX_REWARD = 1e18


class BadResult(Exception):
    """A function did not return a list with one reward per completion."""


def check_rewards(result, n: int) -> tuple[list[float | None], dict[int, str]]:
    """Splits a function's result into rewards and refused values.

    Returns:
      n rewards, None where not applicable or refused; and the reason for each refused one.

    Raises:
      BadResult: the result is not a list of n items.

    >>> check_rewards([1, None, float("nan"), 1e308], 4)
    ([1.0, None, None, None], {2: 'returned nan', 3: 'returned 1e+308'})
    """
    result = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(result, list | tuple):
        raise BadResult(
            f"returned {quote(result, 200)} (a {type(result).__name__}), not a list of {n} rewards"
        )
    if len(result) != n:
        raise BadResult(f"returned {len(result)} rewards for {n} completions")
    rewards: list[float | None] = []
    refused: dict[int, str] = {}
    for i, value in enumerate(result):
        value = value.tolist() if hasattr(value, "tolist") else value
        number = _number(value)
        rewards.append(number)
        if value is not None and number is None:
            refused[i] = f"returned {quote(value, 200)}"
    return rewards, refused


def _number(value) -> float | None:
    if not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if abs(value) <= MAX_REWARD else None  # NaN is not


def text_of(completion: str | list[dict]) -> str:
    """The text of a completion; in a conversation, the assistant's last message.

    >>> text_of([{"role": "assistant", "content": "72"}])
    '72'
    """
    if isinstance(completion, str):
        return completion
    messages = [m for m in completion if m.get("role", "assistant") == "assistant"]
    content = (messages or completion)[-1].get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)
