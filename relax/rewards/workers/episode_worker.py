"""What a forked worker does for one episode: answers questions to its tools and environment."""

import os
import random
import sys
from collections.abc import Callable

from relax.errors import ConfigError
from relax.rewards.counterpart import (
    BadAnswer,
    Counterpart,
    EpisodeInfo,
    bound,
    describe_counterpart,
    raised,
    schema_of,
)
from relax.rewards.loading import load_environment, load_tool
from relax.rewards.protocol import name_of
from relax.rewards.workers import descendants, messages


class Sources:
    """The functions and the class of a counterpart, loaded once in the process that forks.

    Args:
      tools: references of tools, `{"spec": ...}`.
      environment: that of an environment, or None.
    """

    def __init__(self, tools: list[dict], environment: dict | None):
        self.tools = [load_tool(one["spec"]) for one in tools]
        self.make = None if environment is None else load_environment(environment["spec"])

    def counterpart(self) -> Counterpart:
        return Counterpart(bound(self.tools), self.make)

    def describe(self) -> EpisodeInfo:
        return describe_counterpart(self.tools, self.make)


def describe(sources: Sources, requests: int, answers: int) -> None:
    """The main function of a worker that sends the schemas, so that the host need not make them.

    Making them imports a part of transformers.
    """
    from transformers.utils import chat_template_utils

    # The types of JSON need no PyTorch, whose import takes seconds.
    chat_template_utils.is_torch_available = lambda: False
    try:
        answer: dict = {"info": sources.describe().to_dict()}
    except ConfigError as error:
        answer = {"error": str(error)}
    except BaseException as error:  # also SystemExit, of an environment
        answer = {"error": f"{_culprit(sources)} cannot be described: it {raised(error)}."}
    messages.write(answers, answer)
    os._exit(0)


def _culprit(sources: Sources) -> str:
    """The tool that cannot be described, or else the environment."""
    for tool in sources.tools:
        try:
            schema_of(tool)
        except BaseException:
            return f"tool {name_of(tool)!r}"
    return "the tools" if sources.make is None else f"environment {name_of(sources.make)!r}"


def run_episode(sources: Sources, requests: int, answers: int) -> None:
    """The main function of an episode's worker.

    It begins as a copy of a process that has only imported, with a seed of its own: what it answers
    depends on its own questions, and not on the order in which episodes run.
    """
    descendants.adopt()  # processes that a tool leaves behind end with this one
    own = os.getpid()
    answer: Callable[[str, object], object] | None = None
    while (message := messages.read(requests)) is not None:
        if answer is None:
            random.seed(message["seed"])
            if numpy := sys.modules.get("numpy"):
                numpy.random.seed(message["seed"] % 2**32)
        number = {"number": message["number"]}
        try:
            answer = answer or sources.counterpart().answer
            result = {"result": answer(message["operation"], message["value"])}
            frame = messages.encode(number | result)
        except BadAnswer as error:
            frame = messages.encode(number | {"failed": ["result", str(error)]})
        except BaseException as error:  # also SystemExit: a tool never ends the run
            frame = messages.encode(number | {"failed": ["raised", raised(error)]})
        if os.getpid() != own:  # a tool has forked, and its parent answers
            os._exit(0)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        messages.write(answers, frame)
