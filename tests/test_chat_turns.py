"""What comes between two turns of a model: rendered, appended, and never tokenised again."""

import functools

import jax
import numpy as np
import pytest
from test_data_prepare import byte_tokenizer

from relax.data.chat_turns import ChatTurns, assistant_message
from relax.data.tool_calls import ToolCall, Turn
from relax.errors import ConfigError
from relax.models import Transformer, TransformerConfig
from relax.rewards import EpisodeRunner
from relax.rewards.counterpart import schema_of
from relax.sampling import SamplingConfig
from relax.sampling.rows import Row
from relax.trainers.rl.episodes import rollout_episodes
from relax.trainers.rl.partners import ChatPartner
from tests import tool_files
from tests.tool_files import PLAIN, TEMPLATES, add

SPECIAL = ["<|tool_call_start|>", "<|tool_call_end|>", "[TOOL_CALLS]"]
MODEL = Transformer(
    TransformerConfig(
        vocab_size=300,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=10_000,
    )
)
FORMAT = {"qwen3": "hermes", "qwen3.5": "hermes"}


def tokenizer_of(template):
    return byte_tokenizer(template, additional_special_tokens=SPECIAL)


class Scripted:
    """Stands in for a session: every row says what a script has for it, and its own end token."""

    def __init__(self, turns, eos):
        self.turns, self.eos, self.rows, self.prompts = turns, eos, [], []
        self.counts = {}

    def __call__(self, model, params, config, *, slots, decode):
        return self

    def open(self, ids, key, *, limit):
        row = Row(len(self.rows), 0, np.array(ids), limit, kept=True)
        self.rows.append(row)
        self.prompts.append([])
        return row

    def extend(self, row, ids, key, *, limit):
        row.prompt = np.array([*row.prompt, *row.tokens, *ids])
        row.tokens, row.logprobs, row.reason, row.limit = [], [], None, limit

    def under_way(self):
        return any(row.reason is None for row in self.rows)

    def advance(self):
        running = [row for row in self.rows if row.reason is None]
        for row in running:
            said = self.turns[row.number].pop(0)
            row.tokens = [*said, self.eos][: row.limit]
            row.logprobs = [-1.0] * len(row.tokens)
            row.reason = "eos" if len(row.tokens) == len(said) + 1 else "length"
            self.prompts[row.number].append(row.prompt.tolist())
        return [(row, row.tokens) for row in running]

    def close(self, row):
        pass


@functools.cache
def runner_of(tools, environment):
    return EpisodeRunner(tools, environment)


ADD = (schema_of(add),)


def play(tokenizer, scripts, tools=(add,), environment=None, limit=4000, **row):
    runner = runner_of(tools, environment)
    turns = ChatTurns(tokenizer, [tokenizer.eos_token_id], runner.info.tools)
    user = [{"role": "user", "content": "Hi"}]
    prompt = turns.prompt(user, {})
    script = [[tokenizer(text)["input_ids"] for text in texts] for texts in scripts]
    session = Scripted([list(texts) for texts in script], tokenizer.eos_token_id)
    sampling = SamplingConfig(max_new_tokens=limit, n=len(scripts))
    item = {"prompt_ids": [prompt], "rows": [{"prompt": user, **row}]}
    found = rollout_episodes(
        MODEL,
        None,
        item,
        jax.random.key(0),
        sampling,
        ChatPartner(runner, turns),
        tokenizer.decode,
        make_session=session,
    )
    return found, script, session


