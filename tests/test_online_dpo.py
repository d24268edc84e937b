"""Online DPO: the pairs of a rollout, and the update against a loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rl import TABLE, Table, V, items_of, rollout_of

from relax.config import OnlineDPOConfig
from relax.errors import ConfigError
from relax.trainers import OnlineDPOTrainer
from relax.trainers.online_dpo_trainer import best_and_worst
from relax.trainers.rl_trainer import ScoredRollout

KEY = jax.random.key(3)
LENGTHS = np.array([[6, 1, 3, 5], [2, 6, 4, 3], [1, 2, 3, 4]])
REWARDS = np.array([[1.0, 0.0, 0.5, 2.0], [np.nan, 3.0, 1.0, np.nan], [1.0, 1.0, 1.0, np.nan]])
PAIRS = [(0, 3, 1), (1, 1, 2)]  # group, best, worst; the third group has none
BETA = 0.3


class TableTrainer(Table, OnlineDPOTrainer):
    """Online DPO of the table: all is the trainer's own but the model and the sampler."""


def collected() -> ScoredRollout:
    ids = np.random.default_rng(1).integers(0, V - 1, (3, 4, 6))
    return ScoredRollout(rollout_of(ids, LENGTHS), REWARDS, REWARDS[:, :, None], {}, {})


def test_a_pair_is_the_best_and_the_worst_completion_with_a_reward():
    found, given = best_and_worst(collected()), collected().rollout
    assert found.completion_ids.shape == (3, 2, 6) and len(found.texts[0]) == 2
    for p, best, worst in PAIRS:
        for place, g in enumerate((best, worst)):
            np.testing.assert_array_equal(
                found.completion_ids[p, place], given.completion_ids[p, g]
            )
            assert found.completion_lengths[p, place] == LENGTHS[p, g]
            assert found.texts[p][place] == given.texts[p][g]
    np.testing.assert_array_equal(found.prompt_ids, given.prompt_ids)


def test_the_update_is_that_of_a_loop_over_the_pairs():
    """The gradient of the mean of -log σ(β Δ), by a loop; the reference is another table."""
    found = collected()
    ids = found.rollout.completion_ids
    ref = TABLE + 0.3 * np.random.default_rng(8).normal(size=V).astype(np.float32)

    def loss_of(table):
        losses = []
        for p, *pair in PAIRS:
            tokens = [ids[p, g, : LENGTHS[p, g]] for g in pair]
            best, worst = (table[t].sum() - ref[t].sum() for t in tokens)
            losses.append(jnp.logaddexp(0, -BETA * (best - worst)))
        return sum(losses) / len(PAIRS)

    expected, gradient = jax.value_and_grad(loss_of)(jnp.asarray(TABLE))
    trainer = TableTrainer(optax.sgd(1.0), beta=BETA)
    state = trainer.create_train_state(KEY)
    state = state.replace(frozen={"ref": {"table": jnp.asarray(ref)}})
    (batch,) = trainer._split(found.rollout, trainer.experience(state, found), KEY)
    state, metrics = trainer.train_step(state, batch)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(TABLE - state.params["table"], gradient, rtol=1e-4, atol=1e-6)
    margin = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    np.testing.assert_allclose(metrics["rewards/margins"], margin, rtol=1e-5)


def test_completions_of_the_higher_reward_become_likelier():
    """Rewards count the letter a: after 30 updates it is the likeliest token by far."""
    trainer = TableTrainer(
        optax.adam(0.05),
        reward_funcs=[lambda completions: [float(c.count("a")) for c in completions]],
    )
    state = trainer.train(items_of(30), num_epochs=1, key=KEY)
    moved = np.asarray(state.params["table"]) - TABLE
    assert moved.argmax() == 0 and moved[0] > 0.5


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(ValueError, match="compared with the worst, got 1"):
        TableTrainer(num_generations=1)
    with pytest.raises(ValueError, match="unknown loss_type 'sigmiod'. Did you mean sigmoid"):
        TableTrainer(loss_type="sigmiod")
    given = {"dataset_name": "rows.jsonl", "reward_funcs": ["exact_match"]}
    OnlineDPOConfig().replace(**given).validate()
    OnlineDPOConfig().replace(**OnlineDPOConfig.demo).validate()
    for fields, said in (
        ({"num_generations": 1}, "best completion of a prompt"),
        ({"loss_type": "exo_pair"}, "needs label_smoothing"),
        ({"recompute_old_logprobs": True}, "recompute_old_logprobs has no effect"),
        ({"per_device_train_batch_size": 6}, "per_device_train_batch_size 8 would fit"),
    ):
        with pytest.raises(ConfigError, match=said):
            OnlineDPOConfig().replace(**given | fields).check()
