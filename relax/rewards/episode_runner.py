"""Runs the tools and environments of many episodes side by side; the trainer's end."""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from relax.errors import ConfigError, RewardError
from relax.rewards.counterpart import (
    BadAnswer,
    Counterpart,
    EpisodeInfo,
    bound,
    describe_counterpart,
    raised,
)
from relax.rewards.loading import load_environment, load_tool, tool_specs
from relax.rewards.protocol import name_of
from relax.rewards.workers.client import Host
from relax.rewards.workers.threads import reference_of

PROGRAM = "relax.rewards.workers.episode_host"


class Answer(NamedTuple):
    """The answer of a tool or an environment.

    Attributes:
      value: see `Counterpart.answer`; None if it failed.
      kind: how it failed: `raised`, `hung`, `died` or `result`; None: it did not.
      reason: what happened.
    """

    value: Any = None
    kind: str | None = None
    reason: str = ""


class EpisodeRunner:
    """Tools, environments, and the processes that run them.

    Functions and classes that another process can import run there, in a worker forked for each
    episode, which is killed if it hangs. Others (closures, classes of a notebook) run in threads of
    this process; `notes` lists them.

    Args:
      tools: functions, `package.module.function`, or `path/to/file.py:function[,function]`.
      environment_factory: makes an environment per episode: a callable without arguments, a name of
        one that ships, `package.module.Class`, or `path/to/file.py:Class`; None: tools alone.
      timeout_s: time limit of one call.
      workers: calls that run at the same time.
      keep_env: environment variables that are passed on although named like secrets.

    Raises:
      ConfigError: something cannot be loaded, or a tool lacks type hints or a docstring.

    >>> with EpisodeRunner(["relax.rewards.calculator.calculate"]) as runner:
    ...     call = {"name": "calculate", "arguments": {"expression": "6*7"}}
    ...     runner.wait([runner.submit(0, "call", call)])
    [Answer(value='42', kind=None, reason='')]
    """

    def __init__(
        self,
        tools: Sequence[Callable | str] = (),
        environment_factory: Callable | str | None = None,
        *,
        timeout_s: float = 30.0,
        workers: int = 32,
        keep_env: Iterable[str] = (),
    ):
        if not timeout_s > 0 or workers < 1:
            raise ConfigError(
                f"tool_timeout_s must be above 0 and tool_workers at least 1, got {timeout_s} and "
                f"{workers}."
            )
        given = [tools] if callable(tools) or isinstance(tools, str) else list(tools)
        found = [one for tool in _joined(given) for one in _split(tool)]
        references = [_reference(tool) for tool in found]
        environment = None if environment_factory is None else _reference(environment_factory)
        isolated = None not in references and (environment is None) == (environment_factory is None)
        self._next = self._episodes = 0
        self._backend: _Workers | _Threads
        if isolated:
            setup = {"tools": references, "environment": environment, "workers": workers}
            self._backend = _Workers(setup, timeout_s, tuple(keep_env))
        else:
            functions = [load_tool(t) if isinstance(t, str) else t for t in found]
            make = environment_factory
            make = load_environment(make) if isinstance(make, str) else make
            self._backend = _Threads(functions, make, timeout_s)
        self.info: EpisodeInfo = self._backend.info
        self.notes = [] if isolated else [_note(found, environment_factory)]

    def __enter__(self) -> "EpisodeRunner":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends all processes, whatever they are doing; may be called again."""
        self._backend.close()

    def reserve(self, count: int) -> int:
        """The first of `count` numbers of new episodes."""
        self._episodes += count
        return self._episodes - count

    def submit(self, episode: int, operation: str, value: Any, seed: int = 0) -> int:
        """Asks an episode's counterpart a question; one that is asked first is made for it.

        Args:
          episode: a number that no other episode has had.
          operation: `reset`, `step`, `call` or `reward`, of `Counterpart`.
          value: the argument, as JSON takes it.
          seed: of the random numbers of a new counterpart, 0 to 2^32 - 1.

        Returns:
          The number of the question.
        """
        self._next += 1
        question = {"number": self._next, "episode": episode, "seed": seed}
        self._backend.submit(question | {"operation": operation, "value": value})
        return self._next

    def wait(self, numbers: Sequence[int]) -> list[Answer]:
        """Waits for the answers to questions, each once.

        Raises:
          RewardError: the process of the tools is gone.
        """
        return self._backend.wait(numbers)

    def end(self, episode: int) -> None:
        """Ends an episode: its worker is killed, with all that it has started."""
        self._backend.end(episode)

    def probe(self, row: dict) -> None:
        """Plays a turn of an episode of a row, so that a broken environment is refused at once.

        The turn is empty, as a model's may be; in TRL's form there is none, and the reward is asked
        for. Nothing is kept of it.

        Raises:
          ConfigError: the environment raises, or returns what it may not.
        """
        turns: dict[str, tuple[str, Any]] = {
            "messages": ("step", {"role": "assistant", "content": ""}),
            "text": ("step", ""),
            "methods": ("reward", None),
        }
        if self.info.kind not in turns:
            return
        for operation, value in (("reset", row), turns[self.info.kind]):
            (answer,) = self.wait([self.submit(-1, operation, value)])
            if answer.kind is not None:
                self.end(-1)
                method = "get_reward" if operation == "reward" else operation
                raise ConfigError(
                    f"environment {self.info.name!r} cannot be used: in an episode of the first "
                    f"row {'it ' * (answer.kind != 'result')}{_phrase(method, answer)}. Correct "
                    f"its method {method}."
                )
        self.end(-1)


def _phrase(operation: str, answer: Answer) -> str:
    return answer.reason if answer.kind != "raised" else f"{answer.reason} in {operation}"


def _joined(tools: list) -> list:
    """Names with the functions behind a comma, which a list on the command line separates.

    >>> _joined(["tools.py:add", "multiply", "package.module.f"])
    ['tools.py:add,multiply', 'package.module.f']
    """
    found: list = []
    for tool in tools:
        if isinstance(tool, str) and not set(":.") & set(tool) and found:
            found[-1] = f"{found[-1]},{tool}"
        else:
            found.append(tool)
    return found


def _split(tool: Callable | str) -> list[Callable | str]:
    return [*tool_specs(tool)] if isinstance(tool, str) else [tool]


def _reference(source: Callable | str) -> dict | None:
    if isinstance(source, str):
        return {"spec": source}
    reference = reference_of(source)
    return None if reference is None or reference["parameters"] else {"spec": reference["spec"]}


def _note(tools: list, environment) -> str:
    local = [t for t in [*tools, environment] if t is not None and _reference(t) is None]
    return (
        f"{name_of(local[0])!r} can be imported by no other process: tools and environments run "
        "one after another in this process and cannot be killed when they hang. Put it into a file."
    )


class _Workers:
    """Questions to the host process."""

    def __init__(self, setup: dict, timeout_s: float, keep_env: tuple[str, ...]):
        host = Host(setup, timeout_s, keep_env, program=PROGRAM, what="tools and environments")
        self._host, self.close = host, weakref.finalize(self, host.close)
        info = host.loaded()["info"]
        lists = {name: tuple(info[name]) for name in ("tools", "stop")}
        self.info = EpisodeInfo(**info | lists)
        self._answers: dict[int, Answer] = {}

    @contextlib.contextmanager
    def _whole_messages(self):
        try:
            yield
        except BaseException:  # else half a message would be left in a pipe
            self.close()
            raise

    def submit(self, question: dict) -> None:
        if not self.close.alive:
            raise RewardError("the runner of tools is closed: no episode can be run any more.")
        with self._whole_messages():
            self._host.send(question)

    def wait(self, numbers: Sequence[int]) -> list[Answer]:
        with self._whole_messages():
            while any(number not in self._answers for number in numbers):
                answer = self._host.receive()
                failed = answer.get("failed", (None, ""))
                self._answers[answer["number"]] = Answer(answer.get("result"), *failed)
        return [self._answers.pop(number) for number in numbers]

    def end(self, episode: int) -> None:
        if self.close.alive:
            with self._whole_messages():
                self._host.send({"end": episode})


class _Threads:
    """The same within this process: one question after another, when its answer is waited for."""

    def __init__(self, tools: list[Callable], make: Callable | None, timeout_s: float):
        self.info = describe_counterpart(tools, make)
        self._tools, self._make, self._timeout_s = tools, make, timeout_s
        self._episodes: dict[int, Counterpart] = {}
        self._questions: dict[int, dict] = {}

    def submit(self, question: dict) -> None:
        self._questions[question["number"]] = question

    def wait(self, numbers: Sequence[int]) -> list[Answer]:
        return [self._answer(self._questions.pop(number)) for number in numbers]

    def _answer(self, question: dict) -> Answer:
        answers: list[Answer] = []
        run = functools.partial(self._run, question, answers)
        thread = threading.Thread(target=run, name="tool", daemon=True)
        thread.start()
        thread.join(self._timeout_s)
        late = Answer(None, "hung", f"did not return within {self._timeout_s:g} s")
        return answers[0] if answers else late

    def _run(self, question: dict, answers: list[Answer]) -> None:
        episode = question["episode"]
        try:
            if episode not in self._episodes:
                self._episodes[episode] = Counterpart(bound(self._tools), self._make)
            counterpart = self._episodes[episode]
            answers.append(Answer(counterpart.answer(question["operation"], question["value"])))
        except BadAnswer as error:
            answers.append(Answer(None, "result", str(error)))
        except BaseException as error:
            answers.append(Answer(None, "raised", raised(error)))

    def end(self, episode: int) -> None:
        self._episodes.pop(episode, None)

    def close(self) -> None:
        self._episodes.clear()
