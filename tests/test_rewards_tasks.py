"""Tasks as data set and scorer at once, and the calculator."""

import json
import os
import re
import subprocess
import sys

import pytest

from relax.data import prepare, read_rows
from relax.data.tasks import make_rows, scorer_faults, task_rows
from relax.errors import ConfigError, DataError
from relax.rewards import RewardRunner
from relax.rewards.calculator import Calculator, calculate
from relax.rewards.tasks import answer_of

CHAIN_SUM = {"size": 20, "test_size": 5, "seed": 1, "min_terms": 2, "max_terms": 2, "max_digits": 2}


# --- reasoning-gym -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain_sum():
    pytest.importorskip("reasoning_gym")
    options = CHAIN_SUM | {"prompt": "{question} Answer with the number only."}
    return read_rows("reasoning_gym/chain_sum", options=options)


def test_a_task_gives_rows_that_ask_and_rows_of_the_test_split_that_ask_something_else(chain_sum):
    [message] = chain_sum.rows[0]["prompt"]
    assert message["role"] == "user"
    assert message["content"].endswith("Answer with the number only.")
    assert len(chain_sum) == 20 and chain_sum.origin(3) == "row 3"
    test = make_rows("chain_sum", "test", CHAIN_SUM)
    asked = [row["prompt"][0]["content"] for row in test]
    trained = [row["prompt"][0]["content"] for row in make_rows("chain_sum", "train", CHAIN_SUM)]
    assert len(set(asked)) == 5 and not set(asked) & set(trained)


def test_the_rows_are_those_of_the_library_and_plain_json(chain_sum):
    import reasoning_gym

    task = {key: value for key, value in CHAIN_SUM.items() if key != "test_size"}
    task |= {"seed": 1 + 5}  # the first five are held out
    entries = list(reasoning_gym.create_dataset("chain_sum", **task))
    assert [row["answer"] for row in chain_sum.rows] == [entry["answer"] for entry in entries]
    assert json.loads(json.dumps(chain_sum.rows)) == chain_sum.rows
    texts = make_rows("chain_sum", "train", CHAIN_SUM | {"conversational": False})
    assert [row["prompt"] for row in texts] == [entry["question"] for entry in entries]


def test_the_scorer_is_the_reward(chain_sum):
    row = chain_sum.rows[0]
    completions = [
        row["answer"],
        f"<think>9</think> {row['answer']}.0 ",
        f"1 <answer>\n{row['answer']}</answer>",
        "none",
    ]
    with RewardRunner(["reasoning_gym"]) as runner:
        runner.check_rows(chain_sum.rows)
        columns = {"task": [row["task"]] * 4}
        batch = runner.score([row["prompt"]] * 4, completions, columns=columns)
    assert batch.rewards[:, 0].tolist() == [1.0, 1.0, 1.0, 0.0]
    assert batch.metrics == {"reasoning_gym/unreadable": 0.0}


def test_an_answer_that_a_scorer_raises_on_is_wrong_and_counted():
    pytest.importorskip("reasoning_gym")
    from relax.rewards.tasks import reasoning_gym

    [row] = make_rows("prime_factorization", "train", {"size": 1})
    logged = {}
    got = reasoning_gym(["no idea", row["answer"]], [row["task"]] * 2, logged.__setitem__)
    assert got == [0.0, 1.0] and logged == {"reasoning_gym/unreadable": 0.5}


NO_ANSWER = ("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour")


@pytest.mark.parametrize("name", NO_ANSWER)
def test_a_task_without_answers_has_none_and_is_scored_by_its_rules(name, arithmetic_tokenizer):
    """reasoning-gym 0.1.25: the column is None in every item of these tasks."""
    pytest.importorskip("reasoning_gym")
    from relax.rewards.tasks import reasoning_gym

    rows = make_rows(name, "train", {"size": 3, "test_size": 2})
    assert [row["answer"] for row in rows] == [None] * 3
    assert json.loads(json.dumps(rows)) == rows
    assert scorer_faults(name, rows) == []
    wrong = reasoning_gym(["None"] * 3, [row["task"] for row in rows])
    assert all(score is not None and score < 1 for score in wrong)
    with pytest.raises(DataError, match="row 0: column 'completion' is missing"):
        prepare(rows, arithmetic_tokenizer)
    answered = [row | {"completion": row["answer"]} for row in rows]
    with pytest.raises(DataError, match="row 0: column 'completion' is missing"):
        prepare(answered, arithmetic_tokenizer)
    with RewardRunner(["exact_match"]) as runner:
        with pytest.raises(ConfigError, match="needs the column 'answer', which is None in all 3"):
            runner.check_rows(rows)
        runner.check_rows([*rows, {"prompt": "1+1=", "answer": "2"}])


def test_a_solution_by_the_rules_of_a_task_without_answers_gets_full_marks():
    pytest.importorskip("reasoning_gym")
    from relax.rewards.tasks import reasoning_gym, unpack

    [row] = make_rows("graph_color", "train", {"size": 1, "test_size": 1})
    puzzle = unpack(row["task"]["entry"])["metadata"]["puzzle"]
    neighbours = {v: set() for v in puzzle["vertices"]}
    for one, other in puzzle["edges"]:
        neighbours[one].add(other)
        neighbours[other].add(one)

    def colour(given: dict) -> dict | None:
        if len(given) == len(neighbours):
            return given
        vertex = next(v for v in neighbours if v not in given)
        for option in puzzle["color_options"]:
            if all(given.get(n) != option for n in neighbours[vertex]):
                if (found := colour(given | {vertex: option})) is not None:
                    return found
        return None

    solution = json.dumps({str(vertex): option for vertex, option in colour({}).items()})
    assert reasoning_gym([solution, "{}"], [row["task"]] * 2) == [1.0, 0.01]


