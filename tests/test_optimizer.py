"""Optimizers and schedules against torch, transformers and loops in numpy, value by value."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import Regression, bits, regression_batches
from golden.trl_cases import write_tiny_llama
from rich.console import Console
from runs import additions

from relax.checkpoint.checkpointer import Checkpointer
from relax.config import SFTConfig, create_default_config
from relax.engine import TrainerEngine
from relax.engine.schedule import make_optimizer
from relax.errors import ConfigError
from relax.models import load_pretrained
from relax.optimizers import (
    OPTIMIZERS,
    adamw,
    eval_params,
    learning_rate_schedule,
)
from relax.optimizers.optimizers import _muon_or_adamw
from relax.trainers import SFTTrainer, Trainer, TrainState

KEY = jax.random.key(3)
FLOOR = 0.2


# Schedules.


def rates_of_transformers(name, total, warmup, **options):
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = get_scheduler(name, optimizer, warmup, total, options)
    for _ in range(total + 2):
        yield scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()


def assert_rates(schedule, expected):
    rates = [float(schedule(n)) for n in range(len(expected))]
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("total, warmup", [(12, 0), (12, 3), (5, 5), (1, 0)])
@pytest.mark.parametrize(
    "kind", ["linear", "cosine", "constant", "constant_with_warmup", "cosine_with_min_lr"]
)
def test_schedules_are_those_of_transformers(kind, total, warmup):
    options = {"min_lr_rate": FLOOR} if kind == "cosine_with_min_lr" else {}
    expected = list(rates_of_transformers(kind, total, warmup, **options))
    schedule = learning_rate_schedule(kind, 0.3, total, warmup, **options)
    assert_rates(schedule, expected[:total])


@pytest.mark.parametrize("floor", [0.0, FLOOR])
@pytest.mark.parametrize("total, warmup, decay", [(12, 0, 4), (12, 3, 4), (12, 3, 9), (1, 0, 1)])
def test_wsd_is_warmup_stable_decay_of_transformers(total, warmup, decay, floor):
    expected = list(
        rates_of_transformers(
            "warmup_stable_decay", total, warmup, num_decay_steps=decay, min_lr_ratio=floor
        )
    )
    schedule = learning_rate_schedule(
        "wsd", 0.3, total, warmup, num_decay_steps=decay, min_lr_rate=floor
    )
    assert_rates(schedule, expected)


def test_wsd_by_hand():
    schedule = learning_rate_schedule("wsd", 1.0, 9, 2, num_decay_steps=4, min_lr_rate=0.5)
    half = np.sqrt(0.5)
    decay = [1, 0.75 + half / 4, 0.75, 0.75 - half / 4, 0.5, 0.5]
    assert_rates(schedule, [0.5, 0.75, 1, 1, 1, *decay])


def test_an_unknown_schedule_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="'cosin'.*linear, cosine, constant.*wsd"):
        learning_rate_schedule("cosin", 1.0, 10)


def test_phases_of_wsd_that_are_longer_than_the_run_are_refused():
    with pytest.raises(ConfigError, match=r"must fit into the run, got 6 \+ 5 of 10 updates"):
        learning_rate_schedule("wsd", 1.0, 10, 6, num_decay_steps=5)


# Updates.

SHAPES = {
    "kernel": (3, 4),
    "tall": (6, 3),
    "experts": (2, 3, 4),
    "bias": (4,),
    "scale": (4,),
    "embed_tokens": (5, 3),
    "lm_head": (5, 3),
}
DECAY = 0.3
RATES = [0.0, 0.05, 0.1, 0.1, 0.07]  # warm-up begins at 0


def rate(n):
    return jnp.asarray(RATES)[n]


def numbers(shapes, count):
    """`count` dicts of normal numbers, float32."""
    rng = np.random.default_rng(0)
    return [
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def updates(optimizer, params, gradients):
    """The parameters and the optimizer's state after each update."""
    params = jax.tree.map(jnp.asarray, params)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient in gradients:
        changes, state = update(gradient, state, params)
        params = optax.apply_updates(params, changes)
        yield params, state


