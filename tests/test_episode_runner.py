"""Tools and environments in processes of their own: side by side, repeatable, and killable."""

import subprocess

import pytest

from relax.errors import ConfigError
from relax.rewards import EpisodeRunner
from relax.rewards.environment import Observation
from tests import tool_files

FILE = tool_files.__file__
UNDESCRIBABLE = f"{FILE.rpartition('/')[0]}/undescribable.py"


def call(runner, episode, name, seed=0, **arguments):
    return runner.submit(episode, "call", {"name": name, "arguments": arguments}, seed)


@pytest.fixture(scope="module")
def runner():
    with EpisodeRunner([f"{FILE}:add,roll,fail"], timeout_s=1.0) as made:
        yield made


def test_schemas_are_those_of_transformers(runner):
    names = [schema["function"]["name"] for schema in runner.info.tools]
    assert names == ["add", "roll", "fail"]
    function = runner.info.tools[0]["function"]
    assert function["description"] == "Adds two numbers."
    assert function["parameters"]["required"] == ["a", "b"]
    assert function["parameters"]["properties"]["a"] == {
        "type": "integer",
        "description": "the first one",
    }


@pytest.mark.parametrize(
    ("how", "kind", "reason"),
    [
        ("raise", "raised", "raised ValueError: no such city"),
        ("hang", "hung", "did not return within 1 s and was killed"),
        ("print", "hung", "did not return within 1 s and was killed"),
        ("die", "died", "ended its process with exit code 3"),
        ("leave", "died", "ended its process with exit code 0"),
        ("long", "result", "returned 2000000 characters"),
    ],
)
def test_a_tool_that_fails_costs_its_own_episode(runner, how, kind, reason):
    first = runner.reserve(2)
    numbers = [call(runner, first, "fail", how=how), call(runner, first + 1, "add", a=1, b=2)]
    failed, other = runner.wait(numbers)
    assert (failed.kind, other.value) == (kind, "3") and reason in failed.reason
    runner.end(first)
    (after,) = runner.wait([call(runner, first + 1, "add", a=2, b=2)])
    assert after.value == "4"
    assert "sleep 4321" not in subprocess.run(["ps", "aux"], capture_output=True, text=True).stdout


@pytest.mark.parametrize(("how", "kind"), [("die late", "died"), ("hang", "hung")])
def test_questions_that_wait_for_a_worker_that_is_lost_are_answered(runner, how, kind):
    first = runner.reserve(2)
    numbers = [call(runner, first, "fail", how=how), call(runner, first, "add", a=1, b=2)]
    numbers.append(call(runner, first + 1, "add", a=1, b=2))
    lost, waiting, other = runner.wait(numbers)
    assert lost == waiting and lost.kind == kind
    assert other.value == "3"


def test_the_child_of_a_tool_that_forks_answers_nothing(runner):
    first = runner.reserve(1)
    found = []
    for _ in range(5):
        number = call(runner, first, "fail", how="fork")
        found += runner.wait([number, call(runner, first, "add", a=1, b=2)])
    assert [answer.value for answer in found] == ["fork", "3"] * 5


def test_the_answers_of_an_episode_depend_on_its_seed_and_not_on_the_order_of_episodes(runner):
    def play(episodes):
        first = runner.reserve(9)
        asked = {e: [call(runner, first + e, "roll", e, sides=10**9)] * 1 for e in episodes}
        for e in reversed(episodes):
            asked[e].append(call(runner, first + e, "roll", e, sides=10**9))
        answers = {e: [a.value for a in runner.wait(asked[e])] for e in reversed(episodes)}
        for e in episodes:
            runner.end(first + e)
        return answers

    found = play([0, 1, 2])
    assert play([2, 1, 0]) == found and play([1, 0, 2]) == found
    assert len({answer for answers in found.values() for answer in answers}) == 6


def test_functions_of_this_process_give_the_same_answers():
    secret = 5

    def add(a: int, b: int) -> int:
        """Adds two numbers and a secret.

        Args:
          a: the first one
          b: the second one
        """
        return a + b + secret

    runner = EpisodeRunner([add], timeout_s=1.0)
    assert "can be imported by no other process" in runner.notes[0]
    good, bad = runner.wait([call(runner, 0, "add", a=1, b=2), call(runner, 0, "add", a=1)])
    assert good.value == "8" and bad.kind == "raised"


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ([tool_files.untyped], "tool 'untyped' must have a type hint for every argument, and has "),
        ([f"{FILE}:undescribed"], "tool 'undescribed' must have a docstring"),
        ([f"{FILE}:add,add"], "two tools have the name 'add'"),
        ([f"{FILE}:ad"], "has no object 'ad'"),
        (["add"], "unknown tool 'add'"),
        ([FILE], "must name an object of a file or a module: write file.py:NAME"),
        ([tool_files.Guess], "tool 'Guess' is a class"),
        ([tool_files.positional], "called with arguments by name, and 'a: int' has none"),
        ([tool_files.any_number], r"called with arguments by name, and '\*numbers: int' has none"),
    ],
)
def test_tools_that_cannot_be_described_are_refused(tools, reason):
    with pytest.raises(ConfigError, match=reason):
        EpisodeRunner(tools)


def test_arguments_may_have_any_name():
    def integrate(function: str, self: int) -> str:
        """Integrates.

        Args:
          function: what
          self: how often
        """
        return function * self

    runner = EpisodeRunner([integrate])
    (found,) = runner.wait([call(runner, 0, "integrate", function="x", self=2)])
    assert found.value == "xx"


def text_environment(stop, shown="b"):
    class Texts:
        def reset(self, row):
            return "a"

        def step(self, text):
            return Observation(shown, False)

    Texts.stop = stop
    return EpisodeRunner((), Texts)


def test_a_stop_that_is_one_text_is_one_text():
    assert text_environment("</x>").info.stop == ("</x>",)
    for stop in (5, ("",), ("a", 1)):
        with pytest.raises(ConfigError, match="must have a tuple of texts as its attribute 'stop'"):
            text_environment(stop)


def test_an_answer_that_is_no_text_costs_the_episode():
    runner = text_environment((), shown=5)
    (found,) = runner.wait([runner.submit(0, "step", "turn", 0)])
    assert found.kind == "result" and "step returned the text 5, no text or None" in found.reason


@pytest.mark.parametrize(
    ("tools", "environment", "reason"),
    [
        ("add,unknown_type", None, "tool 'unknown_type' .* NameError: name 'NoSuchType'"),
        ("add", "Exits", "environment 'Exits' cannot be described: it raised SystemExit: 3"),
        ("add", "RaisingProperty", "environment 'RaisingProperty' .* RuntimeError: not ready"),
    ],
)
def test_a_description_that_raises_is_told_with_the_name_of_its_source(tools, environment, reason):
    files = {"add": FILE}
    given = [f"{files.get(tool, UNDESCRIBABLE)}:{tool}" for tool in tools.split(",")]
    factory = environment and f"{UNDESCRIBABLE}:{environment}"
    with pytest.raises(ConfigError, match=reason):
        EpisodeRunner(given, factory)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Mute", "step returned no message, though the episode is not done"),
        ("Several", "step gave 2 rewards, and an episode has one at a time"),
        ("NotMessages", "reset returned .*, not a message"),
        ("Guess", "raised KeyError: 'number' in reset"),
    ],
)
def test_an_environment_that_cannot_play_the_first_row_is_refused(name, reason):
    row = {} if name == "Guess" else {"number": 3}
    with EpisodeRunner((), f"{FILE}:{name}") as runner:
        with pytest.raises(ConfigError, match=reason):
            runner.probe(row)
