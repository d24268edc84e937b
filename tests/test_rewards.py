"""The reward protocol, how functions are found, and what the shipped ones say."""

import functools
import subprocess
import sys

import numpy as np
import pytest

from relax import rewards
from relax.errors import ConfigError, DataError
from relax.rewards import RewardRunner, load_reward
from relax.rewards.lengths import cosine_scaled
from relax.rewards.loading import parameters_by_reward
from relax.rewards.protocol import check_columns, check_plain, describe, distinct, name_of, text_of
from relax.rewards.workers.threads import reference_of


def test_rewards_are_imported_without_jax_and_without_what_extras_bring():
    code = "import sys, relax.rewards as r; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    absent = {"jax", "flax", "transformers", "torch", "sympy", "reasoning_gym", "jsonschema"}
    assert not absent & set(run.stdout.split())


# --- shipped -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("72", "72", 1.0),
        (" 72\n", 72, 1.0),
        ("72.", "72", 0.0),
        ("", "", 1.0),
        ("72", None, None),
        ([{"role": "assistant", "content": "72"}], "72", 1.0),
    ],
)
def test_exact_match(completion, answer, expected):
    assert load_reward("exact_match")([completion], answer=[answer]) == [expected]


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("20+52 is 72.", "72", 1.0),
        ("72, or 73", "72", 0.0),
        ("It costs $1,234.50!", 1234.5, 1.0),
        ("-3", "3", 0.0),
        ("5-3", "3", 1.0),
        ("007", "#### 7", 1.0),
        ("1,2,3", 3, 1.0),
        ("no idea", "7", 0.0),
        ("7", "no number", None),
        ("7", None, None),
        ("٧", "7", 0.0),
    ],
)
def test_last_number_match(completion, answer, expected):
    assert load_reward("last_number_match")([completion], answer=[answer]) == [expected]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>\nreasons\n</think>\nanswer", 1.0),
        ("<think></think>", 1.0),
        ("<think>reasons\nanswer", 0.0),
        ("reasons</think>answer", 0.0),
        ("Well: <think>reasons</think>answer", 0.0),
        ("<think>a<think>b</think></think>answer", 0.0),
        ("<think>a</think>answer<think>b</think>", 0.0),
    ],
)
def test_think_format_reward(completion, expected):
    assert rewards.think_format_reward([completion]) == [expected]
    assert rewards.think_format_reward([[{"content": completion}]]) == [expected]


def test_soft_overlong_punishment_grows_over_the_cache():
    punish = rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    lengths = (50, 80, 90, 100, 101, 110)
    assert punish([[1] * n for n in lengths]) == [0.0, 0.0, -0.5, -1.0, -1.0, -1.0]
    assert rewards.get_soft_overlong_punishment(10, 0)([[1] * 10, [1] * 11]) == [0.0, -1.0]


def test_repetition_penalty_counts_repeated_ngrams():
    penalty = rewards.get_repetition_penalty_reward(ngram_size=2)
    assert penalty([[5] * 5, [1, 2] * 3, [1, 2, 3, 4], [1]]) == pytest.approx([-0.75, -0.6, 0, 0])
    assert rewards.get_repetition_penalty_reward(3)([[1, 2, 3] * 2]) == [-0.25]


@pytest.mark.parametrize(
    ("length", "expected"),
    [(0, 1.0), (25, 0.9267767), (50, 0.75), (75, 0.5732233), (100, 0.5), (200, 0.5)],
)
def test_cosine_scaled_prefers_short_right_and_long_wrong_completions(length, expected):
    assert cosine_scaled(length, True, 100) == pytest.approx(expected)
    assert cosine_scaled(length, False, 100) == pytest.approx(-expected)


def test_regex_match_searches_or_matches_in_full():
    find = load_reward("regex_match", {"pattern": "[0-9]+"})
    assert find(["It is 72", "none"]) == [1.0, 0.0]
    full = load_reward("regex_match", {"pattern": "[0-9]+", "full": True})
    assert full(["It is 72", "72"]) == [0.0, 1.0]


