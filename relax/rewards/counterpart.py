"""The counterpart of a model in an episode: tools, and an environment that answers.

Three kinds of environments, told apart by their methods:

- `messages`: `reset(row) -> messages` and `step(message) -> (messages, reward, done)`. Messages are
  one dict, a list of them, a text (of the user), or None.
- `text`: an attribute `stop` and `step(text) -> Observation`, without a chat template; see
  `relax.rewards.environment`.
- `methods`: TRL's; `reset(**row) -> text or None`, each other public method is a tool, and
  `get_reward() -> float`, if there is one, is called at the end.

Nothing here needs jax or a tokenizer, since it runs in worker processes.
"""

import asyncio
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from relax.config.text import quote
from relax.errors import ConfigError
from relax.rewards.environment import Observation
from relax.rewards.protocol import MAX_REWARD, name_of

MAX_RESULT = 1 << 20  # characters of a tool's result
_ROLES = ("user", "system", "tool", "assistant")
_OWN = ("reset", "step", "get_reward")


class BadAnswer(Exception):
    """A tool or an environment returned what it may not; the message continues its name."""


@dataclass(frozen=True)
class EpisodeInfo:
    """What a counterpart offers.

    Attributes:
      kind: `tools` (no environment), `messages`, `text` or `methods`.
      tools: JSON schemas, as chat templates take them.
      stop: texts that end a turn, of a `text` environment.
      name: of the environment, or "tools".
    """

    kind: str
    tools: tuple[dict, ...]
    stop: tuple[str, ...]
    name: str

    def to_dict(self) -> dict:
        return asdict(self)


class Counterpart:
    """The tools and the environment of one episode.

    Args:
      tools: functions by name.
      make_environment: makes the environment; None: there is none.
    """

    def __init__(
        self, tools: Mapping[str, Callable], make_environment: Callable[[], Any] | None = None
    ):
        self.environment = None if make_environment is None else make_environment()
        self.kind = kind_of(self.environment)
        self.tools = dict(tools)
        if self.kind == "methods":
            self.tools |= {f.__name__: f for f in _methods(self.environment)}

    def answer(self, operation: str, value: Any) -> Any:
        """The answer to `reset`, `step`, `call` or `reward`, as JSON takes it.

        Raises:
          BadAnswer: the result is not what it must be.
          Exception: whatever the tool or the environment raises.
        """
        return getattr(self, operation)(value)

    def reset(self, row: dict) -> list[dict] | str | None:
        """Messages to show first; of a `text` environment a text."""
        if self.environment is None:
            return []
        if self.kind == "methods":
            return _messages(_result(self.environment.reset, **row), "reset")
        shown = _result(self.environment.reset, row)
        if self.kind == "text":
            if shown is not None and not isinstance(shown, str):
                raise BadAnswer(f"reset returned {quote(shown, 200)}, not a text or None")
            return shown
        return _messages(shown, "reset")

    def step(self, turn: Any) -> dict:
        """`messages` (or `text`), `reward` and `done` after a turn: a message, or its text."""
        environment: Any = self.environment
        found = _result(environment.step, turn)
        if self.kind == "text":
            if not isinstance(found, Observation):
                raise BadAnswer(f"step returned {quote(found, 200)}, not an Observation")
            if found.text is not None and not isinstance(found.text, str):
                raise BadAnswer(f"step returned the text {quote(found.text, 200)}, no text or None")
            reward = checked_reward(found.reward, "step")
            return {"text": found.text, "reward": reward, "done": bool(found.done)}
        if not isinstance(found, tuple) or len(found) != 3:
            raise BadAnswer(f"step returned {quote(found, 200)}, not (messages, reward, done)")
        shown, reward, done = found
        messages = _messages(shown, "step")
        if not messages and not done:
            raise BadAnswer("step returned no message, though the episode is not done")
        return {"messages": messages, "reward": checked_reward(reward, "step"), "done": bool(done)}

    def call(self, call: dict) -> str:
        """The result of a tool as text: a text as it is, lists and dicts as JSON."""
        found = _result(self.tools[call["name"]], **call["arguments"])
        if isinstance(found, list | dict | tuple):
            text = json.dumps(found, ensure_ascii=False, default=str)
        else:
            text = str(found)
        if len(text) > MAX_RESULT:
            raise BadAnswer(f"returned {len(text)} characters, more than {MAX_RESULT}")
        return text

    def reward(self, _: Any) -> float | None:
        """The reward at the end of an episode of a `methods` environment."""
        get = getattr(self.environment, "get_reward", None)
        return None if get is None else checked_reward(_result(get), "get_reward")


def kind_of(environment) -> str:
    """The kind of an environment; see `EpisodeInfo`."""
    if environment is None:
        return "tools"
    if hasattr(environment, "step"):
        return "text" if hasattr(environment, "stop") else "messages"
    return "methods"


