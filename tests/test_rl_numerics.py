"""Overflow and NaN in rewards, advantages, weights and logits: right, or the end of the run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import bits
from rl import TABLE, Letters, TablePPO, TableTrainer, items_of

from relax.callbacks import NonFiniteGuard
from relax.errors import NonFiniteError, RewardError
from relax.rewards import RewardRunner
from relax.sampling import SamplingConfig
from relax.trainers import GRPOTrainer, PPOTrainer
from relax.trainers.rl.finite import non_finite_tensors

KEY = jax.random.key(3)
RLOO = {"scale_rewards": "rloo", "importance_sampling_level": "trajectory", "loss_type": "grpo"}
DR_GRPO = {"scale_rewards": "none", "loss_type": "dr_grpo"}


def first_batch(trainer, item=None):
    state = trainer.create_train_state(KEY)
    return state, next(iter(trainer.make_batches(state, item or items_of(1)[0])))


# Advantages.


@pytest.mark.parametrize("options", [{}, {"scale_rewards": "batch"}, RLOO, DR_GRPO])
@pytest.mark.parametrize("reward, G", [(99.9, 8), (512.3, 10), (9876.1, 8)])
def test_a_group_of_equal_rewards_changes_nothing(options, reward, G):
    trainer = TableTrainer(
        reward_funcs=[lambda completions: [reward] * len(completions)], num_generations=G, **options
    )
    state, given = first_batch(trainer)
    assert (given.batch["advantages"] == 0).all()
    assert given.metrics["reward_std"] == 0 and given.metrics["frac_reward_zero_std"] == 1
    state, metrics = trainer.train_step(state, given.batch)
    assert metrics["grad_norm"] == 0 and bits(state.params) == bits({"table": TABLE})


def test_rewards_that_differ_in_the_eighth_digit_are_told_apart():
    def offsets(completions):
        return [1e7 + (0.25, 0.5, 0.75, 1.0)[i % 4] for i in range(len(completions))]

    _, given = first_batch(TableTrainer(reward_funcs=[offsets]))
    expected = [[-1.1615, -0.3872, 0.3872, 1.1615]] * 2
    np.testing.assert_allclose(given.batch["advantages"], expected, atol=1e-4)


def test_an_advantage_that_overflows_stops_the_run():
    class Overflows(TableTrainer):
        def advantages(self, rewards):
            return np.full(rewards.shape, np.inf)

    trainer = Overflows(callbacks=[NonFiniteGuard(patience=3)])
    with pytest.raises(NonFiniteError, match="3 updates in a row, 1 to 3"):
        trainer.train(items_of(6), key=KEY)


# Rewards.


@pytest.mark.parametrize("extreme", [1e308, -1e308, 1e19, float("inf"), float("nan")])
@pytest.mark.parametrize("kind", [TableTrainer, TablePPO])
def test_a_reward_beyond_the_bound_is_refused_as_infinity_is(kind, extreme):
    def fails_once(completions):
        return [extreme] + [float(len(c)) for c in completions[1:]]

    with RewardRunner([fails_once], max_errors=1.0) as runner:
        trainer = kind(reward_funcs=runner)
        with pytest.warns(UserWarning, match="failed on 1 of|no reward"):
            state, given = first_batch(trainer)
    assert given.metrics["reward_errors"] == 1
    assert np.isfinite(given.metrics["reward"]) and given.metrics["reward"] < 10
    assert np.isnan(given.records[0]["reward"])
    state, metrics = trainer.train_step(state, given.batch)
    assert np.isfinite(metrics["loss"]) and metrics["skipped_steps"] == 0


def test_a_function_that_always_overflows_ends_the_run():
    trainer = TableTrainer(reward_funcs=[lambda completions: [1e308] * len(completions)])
    with (
        pytest.warns(UserWarning, match="functions failed on 8 of 8|no reward"),
        pytest.raises(RewardError, match=r"returned 1e\+308"),
    ):
        trainer.train(items_of(20), key=KEY)


def test_rewards_that_add_up_beyond_the_bound_are_refused():
    trainer = TableTrainer(
        reward_funcs=[lambda completions: [9e17] * len(completions)], reward_weights=[10.0]
    )
    with pytest.raises(RewardError, match=r"within ±1e\+18, got 9e\+18"):
        first_batch(trainer)


# Log-probabilities and values.


@pytest.mark.parametrize("kind", [TableTrainer, TablePPO])
def test_a_completion_whose_log_probability_is_nan_is_named_and_stops_the_run(kind):
    class Sampler(kind):
        def generate(self, *arguments, **options):
            rollout = super().generate(*arguments, **options)
            rollout.logprobs[1, 2, 0] = np.nan
            return rollout

    # All weights are finite: a few such updates are skipped, then the run ends.
    trainer = Sampler(callbacks=[NonFiniteGuard(patience=3)], num_generations=4)
    named = "log-probability is nan at token 0 of completion 2 to the prompt '.1'"
    with pytest.warns(UserWarning, match=named), pytest.raises(NonFiniteError, match="1 to 3"):
        trainer.train(items_of(6), key=KEY)


def test_a_critic_of_nan_stops_ppo_and_is_named():
    trainer = TablePPO()
    state = trainer.create_train_state(KEY)
    kernel = state.params["value"]["score"]["kernel"].at[:].set(jnp.nan)
    params = state.params | {"value": {"score": {"kernel": kernel}}}
    with pytest.raises(NonFiniteError, match="critic's value is nan .*params/value/score/kernel"):
        list(trainer.make_batches(state.replace(params=params), items_of(1)[0]))


@pytest.mark.parametrize("kind", [TableTrainer, TablePPO])
def test_a_reference_of_nan_stops_the_run_and_is_named(kind):
    trainer = kind(**({"beta": 0.1} if kind is TableTrainer else {"kl_coef": 0.1}))
    state = trainer.create_train_state(KEY)
    frozen = jax.tree.map(lambda leaf: leaf * jnp.nan, state.frozen)
    with pytest.raises(NonFiniteError, match="reference's log-probability is nan .*table"):
        list(trainer.make_batches(state.replace(frozen=frozen), items_of(1)[0]))


@pytest.mark.parametrize("kind", [GRPOTrainer, PPOTrainer])
def test_weights_of_nan_are_no_environments_tokens(tiny_model, tiny_params, kind):
    """The sampler names the completion before the first update, and in an evaluation."""
    params = jax.tree.map(lambda leaf: leaf, tiny_params)
    params["norm"] = jax.tree.map(lambda leaf: leaf.at[3].set(jnp.nan), params["norm"])
    trainer = kind(
        tiny_model,
        optax.sgd(0.1),
        params=params,
        reward_funcs=[lambda completions: [float(len(c)) for c in completions]],
        tokenizer=Letters(),
        sampling=SamplingConfig(max_new_tokens=4),
        num_generations=2,
    )
    named = "token 0 of completion 0 has the log-probability nan"
    with pytest.raises(NonFiniteError, match=named):
        trainer.train(items_of(2), key=KEY)
    with pytest.raises(NonFiniteError, match=named):
        trainer.validate(trainer.create_train_state(KEY), items_of(1))


def test_tensors_that_are_not_finite_are_named():
    tree = {"a": {"b": jnp.array([1.0, np.inf])}, "c": jnp.ones(2), "d": jnp.array([np.nan])}
    assert non_finite_tensors(tree) == ["a/b", "d"]
