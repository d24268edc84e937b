"""AdamW and the schedules against torch and transformers, value by value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Regression, regression_batches

from relax.trainers.optimizer import adamw, learning_rate_schedule


@pytest.mark.parametrize("total, warmup", [(12, 0), (12, 3), (5, 5), (1, 0)])
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_schedules_are_those_of_transformers(kind, total, warmup):
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    warmup = 0 if kind == "constant" else warmup  # transformers leaves it out there
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    reference = get_scheduler(kind, optimizer, warmup, total)
    schedule = learning_rate_schedule(kind, 0.3, total, warmup)
    for n in range(total):
        np.testing.assert_allclose(schedule(n), reference.get_last_lr()[0], rtol=1e-5, atol=1e-8)
        optimizer.step()
        reference.step()


def test_an_unknown_schedule_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'cosin'.*linear, cosine, constant"):
        learning_rate_schedule("cosin", 1.0, 10)


def test_adamw_is_that_of_torch_where_matrices_decay_and_norms_and_biases_do_not():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 4), "bias": (4,), "scale": (4,), "embedding": (5, 3)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    settings = {"eps": 1e-6, "weight_decay": 0.3}
    optimizer = adamw(lambda n: 0.1 / (n + 1), b1=0.8, b2=0.9, **settings)

    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in params.items()}
    decayed = {"params": [theirs["kernel"], theirs["embedding"]]}
    others = {"params": [theirs["bias"], theirs["scale"]], "weight_decay": 0.0}
    reference = torch.optim.AdamW([decayed, others], lr=0.1, betas=(0.8, 0.9), **settings)

    ours = jax.tree.map(jnp.asarray, params)
    opt_state, update = optimizer.init(ours), jax.jit(optimizer.update)
    for n in range(5):
        gradients = {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}
        updates, opt_state = update(gradients, opt_state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)
        for group in reference.param_groups:
            group["lr"] = 0.1 / (n + 1)
        for name, gradient in gradients.items():
            theirs[name].grad = torch.tensor(gradient)
        reference.step()
        for name in shapes:
            np.testing.assert_allclose(ours[name], theirs[name].detach(), rtol=1e-5, atol=1e-6)


def test_the_learning_rate_metric_is_that_of_the_update_done_and_waits_for_a_skipped_one():
    trainer = Regression(adamw(learning_rate_schedule("linear", 1.0, 4, 2)))
    state = trainer.create_train_state(jax.random.key(0))
    rates = []
    for n, batch in enumerate(regression_batches(5)):
        if n == 1:
            batch = batch | {"y": np.full(4, np.nan, np.float32)}
        state, metrics = trainer.train_step(state, batch)
        rates.append(float(metrics["learning_rate"]))
    assert rates == [0.0, 0.0, 0.5, 1.0, 0.5]