def describe_counterpart(
    tools: Sequence[Callable], make_environment: Callable[[], Any] | None
) -> EpisodeInfo:
    """Checks tools and an environment, and makes the schemas of the tools.

    Raises:
      ConfigError: a tool lacks a type hint or a docstring, two have one name, or an environment
        lacks a method.
    """
    functions, environment, name = list(tools), None, "tools"
    if make_environment is not None:
        name = name_of(make_environment)
        try:
            environment = make_environment()
        except Exception as error:
            raise ConfigError(f"environment {name!r} cannot be made: it {raised(error)}") from error
        if not callable(getattr(environment, "reset", None)):
            raise ConfigError(f"environment {name!r} has no method reset(row): add one.")
        name = type(environment).__name__
    kind = kind_of(environment)
    if kind == "methods":
        functions += _methods(environment)
        if not functions:
            raise ConfigError(
                f"environment {name!r} has neither a method step(message) nor any other public "
                "method that could be a tool: add one."
            )
    if kind == "text" and tools:
        raise ConfigError(
            f"environment {name!r} answers texts (it has an attribute 'stop'), and tools need a "
            "chat template: let it answer messages, or leave the tools out."
        )
    schemas = tuple(schema_of(function) for function in functions)
    names = [schema["function"]["name"] for schema in schemas]
    for twice in {n for n in names if names.count(n) > 1}:
        raise ConfigError(f"two tools have the name {twice!r}: rename one.")
    return EpisodeInfo(kind, schemas, _stop_of(environment, name), name)


def _stop_of(environment, name: str) -> tuple[str, ...]:
    """The texts that end a turn; one text alone is one of them."""
    stop = getattr(environment, "stop", ())
    stop = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, list | tuple) or not all(isinstance(s, str) and s for s in stop):
        raise ConfigError(
            f"environment {name!r} must have a tuple of texts as its attribute 'stop', got "
            f"{quote(stop, 200)}."
        )
    return tuple(stop)


def schema_of(function: Callable) -> dict:
    """The JSON schema of a function, from its type hints and its docstring, by transformers.

    Raises:
      ConfigError: an argument has no type hint or no description, or cannot be given by its name,
        or the docstring is missing.
    """
    from transformers.utils.chat_template_utils import (
        DocstringParsingException,
        TypeHintParsingException,
        get_json_schema,
    )

    name = name_of(function)
    if isinstance(function, type):
        raise ConfigError(f"tool {name!r} is a class: name a function.")
    parameters = inspect.signature(function).parameters.values()
    unnamed = [p for p in parameters if p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if unnamed:
        raise ConfigError(
            f"tool {name!r} is called with arguments by name, and {str(unnamed[0])!r} has none "
            "that a model could give: write an argument of its own for each."
        )
    missing = [p.name for p in parameters if p.annotation is p.empty]
    if missing:
        raise ConfigError(
            f"tool {name!r} must have a type hint for every argument, and has none for "
            f"{missing[0]!r}: write {name}({missing[0]}: str)."
        )
    try:
        return get_json_schema(function)
    except (TypeHintParsingException, DocstringParsingException, ValueError, TypeError) as error:
        raise ConfigError(
            f"tool {name!r} must have a docstring that describes it and, under 'Args:', each "
            f"argument, and types that JSON has: {error}"
        ) from error


def raised(error: BaseException) -> str:
    """A phrase for an exception, without its place."""
    try:
        message = quote(str(error), 500)[1:-1] if str(error) else ""
    except Exception:  # a user's __str__
        message = ""
    return f"raised {type(error).__name__}{': ' * bool(message)}{message}"


def _methods(environment) -> list[Callable]:
    members = inspect.getmembers(environment, inspect.ismethod)
    return [f for name, f in members if not name.startswith("_") and name not in _OWN]


def _result(function: Callable, /, *args, **kwargs):
    found = function(*args, **kwargs)
    return asyncio.run(_wait_for(found)) if inspect.isawaitable(found) else found


async def _wait_for(found):
    return await found


def _messages(found, method: str) -> list[dict]:
    if found is None:
        return []
    if isinstance(found, str):
        return [{"role": "user", "content": found}]
    found = [found] if isinstance(found, Mapping) else found
    if not isinstance(found, list | tuple):
        raise BadAnswer(f"{method} returned {quote(found, 200)}, not messages")
    for message in found:
        good = isinstance(message, Mapping) and message.get("role") in _ROLES
        if not good or not isinstance(message.get("content"), str):
            raise BadAnswer(
                f"{method} returned {quote(message, 200)}, not a message such as "
                '{"role": "user", "content": "text"}'
            )
    return [dict(message) for message in found]


def checked_reward(reward, method: str) -> float | None:
    """A reward as a float; None: there is none.

    Raises:
      BadAnswer: it is no finite number of at most `MAX_REWARD`.
    """
    if reward is None:
        return None
    reward = reward.tolist() if hasattr(reward, "tolist") else reward
    if isinstance(reward, list | tuple):
        raise BadAnswer(f"{method} gave {len(reward)} rewards, and an episode has one at a time")
    if not isinstance(reward, int | float) or not math.isfinite(reward):
        raise BadAnswer(f"{method} gave the reward {quote(reward, 200)}, not a finite number")
    if abs(reward) > MAX_REWARD:
        raise BadAnswer(f"{method} gave the reward {reward:g}, beyond {MAX_REWARD:g}")
    return float(reward)


def bound(functions: Sequence[Callable]) -> dict[str, Callable]:
    """Functions by the names of their schemas."""
    return {name_of(function): function for function in functions}
