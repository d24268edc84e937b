"""Profiles: what they make of rows of every format, and how they are found. Nothing is compiled."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from relax.config import ConfigLoader, DPOConfig, SFTConfig, create_default_config, from_dict
from relax.data import read_rows
from relax.data.profiles import (
    PROFILES,
    CombinedProfile,
    DataProfile,
    apply_profile,
    choose_profile,
    early_stops,
    get_profile,
    load_profile,
    register_profile,
    resolve_profile,
)
from relax.data.profiles.chat import ChatProfile
from relax.errors import ConfigError, DataError
from relax.tools.sample.config import SampleConfig

QUESTION = "What is 2+2?"
STEPS = ["Identify the operation (addition)", "Apply the rule: 2 + 2", "Calculate the result: 4"]
FACES = "\N{THINKING FACE}" * 4


def answer_of(name: str, **columns) -> str:
    """The answer to QUESTION as a profile has it."""
    question, answer = get_profile(name).prepare_messages({"prompt": QUESTION, **columns})
    assert question["role"] == "user" and question["content"].startswith(QUESTION)
    assert answer["role"] == "assistant"
    return answer["content"]


# The examples of the text that asked for the two.


def test_emoji_think_puts_four_faces_before_the_answer():
    said = "Let me calculate: 2 + 2 = 4\n\nThe answer is 4"
    assert answer_of("emoji_think", completion=said) == (
        f"{FACES}\nLet me calculate: 2 + 2 = 4\n\nThe answer is 4"
    )
    assert get_profile("emoji_think").get_stop_sequences() == ["\n\n", "<think>"]


REGIME3 = """\
Step 1: Identify the operation (addition)
Step 2: Apply the rule: 2 + 2
Step 3: Calculate the result: 4