def test_rows_do_not_depend_on_how_strings_hash():
    pytest.importorskip("reasoning_gym")
    code = "from relax.data import read_rows as r; " + (
        "print([x['prompt'] for x in r('reasoning_gym/isomorphic_strings', options={'size': 3})"
        ".rows])"
    )
    asked = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert asked[0] == asked[1] and "isomorphic" in asked[0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chain_summ", {}, "unknown reasoning-gym task 'chain_summ'. Did you mean chain_sum?"),
        ("chain_sum", {"min_term": 2}, "no option 'min_term'. Did you mean min_terms?"),
        ("chain_sum", {"min_terms": 9}, "max_terms must be >= min_terms"),
        ("chain_sum", {"min_terms": "two"}, "cannot be made with"),
    ],
)
def test_an_unknown_task_or_option_is_refused(name, options, message):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ConfigError) as error:
        make_rows(name, "train", options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be int of at least 1, got 0"),
        ({"seed": None}, "seed must be int of at least 0, got None"),
        ({"prompt": "Add."}, r"must contain \{question\}"),
        ({"conversational": 1}, "conversational must be bool"),
    ],
)
def test_options_of_the_rows_are_checked_before_a_process_starts(options, message):
    with pytest.raises(ConfigError, match=message):
        read_rows("reasoning_gym/chain_sum", options=options)


def test_a_task_without_enough_new_questions_is_refused():
    pytest.importorskip("reasoning_gym")
    few = {"max_terms": 1, "min_terms": 1, "max_digits": 1, "size": 100}
    with pytest.raises(ConfigError, match="400 draws give 10 distinct questions, test_size=100"):
        make_rows("chain_sum", "test", few)
    with pytest.raises(ConfigError, match="of 400 draws only 0 are not among the 10 that are held"):
        make_rows("chain_sum", "train", few | {"test_size": 10, "size": 100})


def test_held_out_questions_are_as_easy_as_the_task_gives_them():
    pytest.importorskip("reasoning_gym")
    options = CHAIN_SUM | {"size": 2000, "test_size": 200, "min_digits": 1}
    rows = make_rows("chain_sum", "test", options)
    numbers = [re.search(r"\d+", row["prompt"][0]["content"])[0] for row in rows]
    # Half of the draws have one digit, and 2,000 training rows would hold nearly all of these.
    assert 70 <= sum(len(number) == 1 for number in numbers) <= 130


def test_options_for_what_is_no_task_are_refused():
    with pytest.raises(ConfigError, match="options of reasoning_gym tasks"):
        read_rows([{"prompt": "p"}], options={"size": 3})
    with pytest.raises(ConfigError, match="has no configurations"):
        read_rows("reasoning_gym/chain_sum", config="main")
    with pytest.raises(DataError, match="have the splits 'train' and 'test', not 'valid'"):
        read_rows("reasoning_gym/chain_sum", split="valid")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 12\n", "12"),
        ("<think>7</think>\n12", "12"),
        ("<answer>7</answer> no, <answer> 12\n</answer>.", "12"),
        ("<think><answer>7</answer>", "7"),
    ],
)
def test_the_answer_is_taken_from_its_tags_or_from_behind_the_reasoning(text, answer):
    assert answer_of(text) == answer


# --- the calculator ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*7", "84"),
        ("2+3*4-1", "13"),
        ("(2+3)*(4-1)", "15"),
        ("-(3)--2", "-1"),
        ("1/3", "0.3333333333"),
        ("0.1+0.2", "0.3"),
        ("7/2/2", "1.75"),
        ("9" * 40 + "+1", "1" + "0" * 40),
    ],
)
def test_the_calculator_calculates(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("", "a number is missing"),
        ("1+", "a number is missing"),
        ("1/(2-2)", "division by zero"),
        ("2**3", r"unexpected \*"),
        ("(1", "not closed"),
        ("1 2", "unexpected 2"),
        ("__import__('os')", "not an expression"),
        ("(" * 101, "more than 100"),
        ("-" * 99, "a number is missing"),
    ],
)
def test_the_calculator_says_what_it_does_not_understand(expression, problem):
    with pytest.raises(ValueError, match=problem):
        calculate(expression)


def test_calls_are_bounded():
    calculator = Calculator(max_calls=1)
    calculator.reset({"answer": 2})
    assert calculator.step("<calc>1/0</calc>").text == "<result>error: division by zero</result>"
    last = calculator.step("<calc>1+1</calc>")
    assert (last.text, last.done, last.reward) == (None, True, 0.0)


def test_a_scorer_that_takes_wrong_answers_is_named_with_its_version():
    sizes = {"size": 5, "test_size": 3}
    for name, what in (
        ("game_of_life_halting", "takes any answer"),
        ("gsm_symbolic", "takes the negative of a number"),
        ("coin_flip", "takes 0 for any number below 1"),
    ):
        with pytest.warns(UserWarning, match=rf"reasoning_gym/{name} \(reasoning-gym .*{what}"):
            task_rows(name, options=sizes)
        assert any(what in note for note in read_rows(f"reasoning_gym/{name}", options=sizes).notes)
    assert read_rows("reasoning_gym/chain_sum", options=sizes).notes == ()