def written(tokenizer, call):
    """A turn with a call as the template writes it."""
    turns = ChatTurns(tokenizer, [tokenizer.eos_token_id], ADD)
    user = {"role": "user", "content": "Hi"}
    before = turns._text([user], {}, True)
    whole = turns._text([user, assistant_message(Turn("", [call], []))], {}, False)
    if "<think></think>" in whole:
        return whole.rpartition("<think></think>")[2].removesuffix("<|im_end|>\n")
    return whole.removeprefix(before).removesuffix("<|im_end|>\n")


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_trained_on_is_what_was_sampled_token_by_token(name):
    tokenizer = tokenizer_of(TEMPLATES[name])
    call = written(tokenizer, ToolCall("add", {"a": 1, "b": 2}))
    scripts = [[call, call, "It is 3."], ["  no\n\n call  "], [call.replace("2", " 2 "), "5", "6"]]
    found, script, session = play(tokenizer, scripts)
    for i, (episode, said) in enumerate(zip(found.episodes, script, strict=True)):
        turns = [[*ids, tokenizer.eos_token_id] for ids in said][: episode.turns]
        sampled = [t for t, mine in zip(episode.ids, episode.sampled, strict=True) if mine]
        assert sampled == [t for turn in turns for t in turn]
        assert [lp != 0 for lp in episode.logprobs] == episode.sampled
        # Each turn was sampled from all tokens before it, as they were sampled and appended.
        whole, place = [*found.prompt_ids[0], *episode.ids], len(found.prompt_ids[0])
        for before, turn in zip(session.prompts[i], turns, strict=True):
            assert whole[: len(before)] == before
            assert whole[len(before) : len(before) + len(turn)] == turn
            place = len(before) + len(turn)
        assert place == len(whole) and episode.finish == "eos"
    tools = [m["content"] for m in found.episodes[0].messages if m["role"] == "tool"]
    assert tools == ["3", "3"] and found.episodes[0].tool_calls == 2
    # A conversation in the template's own words has the tokens of its own rendering.
    episode = found.episodes[0]
    template = tokenizer.apply_chat_template(
        [*episode.messages[:-1], {"role": "user", "content": "last"}],
        tools=ADD,
        tokenize=False,
    )
    text = tokenizer.decode([*found.prompt_ids[0], *episode.ids])
    assert text.removesuffix("assistant\nIt is 3.<|im_end|>") == template.partition("user\nlast")[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_format_is_the_one_that_reads_what_the_template_writes(name):
    tokenizer = tokenizer_of(TEMPLATES[name])
    turns = ChatTurns(tokenizer, [tokenizer.eos_token_id], ADD)
    assert turns.tool_format == FORMAT.get(name, name)
    call = ToolCall("add", {"a": 1, "b": 2})
    ids = [*tokenizer(written(tokenizer, call))["input_ids"], tokenizer.eos_token_id]
    assert turns.read(ids) == Turn("", [call], [])


def test_a_turn_without_the_end_token_gets_that_of_the_template():
    tokenizer = tokenizer_of(TEMPLATES["hermes"])
    turns = ChatTurns(tokenizer, [tokenizer.eos_token_id])
    user, said = [{"role": "user", "content": "Hi"}], Turn("a", [], [])
    new = [{"role": "user", "content": "b"}]
    after = "\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    eos = tokenizer.eos_token_id
    assert tokenizer.decode(turns.between(user, said, new, eos, {})) == after
    assert tokenizer.decode(turns.between(user, said, new, 5, {})) == "<|im_end|>" + after


def test_what_cannot_be_read_or_run_is_told_to_the_model_and_counted():
    tokenizer = tokenizer_of(TEMPLATES["hermes"])
    bad = [
        "<tool_call>{</tool_call>",
        '<tool_call>{"name": "mul", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"c": 1}}</tool_call>',
    ]
    found, *_ = play(tokenizer, [[*bad, "done"]])
    (episode,) = found.episodes
    told = [m["content"] for m in episode.messages if m["role"] == "tool"]
    assert ["JSON" in told[0], "no tool 'mul', only add" in told[1]] == [True, True]
    assert "unexpected keyword argument 'c'" in told[2] and all("error" in t for t in told)
    assert (episode.tool_calls, episode.tool_failures, len(episode.errors)) == (3, 3, 3)
    assert episode.finish == "eos" and episode.turns == 4


def test_an_environment_answers_messages_and_gives_the_reward():
    tokenizer = tokenizer_of(PLAIN)
    scripts = [["4", "7"], ["7"], ["1", "2", "3"]]
    found, *_ = play(tokenizer, scripts, (), tool_files.Guess, number=7)
    assert found.rewards[:2].tolist() == [0.5, 1.0] and np.isnan(found.rewards[2])
    assert tokenizer.decode(found.prompt_ids[0]).endswith(
        "user\nGuess!<|im_end|>\n<|im_start|>assistant\n"
    )
    text = tokenizer.decode(found.episodes[0].ids)
    assert (
        text == "4<|im_end|>\n<|im_start|>user\nNo.<|im_end|>\n<|im_start|>assistant\n7<|im_end|>"
    )


def test_methods_of_an_environment_are_tools_and_its_reward_is_asked_for():
    tokenizer = tokenizer_of(TEMPLATES["hermes"])
    call = '<tool_call>{"name": "increment", "arguments": {"by": 2}}</tool_call>'
    found, *_ = play(tokenizer, [[call, call, "a"], ["b"]], (), tool_files.Counter, start=5)
    assert found.rewards.tolist() == [9.0, 5.0]


def test_a_tool_that_ends_its_process_costs_the_call_and_an_environment_its_episode():
    tokenizer = tokenizer_of(TEMPLATES["hermes"])
    call = '<tool_call>{"name": "fail", "arguments": {"how": "die"}}</tool_call>'
    found, *_ = play(tokenizer, [[call, "a"], ["b"]], (tool_files.fail,))
    assert [e.finish for e in found.episodes] == ["eos", "eos"]
    assert "exit code 3" in found.episodes[0].errors[0]
    scripts = [[call, "7"], ["7"]]
    found, *_ = play(tokenizer, scripts, (tool_files.fail,), tool_files.Guess, number=7)
    assert [e.finish for e in found.episodes] == ["error", "eos"]
    assert np.isnan(found.rewards[0]) and found.rewards[1] == 1.0


def test_an_answer_beyond_the_limit_is_truncated_and_ends_the_episode():
    tokenizer = tokenizer_of(PLAIN)
    found, *_ = play(tokenizer, [["4", "7"]], (), tool_files.Guess, limit=10, number=7)
    assert found.output.finish_reasons == ("length",) and found.output.lengths.tolist() == [10]
    assert found.output.mask.sum() == 2


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (PLAIN, "does not render tools"),
        (
            TEMPLATES["hermes"].replace("[{{ m.content }}]", "[]"),
            "does not render results of tools",
        ),
        (TEMPLATES["hermes"].replace("<tool_call>", "<call>"), "which no parser reads"),
        ("{{ raise_exception('no tools') if messages | length > 1 }}", "cannot render a call"),
    ],
)
def test_a_template_that_cannot_render_tools_is_refused(template, reason):
    tokenizer = tokenizer_of(template)
    with pytest.raises(ConfigError, match=reason):
        ChatTurns(tokenizer, [tokenizer.eos_token_id], ADD)