Answer: 4"""


@pytest.mark.parametrize(
    "columns",
    [
        {"steps": STEPS, "answer": "4"},
        {"reasoning": "\n".join(STEPS), "completion": "4"},
        {"completion": "\n".join(STEPS) + "\nThe answer is 4."},
        {"completion": "1. " + STEPS[0] + "\n2. " + STEPS[1] + "\n3) " + STEPS[2] + "\n#### 4"},
        {"completion": REGIME3},
    ],
)
def test_regime3_writes_numbered_steps_and_the_answer(columns):
    assert answer_of("regime3", **columns) == REGIME3
    assert get_profile("regime3").get_stop_sequences() == ["</reasoning>", "\n\n"]


def test_an_answer_without_steps_is_the_answer_alone():
    assert answer_of("regime3", completion="4") == "Answer: 4"
    assert answer_of("regime3", completion="Answer: 4") == "Answer: 4"


def test_a_custom_profile_needs_the_three_methods_and_is_used_by_its_name():
    class MyProfile(DataProfile):
        def prepare_messages(self, example):
            asked, said = example["question"], example["reply"]
            return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]

        def get_stop_sequences(self):
            return ["\n\n", "DONE"]

        def format_system_prompt(self, base):
            return base + "\n\nUse my custom format."

    class Half(DataProfile):
        def get_stop_sequences(self):
            return []

    register_profile("my_profile", MyProfile)
    register_profile("half", Half)
    try:
        assert get_profile("my_profile").get_stop_sequences() == ["\n\n", "DONE"]
        config = from_dict({"profile": {"name": "my_profile"}, "dataset_name": "rows.jsonl"})
        rows = read_rows([{"question": "a?", "reply": "b", "id": 7}])
        for base, said in (
            (None, "Use my custom format."),
            ("Hi.", "Hi.\n\nUse my custom format."),
        ):
            [row] = apply_profile(load_profile(config.profile.name), rows, "completions", base).rows
            assert row["prompt"] == [
                {"role": "system", "content": said},
                {"role": "user", "content": "a?"},
            ]
            assert row["completion"] == [{"role": "assistant", "content": "b"}] and row["id"] == 7
        with pytest.raises(ConfigError, match="profile 'half' cannot be made: .*abstract"):
            load_profile("half")
    finally:
        del PROFILES["my_profile"], PROFILES["half"]
    with pytest.raises(ConfigError, match="must be a subclass of DataProfile"):
        register_profile("rows", dict)
    with pytest.raises(ConfigError, match="a word other than auto"):
        register_profile("a+b", MyProfile)


# Where a profile comes from.


def test_an_unknown_name_falls_back_with_a_warning_and_is_refused_in_a_run():
    with pytest.warns(UserWarning, match="unknown profile 'invalid'.*Taking 'chat'"):
        assert type(get_profile("invalid")) is ChatProfile
    names = "chat, emoji_think, regime3, chain_of_thought, tool_use, auto, a\\+b of them, and path"
    with pytest.raises(ConfigError, match=f"'regimee3'. Did you mean regime3. There are {names}"):
        resolve_profile("regimee3", [])
    with pytest.raises(ConfigError, match="unknown profile 'nothing'"):
        resolve_profile("chat+nothing", [])
    with pytest.raises(ConfigError, match="name each part once"):
        resolve_profile("chat+chat", [])


def test_a_configuration_names_its_profile_in_all_ways_that_there_are(tmp_path):
    file = tmp_path / "config.json"
    for text in ('{"profile": {"name": "regime3"}}', '{"profile": "regime3"}'):
        file.write_text(text)
        args = {"dataset_name": "rows.jsonl"}
        config = ConfigLoader(file).merge_with_cli_args(args)
        assert config.profile.name == "regime3" == config.flat()["profile"]
        assert from_dict(config.to_dict()) == config
        args["profile"] = "emoji_think"
        assert ConfigLoader(file).merge_with_cli_args(args).profile.name == "emoji_think"


def test_stop_sequences_of_a_run_that_samples_nothing_are_refused():
    given = {"dataset_name": "rows.jsonl", "stop_sequences": ["END"]}
    for config_class in (SFTConfig, DPOConfig):
        with pytest.raises(ConfigError, match="stop_sequences has no effect: the run samples"):
            from_dict(given, config_class)
    with pytest.raises(ConfigError, match="profile has no effect: chat is false"):
        from_dict(
            {"model_name_or_path": "m", "prompt": "a", "chat": False, "profile": "regime3"},
            SampleConfig,
        )


FILE = """
from relax.data.profiles import DataProfile

class Loud(DataProfile):
    def prepare_messages(self, example):
        return [{"role": "user", "content": example["prompt"].upper()}]
    def get_stop_sequences(self):
        return ["!"]
    def format_system_prompt(self, base):
        return base

