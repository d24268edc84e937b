"""Completions of a function: trained as it says, redrawn exactly, refused in one sentence."""

import jax
import numpy as np
import optax
import pytest
from rl import items_of

from relax.errors import ConfigError, RewardError
from relax.sampling import SamplingConfig
from relax.trainers import GRPOTrainer

EOS = 22


class Words:
    eos_token_id = EOS

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(str(int(i)) for i in ids)


def trainer_of(tiny_model, tiny_params, function, rewards=None, **options):
    return GRPOTrainer(
        tiny_model,
        optax.sgd(0.1),
        params=tiny_params,
        reward_funcs=rewards or [lambda completion_ids: [float(sum(x)) for x in completion_ids]],
        tokenizer=Words(),
        sampling=SamplingConfig(max_new_tokens=10, slots=4),
        num_generations=2,
        rollout_func=function,
        **options,
    )


def two_turns(prompts, policy):
    """A turn of the policy, an answer of two tokens, and another turn."""
    first = policy.generate(policy.prompt_ids, max_new_tokens=4)
    longer = [[*one["prompt_ids"], *one["completion_ids"], 3, 4] for one in first]
    second = policy.generate(longer, max_new_tokens=4)
    pairs = list(zip(first, second, strict=True))
    return {
        "prompt_ids": [one["prompt_ids"] for one in first],
        "completion_ids": [[*a["completion_ids"], 3, 4, *b["completion_ids"]] for a, b in pairs],
        "logprobs": [[*a["logprobs"], 0.0, 0.0, *b["logprobs"]] for a, b in pairs],
        "env_mask": [
            [1] * len(a["logprobs"]) + [0, 0] + [1] * len(b["logprobs"]) for a, b in pairs
        ],
        "place": list(range(len(prompts))),
    }


def test_what_the_function_sampled_is_trained_with_the_policys_logprobs(tiny_model, tiny_params):
    seen = []

    def by_place(prompts, completion_ids, place):
        seen.append((prompts, place))
        return [float(i) for i in place]

    trainer = trainer_of(tiny_model, tiny_params, two_turns, [by_place])
    state, item = trainer.create_train_state(jax.random.key(1)), items_of(1)[0]
    collected = trainer.collect(state, item, jax.random.key(2))
    assert seen == [(["00", "00", "01", "01"], [0, 1, 2, 3])]
    assert collected.rewards.tolist() == [[0, 1], [2, 3]]
    rollout = collected.rollout
    expected = trainer.token_logprobs(tiny_params, rollout)
    np.testing.assert_allclose(rollout.logprobs[rollout.mask], expected[rollout.mask], atol=1e-4)
    for p, g in np.ndindex(2, 2):
        n = rollout.completion_lengths[p, g]
        written = rollout.mask[p, g, :n]
        assert rollout.completion_ids[p, g, :n][~written].tolist() == [3, 4]
        assert not rollout.mask[p, g, n:].any()
    again = trainer.collect(state, item, jax.random.key(2)).rollout
    np.testing.assert_array_equal(rollout.completion_ids, again.completion_ids)
    logged = next(iter(trainer.make_batches(state, item)))
    _, metrics = trainer.train_step(state, logged.batch)
    assert metrics["skipped_steps"] == 0
    assert metrics["sampling/logp_difference/max"] < 1e-4


GOOD = {
    "prompt_ids": [[1, 2], [1, 2], [5], [5]],
    "completion_ids": [[7], [8, EOS], [9], [9]],
    "logprobs": [[-1.0], [-1.0, -2.0], [-1.0], [-1.0]],
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"logprobs": GOOD["logprobs"][:3]}, "are 4, and logprobs has 3"),
        ({"env_mask": [[1], [1], [1], [1]]}, "completion 1 has 2 tokens, 2 logprobs and 1 entries"),
        ({"prompt_ids": [[1, 2], [1, 3], [5], [5]]}, "the same prompt_ids, .* of prompt 0"),
        ({"completion_ids": [[7], [8, EOS], [], [9]]}, "of 1 to 10 tokens, and number 2 has 0"),
        ({"completion_ids": [[7], [8, EOS], [9], [99]]}, "tokens from 0 to 22, got 0 and 99"),
        ({"prompt": ["a"] * 4}, "has 'prompt', which is a column of the data set too"),
        (None, "must be a dict with prompt_ids, completion_ids, logprobs, got NoneType"),
    ],
)
def test_what_the_function_may_not_return_is_refused(tiny_model, tiny_params, change, reason):
    found = None if change is None else GOOD | change
    trainer = trainer_of(tiny_model, tiny_params, lambda prompts, policy: found)
    state = trainer.create_train_state(jax.random.key(1))
    with pytest.raises(RewardError, match=f"rollout_func returned .*{reason}") as refused:
        trainer.collect(state, items_of(1)[0], jax.random.key(2))
    assert "\n" not in str(refused.value)


def test_finish_reasons_follow_the_last_token(tiny_model, tiny_params):
    trainer = trainer_of(tiny_model, tiny_params, lambda prompts, policy: GOOD)
    state = trainer.create_train_state(jax.random.key(1))
    rollout = trainer.generate(state, items_of(1)[0], jax.random.key(2))
    assert rollout.finish.tolist() == [["stop", "eos"], ["stop", "stop"]]


def test_a_rollout_func_is_the_only_maker_of_completions(tiny_model, tiny_params):
    for options, other in (
        ({"async_rollouts": 1}, "async_rollouts"),
        ({"agents": object()}, "tools, environment_factory and agents"),
    ):
        with pytest.raises(ConfigError, match=f"rollout_func excludes {other}"):
            trainer_of(tiny_model, tiny_params, two_turns, **options)
    with pytest.raises(ConfigError, match="rollout_func must be a function, got 'f'"):
        trainer_of(tiny_model, tiny_params, "f")
