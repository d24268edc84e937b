"""Rollouts: shapes, padding, and what is counted about completions."""

import numpy as np
import pytest
from rl import rollout_of

from relax.sampling import SamplingConfig
from relax.sampling.output import padded as sampled
from relax.trainers.rl.metrics import reward_metrics, rollout_metrics
from relax.trainers.rl.rollout import bucket, concatenate, is_truncated, make_rollout

ITEM = {"prompt_ids": [[5, 6], [7]], "rows": [{"prompt": "a"}, {"prompt": "b"}]}
OUTPUT = sampled(
    [
        ([1, 2, 3], [-1.0, -2.0, -3.0], "eos"),
        ([4], [-4.0], "stop"),
        (list(range(9)), [-0.5] * 9, "length"),
        ([2, 2], [-1.5, -2.5], "eos"),
    ]
)


def made():
    sampling = SamplingConfig(n=2, max_new_tokens=9)
    return make_rollout(ITEM, OUTPUT, sampling, lambda ids: "".join(map(str, ids)))


def test_a_rollout_holds_what_the_sampler_gave_by_prompt_and_completion():
    rollout = made()
    assert rollout.prompt_ids.shape == (2, 8) and rollout.prompt_lengths.tolist() == [2, 1]
    assert rollout.completion_ids.shape == (2, 2, 9)  # never more than max_new_tokens
    assert rollout.completion_lengths.tolist() == [[3, 1], [9, 2]]
    assert rollout.texts == [["123", "4"], ["012345678", "22"]]
    assert rollout.finish.tolist() == [["eos", "stop"], ["length", "eos"]]
    assert rollout.truncated.tolist() == [[False, False], [True, False]]
    assert rollout.logprobs[1, 1].tolist() == [-1.5, -2.5] + [0] * 7
    assert (rollout.mask.sum(axis=2) == rollout.completion_lengths).all()


def test_groups_are_taken_and_joined_whatever_their_widths():
    short = rollout_of(np.ones((1, 2, 3)), [[3, 1]])
    joined = concatenate([made(), short])
    assert joined.completion_ids.shape == (3, 2, 9) and joined.prompt_ids.shape == (3, 8)
    again = joined.take([2, 0])
    assert again.completion_lengths.tolist() == [[3, 1], [3, 1]]
    assert again.texts == [short.texts[0], made().texts[0]]
    assert again.rows == [short.rows[0], ITEM["rows"][0]]
    np.testing.assert_array_equal(again.completion_ids[0, 0, :3], [1, 1, 1])


def test_completions_are_counted_as_by_hand():
    metrics = rollout_metrics(made())
    assert metrics["num_tokens"] == 3 + 1 + 9 + 2 + 2 * (2 + 1)
    assert metrics["completions/clipped_ratio"] == 0.25
    names = ("mean", "min", "max")
    assert [metrics[f"completions/{n}_length"] for n in names] == [15 / 4, 1, 9]
    assert [metrics[f"completions/{n}_terminated_length"] for n in names] == [2, 1, 3]


def test_where_none_ended_terminated_lengths_are_0():
    metrics = rollout_metrics(rollout_of(np.ones((1, 2, 3)), [[3, 3]]))
    assert metrics["completions/clipped_ratio"] == 1.0
    assert metrics["completions/max_terminated_length"] == 0.0


def test_what_applies_to_nothing_has_no_mean():
    rewards = np.full((1, 2), np.nan)
    metrics = reward_metrics(rewards, rewards[:, :, None], ["f"])
    assert metrics["frac_reward_zero_std"] == 1.0
    assert "reward" not in metrics and "rewards/f/mean" not in metrics


def test_buckets_hold_their_length_and_waste_at_most_half():
    for length in range(1, 400):
        assert length <= bucket(length) <= max(8, 1.5 * length)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, False),
        ({"temperature": 0.5}, False),
        ({"top_k": 3}, True),
        ({"top_p": 0.9}, True),
        ({"min_p": 0.1}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"logit_bias": {1: 1.0}}, True),
        ({"min_new_tokens": 2, "eos_token_ids": (1,)}, True),
    ],
)
def test_a_distribution_is_truncated_where_it_is_not_the_policys(options, expected):
    assert is_truncated(SamplingConfig(**options)) is expected
