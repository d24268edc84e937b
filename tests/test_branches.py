"""What agents sample becomes trees, of which each sampled token is trained once."""

import math

import jax
import numpy as np
import pytest

from relax.models.forward import at_places, predicting_states
from relax.rewards.agent_process import checked_result
from relax.rewards.agents import AgentResult
from relax.serving.agents import AgentEpisode, lay_out_episodes
from relax.serving.protocol import SamplingFields
from relax.serving.recording import Call, EpisodeSession, branches, common_prefix
from relax.trainers.groups import pack_groups


def call(prompt, *tokens):
    return Call(tuple(prompt), tokens, tuple(-0.1 * t for t in tokens), "eos")


def trained(made):
    return [[t if s else 0 for t, s in zip(b.ids, b.sampled, strict=True)] for b in made]


FIRST, SECOND = call([1, 2], 3, 4), call([1, 2, 3, 4, 5], 6)


def test_a_call_that_continues_another_is_one_branch_with_it():
    (branch,) = branches([FIRST, SECOND])
    assert branch.ids == (1, 2, 3, 4, 5, 6)
    assert branch.sampled.tolist() == [False, False, True, True, False, True]
    np.testing.assert_allclose(branch.logprobs, [0, 0, -0.3, -0.4, 0, -0.6], rtol=1e-6)


@pytest.mark.parametrize("other", [call([1, 2, 3, 9], 7), call([8], 7), call([1, 2, 3], 7)])
def test_a_call_that_rewrites_what_came_before_is_a_branch_of_its_own(other):
    made = branches([FIRST, SECOND, other])
    assert sorted(b.ids for b in made) == sorted([SECOND.ids, other.ids])
    assert sorted(t for row in trained(made) for t in row if t) == [3, 4, 6, 7]


def test_a_token_that_two_branches_share_is_trained_in_one():
    third = call([1, 2, 3, 4, 8], 9)
    for calls in ([FIRST, SECOND, third], [third, SECOND, FIRST]):
        made = branches(calls)
        assert trained(made) == [[0, 0, 3, 4, 0, 6], [0, 0, 0, 0, 0, 9]]
        assert common_prefix(made) == 2


def test_equal_calls_are_all_kept():
    assert trained(branches([FIRST, FIRST._replace(reason="length")])) == [[0, 0, 3, 4]] * 2


def test_the_order_of_calls_does_not_matter():
    calls = [FIRST, SECOND, call([8], 7), call([1, 2, 3, 4, 5, 6, 7], 1), call([1], 2)]
    expected = branches(calls)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(calls))
        found = branches([calls[i] for i in order])
        assert trained(found) == trained(expected) and [b.ids for b in found] == [
            b.ids for b in expected
        ]


def fields(**changes):
    names = {"model": None, "max_tokens": None, "temperature": 1.0, "top_p": 1.0, "n": 1}
    names |= {"seed": None, "stop": (), "stream": False, "include_usage": False}
    return SamplingFields(**names | {"alternatives": None} | changes)


def test_keys_depend_on_what_is_asked_and_not_on_the_order():
    def keys(*prompts):
        session = EpisodeSession(jax.random.key(1), 0.7, 1.0, 5)
        made = [session.requests(list(prompt), fields(), 9) for prompt in prompts]
        return {
            (tuple(r.prompt), r.name): jax.random.key_data(r.key).tolist()
            for (r,) in made
        }, made  # fmt: skip

    forward, made = keys([1], [2], [1])
    backward, _ = keys([1], [1], [2])
    assert forward == backward and len({tuple(k) for k in forward.values()}) == 3
    ((request,), *_) = made
    assert (request.temperature, request.max_new_tokens) == (0.7, 5)


def test_settings_of_calls_have_no_effect_and_are_counted():
    session = EpisodeSession(jax.random.key(1), 0.7, 1.0, 5)
    for asked in ({}, {"temperature": 0.7}, {"temperature": 0.0}, {"seed": 1}, {"top_p": 0.5}):
        (request,) = session.requests([1], fields(**asked), 9)
        assert (request.temperature, request.top_p) == (0.7, 1.0)
    assert session.overridden == 3


def episode(*calls):
    return AgentEpisode(AgentResult(), branches(calls), "", "eos", len(calls), 0)


def test_branches_share_their_prompt_and_are_computed_as_rows_of_their_own(tiny_model, tiny_params):
    """The states before sampled tokens are those of each branch alone."""
    episodes = [
        episode(FIRST, SECOND, call([1, 2, 7, 7, 7], 8, 9)),
        episode(call([1, 2, 5], 10, 11, 12)),
        episode(call([13, 14], 15)),
        episode(),
    ]
    laid = lay_out_episodes(episodes, 2)
    assert laid.prompt_ids == [[1, 2], [13, 14]]
    assert laid.lengths.tolist() == [[4 + 5, 4], [1, 0]]
    batch = {
        "prompt_ids": np.array(laid.prompt_ids),
        "prompt_lengths": np.array([2, 2]),
        "completion_ids": laid.tokens,
        "completion_lengths": laid.lengths,
        "branches": laid.branches,
        "mask": laid.mask,
    }
    packed = pack_groups(batch, [tiny_model], 1)
    assert "branches" not in packed
    states, _ = predicting_states(tiny_model, tiny_params, packed)
    found = np.asarray(at_places(states, packed["places"]))
    mask = packed["mask"] & (packed["places"] >= 0)
    assert mask.sum() == 3 + 2 + 3 + 1
    for p, g in np.ndindex(2, 2):
        expected = []
        for branch in episodes[2 * p + g].made:
            ids = np.array([branch.ids])
            alone = tiny_model.apply({"params": tiny_params}, ids, method="hidden_states")[0]
            expected += [alone[i - 1] for i in np.flatnonzero(branch.sampled)]
        got = found[p, g][mask[p, g]]
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_branches_without_a_common_beginning_have_an_empty_prompt():
    laid = lay_out_episodes([episode(call([1], 2)), episode(call([3], 4))], 2)
    assert laid.prompt_ids == [[]] and laid.lengths.tolist() == [[2, 2]]
    assert laid.mask[0, :, :2].tolist() == [[False, True]] * 2


@pytest.mark.parametrize("value", ["text", {"score": 1}, {"reward": "high"}, [1], object()])
def test_an_agent_that_returns_something_else_is_told_what_it_may_return(value):
    with pytest.raises(ValueError, match="an agent"):
        checked_result(value)


@pytest.mark.parametrize("value", [np.float32(0.5), np.int64(2), np.array(1.0), True])
def test_a_number_of_numpy_is_a_reward_of_an_agent(value):
    for given in (value, {"reward": value}):
        assert checked_result(given) == {"reward": float(value), "messages": None}


@pytest.mark.parametrize("value", [math.inf, math.nan, 1e19, np.float32("nan"), np.zeros(2)])
def test_a_reward_of_an_agent_is_finite_and_one(value):
    for given in (value, {"reward": value}):
        with pytest.raises(ValueError, match="an agent gave"):
            checked_result(given)


@pytest.mark.parametrize("content", ["text", None, [{"type": "text", "text": "a"}], []])
def test_the_content_of_an_agents_message_is_a_text_parts_or_none(content):
    chat = [{"role": "user", "content": content}]
    assert checked_result(chat)["messages"] == chat


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": 5},
        {"role": "assistant", "content": [5]},
        {"role": "assistant", "content": [{"text": 5}]},
        {"role": 7},
    ],
)
def test_a_message_of_an_agent_that_rewards_could_not_read_is_refused(message):
    with pytest.raises(ValueError, match="agent's message"):
        checked_result({"messages": [message]})