class Other: ...
"""


def test_a_profile_comes_from_a_file(tmp_path):
    file = tmp_path / "a+b.py"
    file.write_text(FILE)
    profile = load_profile(f"{file}:Loud")
    assert profile.prepare_messages({"prompt": "a"})[0]["content"] == "A"
    assert load_profile("chat+regime3").get_stop_sequences() == ["</reasoning>", "\n\n"]
    for spec, reason in {
        f"{file}:Other": "must be a subclass of DataProfile",
        f"{file}:Lod": "has no object 'Lod'. Did you mean Loud",
        "nowhere.py:Loud": "there is no Python file 'nowhere.py'",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            load_profile(spec)


# Together.


@pytest.mark.parametrize("name", ["emoji_think+regime3", "regime3+emoji_think"])
def test_two_profiles_together_ask_for_both_and_write_both(name):
    profile = load_profile(name)
    assert isinstance(profile, CombinedProfile)
    prompt, answer = profile.prepare_messages({"prompt": QUESTION, "steps": STEPS, "answer": "4"})
    assert answer["content"] == f"{FACES}\n{REGIME3}"
    for part in name.split("+"):
        assert PROFILES[part].instruction in prompt["content"]
        assert set(PROFILES[part]().get_stop_sequences()) <= set(profile.get_stop_sequences())
    assert len(profile.get_stop_sequences()) == 3  # the empty line is one of both
    assert profile.format_system_prompt("Be kind.").count("Be kind.") == 1


def test_profiles_that_would_cut_each_other_off_are_not_combined():
    with pytest.raises(ConfigError, match="'<think>' ends the completions of emoji_think"):
        load_profile("emoji_think+chain_of_thought")


# The rows of each algorithm.


def content(messages) -> list[str]:
    return [message["content"] for message in messages]


def test_a_profile_changes_nothing_twice():
    for name in ("emoji_think", "regime3", "chain_of_thought", "emoji_think+regime3"):
        profile = load_profile(name)
        once = profile.prepare_messages({"prompt": QUESTION, "completion": "2 + 2 is 4.\n\n4"})
        assert profile.prepare_messages({"messages": once}) == once


def test_rows_stay_of_their_format_and_keep_their_other_columns():
    profile = load_profile("emoji_think")
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    shared = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    for row in ({"messages": said}, {"conversations": shared}):
        [made] = apply_profile(profile, read_rows([row | {"id": 1}]), "completions").rows
        assert set(made) == {"messages", "id"}
        assert made["messages"][1]["content"] == f"{FACES}\nb"
    for row in ({"prompt": "a", "completion": "b"}, {"prompt": said[:1], "completion": said[1:]}):
        [made] = apply_profile(profile, read_rows([row | {"id": 1}]), "completions").rows
        assert set(made) == {"prompt", "completion", "id"}
        assert content(made["completion"]) == [f"{FACES}\nb"]
        assert made["prompt"][0]["content"].startswith("a\n\n")


def test_chat_leaves_rows_alone():
    rows = read_rows([{"text": "plain"}])
    assert apply_profile(get_profile("chat"), rows, "completions", "Be kind.") is rows


def test_pairs_get_the_same_prompt_and_both_answers_are_rewritten():
    profile = load_profile("regime3")
    for row in (
        {"prompt": QUESTION, "chosen": "4", "rejected": "5"},
        {"chosen": f"{QUESTION} 4", "rejected": f"{QUESTION} 5"},
    ):
        [made] = apply_profile(profile, read_rows([row]), "preferences", "Be kind.").rows
        assert content(made["chosen"]) == ["Answer: 4"]
        assert content(made["rejected"]) == ["Answer: 5"]
        assert [m["role"] for m in made["prompt"]] == ["system", "user"]
        assert made["prompt"][0]["content"].startswith("Be kind.\n\n")
    single = {"prompt": QUESTION, "completion": "4", "label": True}
    [made] = apply_profile(profile, read_rows([single]), "preferences").rows
    assert content(made["completion"]) == ["Answer: 4"] and made["label"] is True


def test_prompts_lose_their_answer_and_keep_what_rewards_read():
    rows = read_rows([{"prompt": QUESTION, "answer": "4", "completion": "4"}])
    [made] = apply_profile(load_profile("emoji_think"), rows, "prompts").rows
    assert [m["role"] for m in made["prompt"]] == ["user"]
    assert made["answer"] == "4" and made["completion"] == "4"


def test_a_system_message_of_the_row_comes_before_the_one_of_the_configuration():
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "a"}]
    rows = read_rows([{"prompt": own, "completion": "b"}])
    [made] = apply_profile(load_profile("emoji_think"), rows, "completions", "Theirs.").rows
    assert made["prompt"][0]["content"].startswith("Mine.\n\n")
    assert "Theirs." not in str(made)


def test_a_row_that_a_profile_cannot_read_is_told_with_its_place():
    profile = load_profile("regime3")
    with pytest.raises(
        DataError,
        match="row 1: the profile Regime3Profile cannot read the row: .*"
        "it needs 'messages', or 'prompt' and 'completion', and has text",
    ):
        apply_profile(
            profile, read_rows([{"prompt": "a", "completion": "b"}, {"text": "a"}]), "completions"
        )
    with pytest.raises(DataError, match="row 0: the profile Regime3Profile makes no answer"):
        apply_profile(profile, read_rows([{"prompt": "a"}]), "completions")

    class Peeking(ChatProfile):
        def prepare_messages(self, example):
            said = super().prepare_messages(example)
            return [{"role": "user", "content": said[-1]["content"]}, *said[1:]]

    with pytest.raises(DataError, match="a prompt must not depend on the answer"):
        apply_profile(Peeking(), read_rows([{"prompt": "a", "completion": "b"}]), "completions")


# tool_use, chain_of_thought.

ADD = {"type": "function", "function": {"name": "add", "parameters": {"a": "int", "b": "int"}}}
CALL = {"function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
TOOLS = {
    "tools": [ADD],
    "messages": [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "4"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "4"},
    ],
}


def test_tool_use_writes_tools_calls_and_results_as_text_for_any_template():
    [row] = apply_profile(load_profile("tool_use"), read_rows([TOOLS]), "completions", "Hi.").rows
    system, question, call, result, last = row["messages"]
    assert set(row) == {"messages"}  # no template renders the tools a second time
    assert system["content"].startswith("Hi.\n\n") and '"name": "add"' in system["content"]
    one = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>'
    assert call == {"role": "assistant", "content": f"{one}\n{one}"}
    told = "<tool_response>\n4\n</tool_response>"
    assert result == {"role": "user", "content": f"{told}\n{told}"}
    assert (question["content"], last["content"]) == (QUESTION, "4")
    assert get_profile("tool_use").get_stop_sequences() == ["</tool_call>"]


def test_chain_of_thought_is_what_the_think_format_reward_asks_for():
    from relax.rewards import load_reward

    reward = load_reward("think_format_reward")
    for columns in (
        {"completion": "2 and 2.\nThat is 4.\n\n4"},
        {"reasoning": "2 and 2.", "answer": "4"},
    ):
        said = answer_of("chain_of_thought", **columns)
        assert reward(completions=[[{"role": "assistant", "content": said}]]) == [1.0]
        assert said.endswith("</think>\n4")
    assert answer_of("chain_of_thought", completion="4") == "4"  # nothing to think


# auto.

PLAIN = {"prompt": "a", "completion": "b"}
AUTO = {
    "chat": [PLAIN, {"text": "plain"}],
    "tool_use": [TOOLS, PLAIN, TOOLS],
    "emoji_think": [{"prompt": "a", "completion": f"{FACES}\nb"}],
    "regime3": [{"prompt": "a", "chosen": REGIME3, "rejected": "x"}],
    "chain_of_thought": [{"messages": [{"role": "assistant", "content": "<think>a</think>b"}]}],
    "emoji_think+regime3": [{"prompt": "a", "completion": f"{FACES}\n{REGIME3}"}] * 3 + [PLAIN],
}


@pytest.mark.parametrize("name", AUTO)
def test_auto_takes_what_most_rows_show_and_says_why(name):
    rows = AUTO[name]
    found, reason = choose_profile(rows)
    assert found == name and f"{len(rows)} rows" in reason
    load_profile(found)


def test_answers_that_hold_a_stop_sequence_before_their_end_are_counted():
    rows = apply_profile(
        load_profile("emoji_think"),
        read_rows([{"prompt": "a", "completion": c} for c in ("b", "b\n\nc", "b\n\n")]),
        "completions",
    ).rows
    assert early_stops(rows, ["\n\n", "<think>"]) == {"\n\n": 1}


def test_profiles_are_imported_without_jax():
    code = "import sys, relax.data.profiles; print('jax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_the_page_about_profiles_is_true():
    page = (Path(__file__).parents[1] / "docs" / "profiles.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)`", page, re.MULTILINE) == [*PROFILES, "auto"]
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    try:
        exec(code, names)
        assert names["messages"][1] == {"role": "assistant", "content": "4"}
        config = create_default_config(dataset_path="rows.jsonl", profile="my_profile+regime3")
        assert load_profile(config.profile.name).get_stop_sequences()[:2] == ["\n\n", "DONE"]
    finally:
        PROFILES.pop("my_profile", None)