def test_json_schema_takes_one_schema_or_a_column_of_them():
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
    texts = [
        '{"n": 1}',
        '```json\n{"n": 1}\n```',
        '{"n": "1"}',
        '{"n": 1',
        '{"n": NaN}',
        "[" * 9999,
    ]
    expected = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert load_reward("json_schema", {"schema": schema})(texts) == expected
    by_row = load_reward("json_schema")
    assert by_row(["1", "1", "1"], schema=[{"type": "string"}, '{"type": "integer"}', None]) == [
        0.0,
        1.0,
        None,
    ]
    assert describe(by_row).required == ("completions", "schema")
    with pytest.raises(ConfigError, match="must be a JSON schema"):
        load_reward("json_schema", {"schema": {"type": "numbr"}})


def test_accuracy_reward_compares_mathematics():
    pytest.importorskip("math_verify")
    half, third = r"\frac{1}{2}", r"\frac{1}{3}"
    texts = [rf"It is \boxed{{{third}}}", rf"It is \boxed{{{half}}}", "no idea", "anything"]
    logged = {}
    got = rewards.accuracy_reward(texts, [third, "1/3", "1/3", ""], log_extra=logged.__setitem__)
    assert got == [1.0, 0.0, 0.0, None]
    assert logged["gold_parsed"][3] == "[unreadable]"
    reasoned = [f"<think>{texts[1]}</think>{texts[0]}", texts[0]]
    assert rewards.reasoning_accuracy_reward(reasoned, [third] * 2) == [1.0, 0.0]
    cosine = rewards.get_cosine_scaled_reward(max_len=100)
    assert cosine(texts[:2], [third] * 2, [[1] * 50] * 2) == pytest.approx([0.75, -0.75])


