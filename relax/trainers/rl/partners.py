"""What answers the model in an episode: tools and environments, by messages or by plain text.

A partner asks its questions (a tool's result, an environment's step) of an `EpisodeRunner`, which
works on those of many episodes side by side, and makes tokens of the answers. Tokens are appended
and never decoded and tokenised again: the trained tokens are exactly the sampled ones.

`begin` asks for what comes before the first turn, `answer` for the answer to a turn that ended by
`eos` or `stop`, and `end` for what an episode gets in the end, such as a reward. `stop` are texts
that end a turn.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence

from relax.data.chat_turns import ChatTurns, assistant_message, tool_message
from relax.data.tool_calls import Turn
from relax.errors import DataError
from relax.rewards.episode_runner import Answer, EpisodeRunner

ERROR = "error"  # the finish reason of an episode whose environment failed


@dataclasses.dataclass
class Episode:
    """One episode.

    Attributes:
      number: of its counterpart in the runner.
      row: the row of the data set.
      prompt_ids: tokens of the prompt and of what `reset` returned.
      seed: of its counterpart's random numbers.
      messages: the conversation; those from `first` on make the completion.
      ids, sampled, logprobs: the completion's tokens, whether the model wrote them, and their
        log-probabilities (0 if it did not).
      reward: sum of the environment's rewards; None: none was given.
      finish: why it is over: `eos`, `stop`, `length` or `error`; empty: it is not.
      turns, tool_calls, tool_failures: counts.
      errors: what went wrong.
    """

    number: int
    row: dict
    prompt_ids: list[int]
    seed: int = 0
    messages: list[dict] = dataclasses.field(default_factory=list)
    first: int = 0
    ids: list[int] = dataclasses.field(default_factory=list)
    sampled: list[bool] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    reward: float | None = None
    finish: str = ""
    turns: int = 0
    tool_rounds: int = 0
    tool_calls: int = 0
    tool_failures: int = 0
    errors: list[str] = dataclasses.field(default_factory=list)

    def add_turn(self, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Appends the tokens of a turn of the model."""
        self.turns += 1
        self.ids += ids
        self.logprobs += logprobs
        self.sampled += [True] * len(ids)

    def add_answer(self, ids: Sequence[int]) -> None:
        """Appends tokens that the model did not write."""
        self.ids += ids
        self.logprobs += [0.0] * len(ids)
        self.sampled += [False] * len(ids)

    def add_reward(self, reward: float | None) -> None:
        if reward is not None:
            self.reward = (self.reward or 0.0) + reward

    def lose(self, why: str) -> None:
        """Ends the episode without a reward."""
        self.errors.append(why)
        self.reward, self.finish = None, ERROR

    def record(self) -> dict:
        """What the table of completions shows of it."""
        return {
            "turns": self.turns,
            "tool_calls": self.tool_calls,
            "tool_failures": self.tool_failures,
            "failed": self.finish == ERROR,
            "errors": list(self.errors),
        }


@dataclasses.dataclass
class Asked:
    """The questions of an episode after a turn.

    Attributes:
      numbers: of the questions that the runner works on.
      collect: takes their answers and returns the tokens to append, or None if the episode is over.
    """

    numbers: list[int]
    collect: Callable[[list[Answer]], list[int] | None]


class TextPartner:
    """An environment that answers text by text, without a chat template.

    Args:
      encode: turns text into ids, without special tokens.
      decode: turns ids into the text that the environment gets.
    """

    def __init__(self, runner: EpisodeRunner, encode: Callable, decode: Callable):
        self.runner, self.stop = runner, runner.info.stop
        self._encode, self._decode = encode, decode

    def begin(self, episode: Episode) -> Asked:
        def collect(answers: list[Answer]) -> list[int] | None:
            (shown,) = answers
            if shown.kind is not None:
                episode.lose(_told(self.runner, "reset", shown))
            elif shown.value:
                episode.prompt_ids = [*episode.prompt_ids, *self._encode(shown.value)]
            return None

        return Asked([_ask(self.runner, episode, "reset", episode.row)], collect)

    def answer(self, episode: Episode, ids: list[int], reason: str) -> Asked:
        def collect(answers: list[Answer]) -> list[int] | None:
            (answer,) = answers
            if answer.kind is not None:
                episode.lose(_told(self.runner, "step", answer))
                return None
            episode.add_reward(answer.value["reward"])
            if answer.value["done"]:
                episode.finish = reason
                return None
            return self._encode(answer.value["text"]) if answer.value["text"] else []

        return Asked([_ask(self.runner, episode, "step", self._decode(ids))], collect)

    def end(self, episode: Episode) -> Asked:
        return Asked([], lambda answers: None)