def test_a_malformed_call_is_told_to_a_template_that_refuses_results_without_a_call():
    """gpt-oss' does, and it refuses thoughts beside content and a call."""
    refuses = (
        "{% set called = namespace(so_far=false) %}{% for m in messages %}"
        "{% if m.tool_calls and m.content and m.thinking %}{{ raise_exception('both') }}{% endif %}"
        "{% if m.tool_calls %}{% set called.so_far = true %}{% endif %}"
        "{% if m.role == 'tool' and not called.so_far %}{{ raise_exception('no call') }}{% endif %}"
        "{% endfor %}"
    )
    tokenizer = tokenizer_of(refuses + TEMPLATES["gpt_oss"])
    header = "<|channel|>commentary to=functions.add <|constrain|>json<|message|>"
    hidden = "<|channel|>analysis<|message|>Sum<|end|><|channel|>commentary<|message|>Now<|end|>"
    called = f'{hidden}{header}{{"a": 1, "b": 2}}<|call|>'
    found, *_ = play(tokenizer, [[f"{header}{{<|call|>", called, called, "done"]])
    (episode,) = found.episodes
    told = [m["content"] for m in episode.messages if m["role"] == "tool"]
    assert "must be JSON" in told[0] and told[1:] == ["3", "3"]
    assert (episode.finish, episode.tool_calls, episode.tool_failures) == ("eos", 3, 1)
    said = [m for m in episode.messages if m["role"] == "assistant"][1]
    assert (said["thinking"], said["content"]) == ("Sum", "Now")