def test_the_text_of_a_conversation_is_the_assistants_last_message():
    turns = [
        {"role": "assistant", "content": "<calc>1+1</calc>"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": [{"type": "text", "text": "It is 2"}]},
    ]
    assert text_of(turns) == "It is 2"
    assert text_of([{"role": "assistant", "content": None}]) == ""


# --- names and parameters ----------------------------------------------------------------------


def test_every_shipped_reward_is_found_under_its_name_or_says_what_to_install():
    needed = {
        "cosine_scaled_reward": {"max_len": 10},
        "regex_match": {"pattern": "x"},
        "soft_overlong_punishment_reward": {"max_completion_len": 10, "soft_punish_cache": 2},
    }
    for name in rewards.SHIPPED:
        try:
            assert name_of(load_reward(name, needed.get(name))) == name
        except ConfigError as error:
            assert "pip install 'relax-trainers[" in str(error)


@pytest.mark.parametrize("name", ["think_format", "get_think_format_reward", "think-format-reward"])
def test_shipped_names_may_be_shortened(name):
    assert load_reward(name) is rewards.think_format_reward


def test_functions_are_found_by_path_and_by_file(tmp_path):
    assert load_reward("relax.rewards.think_format_reward") is rewards.think_format_reward
    for folder, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(f"def f(completions, k=1): return [k * {value}]")
    assert load_reward(f"{tmp_path}/a/mine.py:f")(completions=["x"]) == [1.0]
    assert load_reward(f"{tmp_path}/b/mine.py:f", {"k": 3})(completions=["x"]) == [6.0]


@pytest.mark.parametrize(
    ("spec", "parameters", "message"),
    [
        (
            "exact_mach",
            {},
            r"unknown reward 'exact_mach'. Did you mean exact_match\? There are acc",
        ),
        ("relax.rewards.nothing", {}, "'relax.rewards' has no object 'nothing'"),
        ("relax.rewads.f", {}, "there is no module 'relax.rewads'"),
        ("relax.rewards.SHIPPED", {}, "is a dict, not a function"),
        ("nowhere/f.py:f", {}, "there is no Python file 'nowhere/f.py'"),
        ("exact_match", {"colum": "a"}, "no parameter 'colum'. Did you mean column?"),
        ("exact_match", {"column": 3}, "column must be str, got 3"),
        ("regex_match", {}, 'needs pattern: pass --reward_kwargs \'{"regex_match": '),
        ("regex_match", {"pattern": "("}, "pattern must be a regular expression"),
        (
            "soft_overlong_punishment",
            {"max_completion_len": 10, "soft_punish_cache": 20},
            "soft_punish_cache must be from 0 to max_completion_len",
        ),
        ("repetition_penalty", {"max_penalty": 1}, "max_penalty at most 0"),
    ],
)
def test_a_wrong_name_or_parameter_is_refused_with_what_would_be_right(spec, parameters, message):
    with pytest.raises(ConfigError) as error:
        load_reward(spec, parameters)
    assert message.replace("\\", "") in str(error.value)


def test_a_file_that_raises_while_it_loads_is_named(tmp_path):
    (tmp_path / "bad.py").write_text("1 / 0")
    with pytest.raises(ConfigError, match=r"bad\.py' cannot be imported: ZeroDivisionError"):
        load_reward(f"{tmp_path}/bad.py:f")


def test_parameters_go_to_the_reward_that_they_name():
    specs = ["get_soft_overlong_punishment", "a/b.py:f", "pkg.g"]
    given = {"soft_overlong_punishment": {"x": 1}, "f": {"y": 2}, "pkg.g": {"z": 3}}
    assert parameters_by_reward(specs, given) == [{"x": 1}, {"y": 2}, {"z": 3}]
    with pytest.raises(ConfigError, match="'exact_mach', which is none.*Did you mean exact_match"):
        parameters_by_reward(["exact_match"], {"exact_mach": {}})
    with pytest.raises(ConfigError, match="must be an object of parameters, got 3"):
        parameters_by_reward(["exact_match"], {"exact_match": 3})


def test_names_come_from_the_function_and_are_told_apart():
    def score(completions):
        return [0.0]

    class Judge:
        def __call__(self, completions):
            return [0.0]

    functions = [functools.partial(score), Judge(), score, lambda completions: [0.0]]
    assert distinct(map(name_of, functions)) == ["score", "Judge", "score_2", "lambda"]


def test_what_a_factory_made_travels_by_its_parameters_and_a_closure_does_not():
    made = rewards.get_soft_overlong_punishment(100, soft_punish_cache=20)
    where = "relax.rewards.lengths.get_soft_overlong_punishment"
    parameters = {"max_completion_len": 100, "soft_punish_cache": 20}
    assert reference_of(made) == {"spec": where, "parameters": parameters}
    assert load_reward(where, parameters)([[1] * 90]) == made([[1] * 90]) == [-0.5]
    bound = functools.partial(rewards.reasoning_accuracy_reward, reasoning_delimiters=["#"])
    assert reference_of(bound)["parameters"] == {"reasoning_delimiters": ["#"]}
    assert reference_of(lambda completions: made(completions)) is None


# --- signatures and columns --------------------------------------------------------------------


def test_a_column_that_no_row_has_is_refused_with_those_that_exist():
    info = describe(lambda completions, solution, k=1, **kwargs: [], "f")
    check_columns([info], ["prompt", "solution"])
    with pytest.raises(ConfigError) as error:
        check_columns([info], ["prompt", "solutions"])
    assert str(error.value) == (
        "reward 'f' needs the column 'solution', which the rows do not have. "
        "They have 'solutions'. Did you mean solutions?"
    )
    with pytest.raises(ConfigError, match="'trainer_state', which is the name of what every"):
        check_columns([info], ["solution", "trainer_state"])


def test_a_signature_that_takes_no_names_is_refused():
    with pytest.raises(ConfigError, match="takes 'completions' by position only"):
        describe(lambda completions, /: [])


@pytest.mark.parametrize("value", [(1, 2), {1: 2}, b"x", np.float32(1), [{"a": {3}}]])
def test_a_value_that_would_not_arrive_unchanged_is_refused(value):
    with pytest.raises(DataError, match="^column 'c' holds a "):
        check_plain([value], "column 'c'")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"functions": [3]}, "must be a name or a function, got a int"),
        ({"weights": [1.0, 2.0]}, "got 2 for 1"),
        ({"weights": [float("nan")]}, "must be finite"),
        ({"timeout_s": 0}, "reward_timeout_s must be above 0"),
        ({"max_errors": 2}, "max_reward_errors must be from 0 to 1"),
        ({"workers": 0}, "reward_workers must be at least 1"),
    ],
)
def test_a_runner_refuses_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        RewardRunner(**{"functions": ["exact_match"]} | options)