class ChatPartner:
    """Tools, and an environment that answers messages, rendered by the model's chat template.

    Args:
      turns: renders and reads turns.
      max_tool_calling_iterations: turns that may call tools; an episode with one more is over.
        None: any number.
    """

    stop: tuple[str, ...] = ()

    def __init__(
        self,
        runner: EpisodeRunner,
        turns: ChatTurns,
        max_tool_calling_iterations: int | None = None,
    ):
        self.runner, self.turns = runner, turns
        self.max_rounds = max_tool_calling_iterations

    def begin(self, episode: Episode) -> Asked:
        prompt = episode.row["prompt"]
        prompt = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        episode.messages, episode.first = list(prompt), len(prompt)
        if self.runner.info.kind == "tools":
            return Asked([], lambda answers: None)

        def collect(answers: list[Answer]) -> list[int] | None:
            (shown,) = answers
            if shown.kind is not None:
                episode.lose(_told(self.runner, "reset", shown))
            elif shown.value:
                episode.messages += shown.value
                episode.first = len(episode.messages)
                episode.prompt_ids = self.turns.prompt(episode.messages, episode.row)
            return None

        return Asked([_ask(self.runner, episode, "reset", episode.row)], collect)

    def answer(self, episode: Episode, ids: list[int], reason: str) -> Asked:
        turn = self.turns.read(ids)
        said = assistant_message(turn)
        if turn.calls or turn.errors:
            if episode.tool_rounds != self.max_rounds:
                return self._call(episode, turn, ids)
        elif self.runner.info.kind == "messages":
            return self._step(episode, turn, ids, reason)
        episode.messages.append(said)
        episode.finish = reason
        return self.end(episode)

    def end(self, episode: Episode) -> Asked:
        if self.runner.info.kind != "methods":
            return Asked([], lambda answers: None)

        def collect(answers: list[Answer]) -> list[int] | None:
            (answer,) = answers
            if answer.kind is not None:
                episode.lose(_told(self.runner, "get_reward", answer))
            else:
                episode.add_reward(answer.value)
            return None

        return Asked([_ask(self.runner, episode, "reward", None)], collect)

    def _call(self, episode: Episode, turn: Turn, ids: list[int]) -> Asked:
        """Runs the calls of a turn; what cannot be read or run is told to the model."""
        episode.tool_rounds += 1
        episode.tool_calls += len(turn.calls) + len(turn.errors)
        numbers, known = [], [call.name in self.turns.names for call in turn.calls]
        for call, exists in zip(turn.calls, known, strict=True):
            if exists:
                value = {"name": call.name, "arguments": call.arguments}
                numbers.append(_ask(self.runner, episode, "call", value))

        def collect(answers: list[Answer]) -> list[int] | None:
            given, new = iter(answers), []
            for place, (call, exists) in enumerate(zip(turn.calls, known, strict=True)):
                names = ", ".join(self.turns.names)
                no_tool = Answer(None, "result", f"there is no tool {call.name!r}, only {names}")
                answer = next(given) if exists else no_tool
                if answer.kind in ("hung", "died") and self.runner.info.kind != "tools":
                    episode.lose(f"tool {call.name}: {answer.reason}")  # and its environment
                    return None
                new.append(tool_message(call.name, _content(episode, call.name, answer), place))
            for place, why in enumerate(turn.errors, len(turn.calls)):
                answer = Answer(None, "result", why)
                new.append(tool_message("unknown", _content(episode, "unknown", answer), place))
            return self._show(episode, turn, new, ids)

        return Asked(numbers, collect)

    def _step(self, episode: Episode, turn: Turn, ids: list[int], reason: str) -> Asked:
        message = {"role": "assistant", "content": turn.content}

        def collect(answers: list[Answer]) -> list[int] | None:
            (answer,) = answers
            if answer.kind is not None:
                episode.lose(_told(self.runner, "step", answer))
                return None
            episode.add_reward(answer.value["reward"])
            if answer.value["done"]:
                episode.messages += [assistant_message(turn), *answer.value["messages"]]
                episode.finish = reason
                return None
            return self._show(episode, turn, answer.value["messages"], ids)

        return Asked([_ask(self.runner, episode, "step", message)], collect)

    def _show(
        self, episode: Episode, turn: Turn, new: list[dict], ids: list[int]
    ) -> list[int] | None:
        before = list(episode.messages)
        episode.messages += [assistant_message(turn), *new]
        try:
            return self.turns.between(before, turn, new, ids[-1], episode.row)
        except DataError as error:
            episode.lose(str(error))
            return None


Partner = ChatPartner | TextPartner


def _content(episode: Episode, name: str, answer: Answer) -> str:
    """What the model reads: a tool's result, or an error, which is counted."""
    if answer.kind is None:
        return answer.value
    episode.tool_failures += 1
    episode.errors.append(f"tool {name}: {answer.reason}")
    return json.dumps({"error": answer.reason}, ensure_ascii=False)


def _ask(runner: EpisodeRunner, episode: Episode, operation: str, value) -> int:
    return runner.submit(episode.number, operation, value, episode.seed)


def _told(runner: EpisodeRunner, method: str, answer: Answer) -> str:
    return f"{runner.info.name}.{method}: {answer.reason}"