def adam_reference(name, p, gradients, b1=0.8, b2=0.9, eps=1e-6):
    m = v = 0.0
    decay = DECAY if p.ndim > 1 else 0.0
    for t, (lr, g) in enumerate(zip(RATES, gradients, strict=True), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        step = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        p = p - lr * (step + decay * p)
        yield p, p


def lion_reference(name, p, gradients, b1=0.8, b2=0.9):
    m = 0.0
    decay = DECAY if p.ndim > 1 else 0.0
    for lr, g in zip(RATES, gradients, strict=True):
        p = p - lr * (np.sign(b1 * m + (1 - b1) * g) + decay * p)
        m = b2 * m + (1 - b2) * g
        yield p, p


def adafactor_reference(name, p, gradients):
    rows = columns = v = 0.0
    decay = DECAY if p.ndim > 1 else 0.0
    for t, (lr, g) in enumerate(zip(RATES, gradients, strict=True), 1):
        kept = 1 - t**-0.8
        if min(p.shape) >= 128:
            rows = kept * rows + (1 - kept) * (g**2 + 1e-30).sum(axis=1)
            columns = kept * columns + (1 - kept) * (g**2 + 1e-30).sum(axis=0)
            v = np.outer(rows, columns) / rows.sum()
        else:
            v = kept * v + (1 - kept) * (g**2 + 1e-30)
        step = g / np.sqrt(v)
        step = step / max(1.0, np.sqrt((step**2).mean()))
        p = p - lr * (step + decay * p)
        yield p, p


def orthogonal(matrix):
    """Five Newton-Schulz steps, in float64 and without turning tall matrices over."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.775 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def muon_reference(name, p, gradients):
    if name in ("embed_tokens", "lm_head", "bias", "scale"):
        yield from adam_reference(name, p, gradients)
        return
    m, beta = 0.0, 0.95
    for t, (lr, g) in enumerate(zip(RATES, gradients, strict=True), 1):
        m = beta * m + (1 - beta) * g
        ahead = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        matrices = ahead.reshape(-1, *p.shape[-2:])
        step = np.stack([orthogonal(matrix) for matrix in matrices]).reshape(p.shape)
        p = p - lr * (0.2 * np.sqrt(max(p.shape[-2:])) * step + DECAY * p)
        yield p, p


def schedule_free_reference(name, p, gradients, b1=0.8, b2=0.9, eps=1e-6):
    x = y = z = p
    v = total = highest = 0.0
    decay = DECAY if p.ndim > 1 else 0.0
    for t, (lr, g) in enumerate(zip(RATES, gradients, strict=True), 1):
        v = b2 * v + (1 - b2) * g**2
        z = z - lr * (g / (np.sqrt(v / (1 - b2**t)) + eps) + decay * y)
        highest = max(highest, lr)
        total += highest**2
        c = highest**2 / total if total else 0.0
        x = (1 - c) * x + c * z
        y = b1 * x + (1 - b1) * z
        yield y, x


ADAM = {"b1": 0.8, "b2": 0.9, "eps": 1e-6}
REFERENCES = {
    "adamw": (adam_reference, SHAPES, ADAM),
    "adamw_8bit": (adam_reference, SHAPES, ADAM),  # small arrays, whose moments are float32
    "lion": (lion_reference, SHAPES, {"b1": 0.8, "b2": 0.9}),
    "adafactor": (adafactor_reference, SHAPES | {"large": (130, 140)}, {}),
    "muon": (muon_reference, SHAPES, ADAM),
    "schedule_free_adamw": (schedule_free_reference, SHAPES, ADAM),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_updates_are_those_of_the_papers_equations(name):
    """Trained and evaluated parameters; matrices decay, norms and biases do not."""
    reference, shapes, settings = REFERENCES[name]
    params, *gradients = numbers(shapes, 1 + len(RATES))
    optimizer = OPTIMIZERS[name](rate, weight_decay=DECAY, **settings)
    expected = {
        leaf: reference(leaf, np.float64(params[leaf]), [np.float64(g[leaf]) for g in gradients])
        for leaf in shapes
    }
    for found, state in updates(optimizer, params, gradients):
        averaged = eval_params(state, found)
        for leaf in shapes:
            trained, evaluated = next(expected[leaf])
            np.testing.assert_allclose(found[leaf], trained, rtol=1e-5, atol=1e-5, err_msg=leaf)
            np.testing.assert_allclose(averaged[leaf], evaluated, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_updates_are_those_of_torch_and_transformers(name):
    torch = pytest.importorskip("torch")
    from transformers import Adafactor

    shapes = SHAPES | {"large": (130, 140)} if name == "adafactor" else SHAPES
    # transformers' Adafactor factors small matrices too, which is another estimate.
    shapes = {n: s for n, s in shapes.items() if name != "adafactor" or n in ("large", "bias")}
    params, *gradients = numbers(shapes, 1 + len(RATES))
    theirs = {n: torch.nn.Parameter(torch.tensor(value)) for n, value in params.items()}
    groups = [
        {"params": [p for p in theirs.values() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in theirs.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    reference = {
        "adamw": lambda: torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-6),
        "sgd": lambda: torch.optim.SGD(groups),
        # As the Trainer of transformers makes it.
        "adafactor": lambda: Adafactor(groups, lr=1.0, scale_parameter=False, relative_step=False),
    }[name]()
    optimizer = OPTIMIZERS[name](rate, weight_decay=DECAY, **ADAM if name == "adamw" else {})
    for n, (found, _) in enumerate(updates(optimizer, params, gradients)):
        for group in reference.param_groups:
            group["lr"] = RATES[n]
        for leaf, value in gradients[n].items():
            theirs[leaf].grad = torch.tensor(value)
        reference.step()
        for leaf in shapes:
            np.testing.assert_allclose(found[leaf], theirs[leaf].detach(), rtol=1e-5, atol=1e-6)


def test_muon_steps_along_the_singular_vectors_of_the_first_gradient():
    """U S' Vᵀ with S' about 1, times 0.2 √max(rows, columns) and the learning rate."""
    params, gradient = numbers({"kernel": (6, 4), "experts": (2, 4, 6)}, 2)
    (found, _), *_ = updates(OPTIMIZERS["muon"](0.5), params, [gradient])
    for name, value in gradient.items():
        steps = (params[name] - np.asarray(found[name])) / (0.5 * 0.2 * np.sqrt(6))
        for step, matrix in zip(
            steps.reshape(-1, *value.shape[-2:]), value.reshape(-1, *value.shape[-2:]), strict=True
        ):
            u, _, vt = np.linalg.svd(matrix, full_matrices=False)
            singular = u.T @ step @ vt.T
            np.testing.assert_allclose(singular, np.diag(np.diag(singular)), atol=1e-5)
            assert (0.6 < np.diag(singular)).all() and (np.diag(singular) < 1.3).all()


def test_muon_has_linear_layers_and_experts_and_adamw_embeddings_heads_and_vectors():
    block = {"q_proj": {"kernel": 2, "bias": 1, "lora_a": 2}, "norm": {"scale": 1}}
    experts = {"router": 2, "gate_proj": 3, "gate_proj_bias": 2}
    heads = {"value_head": {"kernel": 2}, "score": {"kernel": 2}, "lm_head": 2}
    axes = {"layers_0": block | {"mlp": experts}, "embed_tokens": 2, "Embed_0": {"embedding": 2}}
    labels = _muon_or_adamw(jax.tree.map(lambda n: jnp.zeros([2] * n), axes | heads))
    assert labels.pop("layers_0") == {
        "q_proj": {"kernel": "muon", "bias": "adamw", "lora_a": "muon"},
        "norm": {"scale": "adamw"},
        "mlp": {"router": "muon", "gate_proj": "muon", "gate_proj_bias": "adamw"},
    }
    assert set(jax.tree.leaves(labels)) == {"adamw"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_matrices_lose_the_rate_times_the_decay_and_norms_and_biases_nothing(name):
    (params,) = numbers(SHAPES, 1)
    nothing = jax.tree.map(np.zeros_like, params)
    ((found, _),) = updates(OPTIMIZERS[name](0.5, weight_decay=0.1), params, [nothing])
    for leaf, value in params.items():
        expected = value * 0.95 if value.ndim > 1 else value
        np.testing.assert_allclose(found[leaf], expected, rtol=1e-6)
    biases = {"gate_proj_bias": jnp.ones((2, 3))}  # of two experts
    ((found, _),) = updates(OPTIMIZERS[name](0.5, weight_decay=0.1), biases, [biases])
    ((plain, _),) = updates(OPTIMIZERS[name](0.5), biases, [biases])
    np.testing.assert_array_equal(found["gate_proj_bias"], plain["gate_proj_bias"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_bfloat16_parameters_is_float32_and_so_is_the_learning_rate(name):
    params, gradient = numbers(SHAPES, 2)
    params, gradient = (optax.tree.cast(tree, jnp.bfloat16) for tree in (params, gradient))
    optimizer = OPTIMIZERS[name](lambda n: jnp.float32(1e-3) * (n + 1), weight_decay=0.1)
    before = optimizer.init(params)
    ((found, after),) = updates(optimizer, params, [gradient])
    assert {leaf.dtype for leaf in found.values()} == {jnp.dtype(jnp.bfloat16)}
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(after)}
    assert dtypes <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    kinds = [jax.tree.map(lambda leaf: leaf.dtype, state) for state in (before, after)]
    assert kinds[0] == kinds[1]
    assert float(after.hyperparams["learning_rate"]) == np.float32(1e-3)


def test_the_average_is_what_is_evaluated_and_other_optimizers_evaluate_their_parameters():
    state = optax.contrib.ScheduleFreeState(
        b1=jnp.float32(0.5), weight_sum=0, step_count=0, max_lr=0, base_optimizer_state=(),
        z={"w": jnp.float32(11)},
    )  # fmt: skip
    params = {"w": jnp.float32(7)}  # half of 11 and half of 3
    assert eval_params({"chained": (state,)}, params) == {"w": 3}
    half = {"w": jnp.bfloat16(7)}
    assert eval_params(state, half)["w"].dtype == jnp.bfloat16
    assert eval_params(adamw(0.1).init(params), params) is params

    class Telling(SFTTrainer):
        def _document_hits(self, params, frozen, batch):
            return params["w"], jnp.int32(10)

    state = TrainState(jnp.int32(0), params, state, KEY)
    assert Telling(None, None).exact_match(state, [{}]) == 0.3


# Runs.

STEPS = 24
# Flags that make each learn the table below in so many updates.
FLAGS = {
    "adamw": {"learning_rate": 0.1},
    "adamw_8bit": {"learning_rate": 0.1},
    "adafactor": {"learning_rate": 0.1, "lr_scheduler_type": "cosine"},
    "lion": {"learning_rate": 0.05, "lr_scheduler_type": "wsd", "num_decay_steps": 0.5},
    "muon": {
        "learning_rate": 0.1,
        "lr_scheduler_type": "cosine_with_min_lr",
        "min_lr_rate": FLOOR,
    },
    "sgd": {"learning_rate": 2.0, "lr_scheduler_type": "constant"},
    "schedule_free_adamw": {"learning_rate": 0.2, "lr_scheduler_type": "constant_with_warmup"},
}


class Table(Trainer):
    """The successor of each of six tokens, learnt by one hidden layer."""

    def create_train_state(self, key):
        keys = jax.random.split(key, 3)
        shapes = {"embed_tokens": (6, 8), "kernel": (8, 8), "lm_head": (6, 8)}
        params = {
            name: 0.3 * jax.random.normal(key, shape)
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        params |= {"bias": jnp.zeros(8), "scale": jnp.ones(8)}
        return TrainState.create(params=params, optimizer=self.optimizer, rng=key)

    def compute_loss(self, params, batch):
        x = params["embed_tokens"][batch["input_ids"]] * params["scale"][None, :]
        hidden = jnp.tanh(x @ params["kernel"] + params["bias"][None, :])
        logits = hidden @ params["lm_head"].T + batch["noise"][:, None]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


def batches(count=6):
    ids = np.arange(6, dtype=np.int32)
    batch = {"input_ids": ids, "labels": (5 * ids + 1) % 6, "noise": np.zeros(6, np.float32)}
    return [batch] * count


@pytest.fixture(scope="module", params=OPTIMIZERS)
def trainer(request):
    """A trainer with the optimizer that a command line makes."""
    warmup = {} if request.param == "sgd" else {"warmup_steps": 2}
    fields = FLAGS[request.param] | warmup | {"optim": request.param, "weight_decay": 0.01}
    config = SFTConfig().replace(**fields)
    config.validate()
    trainer = Table(None, make_optimizer(config, STEPS))
    trainer.config = config
    return trainer


def test_every_optim_and_schedule_lowers_the_loss_and_tells_its_learning_rate(trainer):
    state = trainer.create_train_state(KEY)
    h = trainer.config.hyperparams
    before = trainer.validate(state, batches(1))["loss"]
    rates = []
    for batch in batches(STEPS):
        state, metrics = trainer.train_step(state, batch)
        rates.append(float(metrics["learning_rate"]))
    assert trainer.validate(state, batches(1))["loss"] < 0.3 * before
    assert max(rates) == pytest.approx(h.learning_rate)
    assert rates[0] == (h.learning_rate if h.optim == "sgd" else 0)
    falls = not h.lr_scheduler_type.startswith("constant")
    assert (rates[-1] < 0.5 * max(rates)) == falls


def test_a_gradient_that_is_not_finite_leaves_every_bit_of_every_optimizer(trainer):
    state = trainer.create_train_state(KEY)
    for batch in batches(3):
        state, _ = trainer.train_step(state, batch)
    before = bits((state.params, state.opt_state, state.eval_params))
    noise = np.float32([0, 0, np.nan, 0, 0, 0])
    state, metrics = trainer.train_step(state, batches(1)[0] | {"noise": noise})
    assert metrics["skipped_steps"] == 1
    assert bits((state.params, state.opt_state, state.eval_params)) == before


def test_a_run_of_every_optimizer_resumes_from_its_checkpoint_to_the_same_bits(trainer, tmp_path):
    run = {"num_epochs": 2, "eval_loader": batches(1)}
    unbroken = trainer.train(batches(), key=KEY, **run)
    checkpointer = Checkpointer(tmp_path)
    trainer.train(batches(), key=KEY, checkpointer=checkpointer, max_steps=8, **run)
    template = jax.eval_shape(trainer.create_train_state, KEY)
    state, progress, step = checkpointer.restore(template)
    assert step == 8
    resumed = trainer.train(batches(), state=state, progress=progress, **run)
    assert bits(resumed) == bits(unbroken)
    assert bits(resumed.eval_params) == bits(unbroken.eval_params)


def test_validation_takes_the_average_of_a_schedule_free_run():
    trainer = Table(None, OPTIMIZERS["schedule_free_adamw"](0.2))
    state = trainer.train(batches(3), key=KEY)
    found = trainer.validate(state, batches(1))["loss"]
    averaged, raw = (
        float(trainer.compute_loss(params, batches(1)[0]))
        for params in (state.eval_params, state.params)
    )
    assert found == pytest.approx(averaged, rel=1e-6)
    assert found != pytest.approx(raw, rel=1e-2)


def test_the_saved_model_is_the_average_of_a_schedule_free_run(tmp_path):
    config = create_default_config(
        str(write_tiny_llama(tmp_path / "model")),
        output_dir=str(tmp_path / "run"),
        optim="schedule_free_adamw",
        lr_scheduler_type="constant",
        learning_rate=1e-2,
        max_steps=3,
        pad_to_multiple_of=64,
        save_strategy="no",
    )
    with open(tmp_path / "said.txt", "w") as file:
        result = TrainerEngine(console=Console(file=file)).run_job(config, additions(8))
    _, saved = load_pretrained(result.model_dir)
    jax.tree.map(np.testing.assert_array_equal, saved, result.state.eval_params)
    assert np.abs(saved["embed_tokens"] - result.state.params["embed_tokens"]).max() > 1e-4


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