# Values of numbers, special tokens and names of metrics


@pytest.mark.parametrize(
    "completion, answer, reward",
    [
        ("= .5", "5", 0.0),
        ("= .5", "0.50", 1.0),
        ("1e3", "3", 0.0),
        ("1e3", "1,000", 1.0),
        ("\u22125", "-5", 1.0),
        ("\u22125", "5", 0.0),
        ("\uff0d\uff17\uff12\uff0e\uff15", "-72.5", 1.0),
        ("2/4", "3/4", 0.0),
        ("6/8", "3/4", 1.0),
        ("0.75", r"\frac{3}{4}", 1.0),
        (r"\dfrac{2}{4}", r"\frac{3}{4}", 0.0),
        ("on 12/05/2024", 2024, 1.0),
        ("3/0", "0", 1.0),
        ("5-3", 3, 1.0),
        ("1" + "0" * 40 + "1", "1" + "0" * 40 + "2", 0.0),
    ],
)
def test_last_numbers_are_compared_by_value(completion, answer, reward):
    assert load_reward("last_number_match")([completion], answer=[answer]) == [reward]


def test_a_whole_number_in_a_column_of_floats_is_matched_exactly():
    answers = [72.0, 72.0, 72, 7.5, True]
    found = load_reward("exact_match")(["72", "72.0", "72", "7", "True"], answer=answers)
    assert found == [1.0, 1.0, 1.0, 0.0, 1.0]


def test_a_thought_that_the_prompt_opens_has_to_be_closed():
    reward = load_reward("think_format")
    completions = ["so</think>4", "so 4", "<think>so</think>4"]
    assert reward(completions, prompt_texts=["2+2=<think>\n"] * 3) == [1.0, 0.0, 0.0]
    assert reward(completions, prompt_texts=["<think>\n\n</think>\n\n"] * 3) == [0.0, 0.0, 1.0]
    assert reward(completions) == [0.0, 0.0, 1.0]


def test_tags_that_are_special_tokens_are_seen_by_functions_that_ask_for_them():
    def plain(completions, **kwargs):
        assert "completion_texts" not in kwargs
        return [0.0] * len(completions)

    texts = {"completion_texts": ["<think>so</think>4"], "prompt_texts": ["2+2="]}
    with RewardRunner(["think_format", plain]) as runner:
        assert runner.asks_for_texts
        assert runner.score(["2+2="], ["so4"], texts=texts).total.tolist() == [1.0]
        assert runner.score(["2+2="], ["so4"]).total.tolist() == [0.0]
    with RewardRunner([plain]) as runner:
        assert not runner.asks_for_texts


def test_a_logged_number_never_takes_the_place_of_one_of_the_trainers():
    def f(completions, log_metric, trainer_state, **kwargs):
        for name in ("loss", "reward", "skipped_steps", "eval_loss", "rewards/f/mean", "hits"):
            log_metric(name, 9)
        assert (trainer_state.global_step, trainer_state.max_steps) == (3, 10)
        assert trainer_state.epoch == 0.5
        return [0.0] * len(completions)

    state = {"global_step": 3, "max_steps": 10, "epoch": 0.5}
    with RewardRunner([f]) as runner:
        metrics = runner.score(["a"], ["b"], trainer_state=state).metrics
    taken = ("loss", "reward", "skipped_steps", "eval_loss", "rewards/f/mean")
    assert metrics == {f"rewards/f/{name}": 9.0 for name in taken} | {"hits": 9.0}


def test_the_trainers_state_says_what_it_has():
    from relax.rewards.workers.calls import TrainerState

    with pytest.raises(AttributeError, match="no 'best_metric' here, it has global_step"):
        TrainerState(global_step=1).best_metric  # noqa: B018
