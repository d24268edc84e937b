"""One update: exact accumulation, clipping, skipping, keys, frozen weights, one compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import Regression, bits, regression_batches

from relax.trainers import LossOutput, Mean, Sum, Trainer, TrainState
from relax.trainers.update import (
    accumulate_gradients,
    as_loss_output,
    clip_scale,
    reduce_metrics,
    split_micro_batches,
)

KEY = jax.random.key(3)


class Weighted(Regression):
    """Least squares where every row has a weight of its own, as rows have trained tokens."""

    def compute_loss(self, params, batch):
        error = batch["x"] @ params["w"] - batch["y"]
        weight = batch["weight"].sum()
        loss = (batch["weight"] * jnp.square(error)).sum() / weight  # 0 / 0 where nothing weighs
        heavy = (batch["weight"] > 1).sum()
        metrics = {
            "bias": (batch["weight"] * error).sum() / weight,
            "heavy": Sum(heavy),
            "heavy_y": Mean(jnp.where(batch["weight"] > 1, batch["y"], 0).sum() / heavy, heavy),
        }
        return LossOutput(loss, weight, metrics)


def weighted_batch(weights, seed=0):
    batch = regression_batches(1, rows=len(weights), seed=seed)[0]
    return batch | {"weight": np.float32(weights)}


UNEQUAL = [1, 100, 0, 3, 0, 0, 7, 2000]


# Accumulation.


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_however_a_batch_is_cut_the_gradient_is_that_of_the_mean_over_all_items(count):
    batch = weighted_batch(UNEQUAL)
    params = {"w": jnp.float32([0.5, -1, 2])}
    trainer = Weighted()
    gradients, metrics = jax.jit(
        lambda p: accumulate_gradients(lambda p, b, _: trainer.compute_loss(p, b), p, batch, count)
    )(params)
    x, y, weight = (batch[name].astype(np.float64) for name in ("x", "y", "weight"))
    error = x @ np.float64([0.5, -1, 2]) - y
    expected = 2 * (weight * error) @ x / weight.sum()
    np.testing.assert_allclose(gradients["w"], expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], (weight * error**2).sum() / weight.sum(), rtol=1e-6)
    np.testing.assert_allclose(metrics["bias"], (weight * error).sum() / weight.sum(), rtol=1e-5)
    assert metrics["heavy"] == 4
    np.testing.assert_allclose(metrics["heavy_y"], y[weight > 1].mean(), rtol=1e-6)


def test_a_batch_without_any_item_has_a_zero_gradient_and_a_zero_loss():
    for count in (1, 2):
        trainer = Weighted(gradient_accumulation_steps=count)
        state = trainer.create_train_state(KEY)
        before = bits(state.params)
        state, metrics = trainer.train_step(state, weighted_batch([0, 0, 0, 0]))
        assert metrics["loss"] == metrics["grad_norm"] == metrics["skipped_steps"] == 0
        assert bits(state.params) == before  # Adam without momentum: zero in, zero out


def test_a_bare_scalar_loss_is_a_mean_of_one_item_per_micro_batch():
    class Bare(Regression):
        def compute_loss(self, params, batch):
            return jnp.square(batch["x"] @ params["w"] - batch["y"]).mean()

    results = []
    for count in (1, 4):
        trainer = Bare(optax.sgd(0.1), gradient_accumulation_steps=count)
        state, metrics = trainer.train_step(
            trainer.create_train_state(KEY), regression_batches(1, rows=8)[0]
        )
        results.append((state.params["w"], metrics["loss"]))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-6)


def test_steps_that_do_not_divide_the_rows_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="must divide the rows .* got 3 steps and 8 rows.*of 3"):
        split_micro_batches({"x": np.zeros((8, 2))}, 3)
    with pytest.raises(ValueError, match="gradient_accumulation_steps must be at least 1, got 0"):
        Regression(gradient_accumulation_steps=0)


def test_micro_batches_are_consecutive_rows():
    split = split_micro_batches({"x": np.arange(6)[:, None]}, 3)["x"]
    assert split[:, :, 0].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_metrics_are_weighted_means_or_sums_and_ignore_what_has_no_weight():
    stacked = LossOutput(
        loss=jnp.float32([1, 4, jnp.nan]),
        weight=jnp.float32([3, 1, 0]),
        metrics={
            "a": jnp.float32([2, 6, jnp.nan]),
            "pairs": Mean(jnp.float32([1, 3, 5]), jnp.float32([0, 1, 3])),
            "count": Sum(jnp.int32([1, 2, 3])),
        },
    )
    metrics = {name: float(value) for name, value in reduce_metrics(stacked).items()}
    assert metrics == {"loss": 1.75, "a": 3.0, "pairs": 4.5, "count": 6.0}


def test_a_loss_output_passes_through_jit_and_its_weight_has_no_gradient():
    output = jax.jit(lambda x: LossOutput(x, x * 2, {"n": Sum(x)}))(jnp.float32(3))
    assert (output.loss, output.weight, output.metrics["n"].value) == (3, 6, 3)
    assert jax.grad(lambda x: as_loss_output(LossOutput(x, x)).weight)(1.0) == 0


# Clipping and non-finite gradients.


@pytest.mark.parametrize("max_grad_norm", [0.5, 1e3])
def test_clipping_is_that_of_optax_and_the_norm_before_it_is_the_metric(max_grad_norm):
    batch = regression_batches(1)[0]
    ours = Regression(optax.sgd(0.1), max_grad_norm=max_grad_norm)
    reference = Regression(
        optax.chain(optax.clip_by_global_norm(max_grad_norm), optax.sgd(0.1)), max_grad_norm=None
    )
    state, metrics = ours.train_step(ours.create_train_state(KEY), batch)
    expected, unclipped = reference.train_step(reference.create_train_state(KEY), batch)
    np.testing.assert_allclose(state.params["w"], expected.params["w"], rtol=1e-5)
    assert metrics["grad_norm"] == unclipped["grad_norm"]
    assert 0.5 < metrics["grad_norm"] < 1e3


def test_no_limit_leaves_the_gradient_as_it_is_bit_for_bit():
    for nothing in (None, 0, 0.0):
        assert clip_scale(jnp.float32(7), nothing) == 1


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])  # 1e30: the gradient overflows
@pytest.mark.parametrize("count", [1, 2])
def test_a_gradient_that_is_not_finite_changes_no_bit_and_the_next_update_proceeds(poison, count):
    trainer = Regression(gradient_accumulation_steps=count, max_grad_norm=1.0)
    batches = regression_batches(3)
    state, _ = trainer.train_step(trainer.create_train_state(KEY), batches[0])
    before = bits((state.params, state.opt_state))
    bad = batches[1] | {"x": batches[1]["x"].copy()}
    bad["x"][2, 1] = poison
    state, metrics = trainer.train_step(state, bad)
    assert (int(metrics["skipped_steps"]), int(state.step)) == (1, 2)
    assert bits((state.params, state.opt_state)) == before
    state, metrics = trainer.train_step(state, batches[2])
    assert (int(metrics["skipped_steps"]), int(state.step)) == (0, 3)
    assert bits(state.params) != before[:1]
    assert np.isfinite(state.params["w"]).all()


def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is_finite():
    class Shifted(Regression):
        def compute_loss(self, params, batch):
            shift = jnp.where(batch["y"][0] > 100, jnp.nan, 0)
            return super().compute_loss(params, batch).loss + shift

    trainer = Shifted()
    state = trainer.create_train_state(KEY)
    before = bits((state.params, state.opt_state))
    batch = regression_batches(1)[0]
    batch["y"][0] = 101
    state, metrics = trainer.train_step(state, batch)
    assert metrics["skipped_steps"] == 1 and np.isfinite(metrics["grad_norm"])
    assert bits((state.params, state.opt_state)) == before


# Keys and frozen weights.


class Noisy(Trainer):
    """A loss that names `rng` and `frozen`, and tells what it got."""

    def create_train_state(self, key):
        return TrainState.create(
            params={"w": jnp.ones(2)}, optimizer=self.optimizer, rng=key, frozen={"f": jnp.ones(2)}
        )

    def compute_loss(self, params, batch, rng, frozen):
        noise = -1.0 if rng is None else jax.random.uniform(rng)
        metrics = {"noise": Sum(jnp.float32(noise)), "frozen": frozen["f"].sum()}
        return LossOutput((batch["x"] @ (params["w"] * frozen["f"])).sum(), 1.0, metrics)


def test_the_key_of_a_micro_batch_is_the_root_key_folded_with_update_and_micro_batch():
    trainer = Noisy(None, optax.sgd(0.1), gradient_accumulation_steps=2)
    state = trainer.create_train_state(KEY)
    batch = {"x": np.ones((2, 2), np.float32)}

    def noise(update, micro):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(KEY, update), micro))

    for update in range(3):
        state, metrics = trainer.train_step(state, batch)
        np.testing.assert_allclose(metrics["noise"], noise(update, 0) + noise(update, 1), rtol=1e-6)
    assert bits(state.rng) == bits(KEY)  # the root key never changes
    assert trainer.validate(state, [batch])["noise"] == -1  # no key when validating


def test_frozen_weights_are_read_and_never_change():
    trainer = Noisy(None, optax.adamw(0.1, weight_decay=0.1))
    state = trainer.create_train_state(KEY)
    for _ in range(3):
        state, metrics = trainer.train_step(state, {"x": np.ones((2, 2), np.float32)})
    assert metrics["frozen"] == 2
    assert bits(state.frozen) == bits({"f": jnp.ones(2)})
    assert not np.array_equal(state.params["w"], np.ones(2))


def test_the_users_key_outlives_training_and_both_kinds_of_key_give_the_same_run():
    old_style = jax.random.PRNGKey(3)
    trainer = Regression()
    new = trainer.train(regression_batches(2), key=KEY)
    old = trainer.train(regression_batches(2), key=old_style)
    assert bits(new) == bits(old)
    assert jax.random.normal(KEY).shape == jax.random.normal(old_style).shape == ()


# Compilation, donation, the learning rate.


def test_a_step_is_compiled_once_per_batch_shape_and_donates_its_state():
    traced = []

    class Counting(Regression):
        def compute_loss(self, params, batch):
            traced.append(batch["x"].shape)
            return super().compute_loss(params, batch)

    trainer = Counting()
    state = trainer.create_train_state(KEY)
    for batch in regression_batches(6) + regression_batches(6, rows=2):
        old = state
        state, _ = trainer.train_step(state, batch)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.opt_state))
    assert traced == [(4, 3), (2, 3)]


def test_the_learning_rate_is_that_of_the_update_done():
    def trained(optimizer):
        trainer = Regression(optimizer)
        state = trainer.create_train_state(KEY)
        for batch in regression_batches(3):
            state, metrics = trainer.train_step(state, batch)
            yield metrics.get("learning_rate")

    rate = optax.inject_hyperparams(optax.adam)
    np.testing.assert_allclose(list(trained(rate(lambda n: 1.0 / (n + 1)))), [1, 1 / 2, 1 / 3])
    assert list(trained(optax.adam(0.1))) == [None] * 3
    assert list(trained(optax.chain(rate(0.1), rate(0.2)))) == [None] * 3  # which one?
