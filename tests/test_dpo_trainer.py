"""DPO's trainer: what a batch's loss is, what the reference is, how layouts and metrics agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import bits

from relax.data import PreferenceLoader
from relax.data.preference import Preference, Preferences
from relax.losses import PREFERENCE_LOSSES
from relax.models.config import LoRA
from relax.trainers import DPOTrainer

V = 23


def preferences(count=5, is_paired=True, seed=0) -> Preferences:
    rng = np.random.default_rng(seed)
    items = [
        Preference(*(rng.integers(1, V, n).astype(np.int32) for n in lengths), i % 2 == 0)
        for i, lengths in enumerate(rng.integers(1, 6, (count, 3)))
    ]
    return Preferences(items, is_paired)


def loader(batch_size=5, packs=False, **options) -> PreferenceLoader:
    length = 28 if packs else None
    return PreferenceLoader(
        preferences(**options),
        batch_size,
        shuffle=False,
        packed_length=length,
    )


def trainer(model, params, optimizer=None, **options) -> DPOTrainer:
    return DPOTrainer(model, optimizer or optax.sgd(0.3), params=params, **options)


@pytest.fixture(scope="module")
def other_params(tiny_params):
    """Weights of a policy that has moved away from `tiny_params`."""
    keys = iter(jax.random.split(jax.random.key(5), 100))
    return jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape, p.dtype), tiny_params
    )


def loss_of(trainer, params, frozen, batch):
    return trainer.eval_step(params, frozen, trainer.pack(batch, 1))


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, ids):
    return model.apply({"params": params}, ids)


def by_hand(model, params, prompt, answer):
    """Per token of the answer: log-probability, entropy, mean logit, and whether it is the top."""
    ids = np.zeros((1, 12), np.int32)
    length = len(prompt) + len(answer)
    ids[0, :length] = [*prompt, *answer]
    logits = np.float64(forward(model, params, ids))[0, len(prompt) - 1 : length - 1]
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    rows = np.arange(len(answer))
    entropy = -(np.exp(logprobs) * logprobs).sum(axis=1)
    return logprobs[rows, answer], entropy, logits.mean(axis=1), logits.argmax(axis=1) == answer


@pytest.fixture(scope="module")
def expected(tiny_model, tiny_params, other_params):
    """What TRL's definitions give, each answer by itself, in numpy."""
    data, beta = preferences(), 0.1
    tokens = {
        (name, who): [by_hand(tiny_model, p, i.prompt, getattr(i, name)) for i in data.items]
        for name in ("chosen", "rejected")
        for who, p in (("policy", other_params), ("reference", tiny_params))
    }
    sums = {key: np.array([parts[0].sum() for parts in rows]) for key, rows in tokens.items()}
    score = {n: sums[n, "policy"] - sums[n, "reference"] for n in ("chosen", "rejected")}
    margin = score["chosen"] - score["rejected"]
    policy = [parts for n in ("chosen", "rejected") for parts in tokens[n, "policy"]]
    out = {
        "loss": np.log1p(np.exp(-beta * margin)).mean(),
        "rewards/margins": beta * margin.mean(),
        "rewards/accuracies": (margin > 0).mean(),
        "entropy": np.concatenate([parts[1] for parts in policy]).mean(),
        "mean_token_accuracy": np.concatenate([p[3] for p in tokens["chosen", "policy"]]).mean(),
        "num_tokens": sum(2 * len(i.prompt) + len(i.chosen) + len(i.rejected) for i in data.items),
    }
    for n in ("chosen", "rejected"):
        out[f"rewards/{n}"] = beta * score[n].mean()
        out[f"logps/{n}"] = sums[n, "policy"].mean()
        out[f"logits/{n}"] = np.concatenate([p[2] for p in tokens[n, "policy"]]).mean()
    return out


@pytest.mark.parametrize("packs, rows, steps", [(False, 6, 3), (True, 5, 1)])
def test_loss_and_metrics_equal_each_answer_by_itself(
    packs, rows, steps, tiny_model, tiny_params, other_params, expected
):
    """In both layouts, with empty rows, in micro-batches."""
    dpo = trainer(tiny_model, other_params, ref_params=tiny_params, max_grad_norm=None)
    dpo.gradient_accumulation_steps = steps
    (batch,) = loader(rows, packs)
    _, metrics = dpo.train_step(dpo.create_train_state(jax.random.key(0)), dpo.pack(batch))
    assert set(expected) <= set(metrics)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


def test_the_loss_before_the_first_update_is_ln_2(tiny_model, tiny_params):
    dpo = trainer(tiny_model, tiny_params)
    _, metrics = dpo.train_step(dpo.create_train_state(jax.random.key(0)), *map(dpo.pack, loader()))
    assert abs(float(metrics["loss"]) - 0.6931471805599453) < 1e-6


def test_a_pair_of_equal_scores_is_wrong_and_a_row_without_a_pair_does_not_count(tiny_model):
    """Scores by hand: before the first update they are equal but for rounding."""
    scores = jnp.array([[1.5, 1.5], [2.0, 1.0], [-1.0, -1.0], [0.0, 3.0], [9.0, 0.0]])
    mask = jnp.array([True, True, True, True, False])
    metrics = trainer(tiny_model, None)._reward_metrics({}, scores, scores, mask)
    assert metrics["rewards/accuracies"] == 0.25


def test_micro_batches_and_layouts_make_the_same_update(tiny_model, tiny_params, other_params):
    """With the sft loss, whose mean is over the tokens of the whole update."""
    states = {}
    for packs, steps in ((False, 1), (True, 3)):
        dpo = trainer(
            tiny_model,
            other_params,
            ref_params=tiny_params,
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, 0.5],
            gradient_accumulation_steps=steps,
        )
        state = dpo.create_train_state(jax.random.key(0))
        states[packs, steps], metrics = dpo.train_step(state, *map(dpo.pack, loader(6, packs)))
    first = states.pop((False, 1)).params
    for key, state in states.items():
        for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(state.params), strict=True):
            np.testing.assert_allclose(one, other, atol=2e-6, err_msg=str(key))


def test_losses_are_added_with_their_weights(tiny_model, tiny_params, other_params, expected):
    (batch,) = loader()
    dpo = trainer(
        tiny_model,
        None,
        ref_params=tiny_params,
        loss_type=["sigmoid", "sft"],
        loss_weights=[0.7, 2.0],
    )
    out = loss_of(dpo, other_params, {"ref": tiny_params}, batch)
    items = preferences().items
    sft = -np.concatenate(
        [by_hand(tiny_model, other_params, i.prompt, i.chosen)[0] for i in items]
    ).mean()
    np.testing.assert_allclose(out.metrics["loss/sft"], sft, rtol=1e-5)
    np.testing.assert_allclose(out.loss, 0.7 * expected["loss"] + 2 * sft, rtol=1e-5)


def test_what_stands_in_padding_changes_nothing(tiny_model, tiny_params, other_params):
    dpo = trainer(tiny_model, None, ref_params=tiny_params)
    (batch,) = loader(6)
    dirty = {name: np.copy(value) for name, value in batch.items()}
    places = np.arange(dirty["completion_ids"].shape[2])
    dirty["completion_ids"][places >= dirty["completion_lengths"][..., None]] = 7
    places = np.arange(dirty["prompt_ids"].shape[1])
    dirty["prompt_ids"][places >= dirty["prompt_lengths"][:, None]] = 9
    frozen = {"ref": tiny_params}
    slope = jax.jit(jax.grad(lambda p, batch: dpo.compute_loss(p, batch, frozen=frozen).loss))
    clean, dirty = dpo.pack(batch), dpo.pack(dirty)
    assert bits(slope(other_params, clean)) == bits(slope(other_params, dirty))


def test_precomputed_numbers_give_the_same_loss_without_a_reference(
    tiny_model, tiny_params, other_params
):
    dpo = trainer(tiny_model, None, ref_params=tiny_params)
    data = loader(6)
    (batch,) = data
    found = dpo.answer_logprobs(tiny_params, batch)
    data.ref_logprobs = found[batch["index"] >= 0]
    without = trainer(tiny_model, other_params, precomputed=True)
    state = without.create_train_state(jax.random.key(0))
    assert state.frozen == {}
    expected = loss_of(dpo, other_params, {"ref": tiny_params}, batch).loss
    np.testing.assert_allclose(loss_of(without, state.params, {}, *data).loss, expected, rtol=1e-6)


def test_without_adapters_a_lora_model_is_the_reference(tiny_model, tiny_params):
    model = tiny_model.clone(lora=LoRA(2, 4, 0.0, ("q_proj", "v_proj")))
    dpo = trainer(model, tiny_params)
    state = dpo.create_train_state(jax.random.key(0))
    assert set(state.frozen) == {"base"}
    before = bits(state.frozen)
    losses = []
    for _ in range(3):
        state, metrics = dpo.train_step(state, *map(dpo.pack, loader()))
        losses.append(float(metrics["loss"]))
    assert abs(losses[0] - np.log(2)) < 1e-6 and losses[2] < losses[1] < losses[0]
    assert bits(state.frozen) == before


def test_the_reference_moves_as_often_and_as_far_as_asked(tiny_model, tiny_params):
    moving = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.25, "ref_model_sync_steps": 2}
    dpo = trainer(tiny_model, tiny_params, **moving)
    state = dpo.create_train_state(jax.random.key(0))
    start = jax.tree.map(np.array, state.frozen["ref"])
    state, _ = dpo.train_step(state, *map(dpo.pack, loader()))
    assert bits(state.frozen["ref"]) == bits(start)
    state, _ = dpo.train_step(state, *map(dpo.pack, loader()))
    leaves = map(jax.tree.leaves, (start, state.frozen["ref"], state.params))
    for old, new, policy in zip(*leaves, strict=True):
        np.testing.assert_allclose(new, 0.25 * policy + 0.75 * old, atol=1e-6)


def test_losses_without_a_reference_hold_none_and_learn(tiny_model, tiny_params):
    dpo = trainer(tiny_model, tiny_params, loss_type=["simpo", "orpo"], beta=1.0)
    state = dpo.create_train_state(jax.random.key(0))
    assert not jax.tree.leaves(state.frozen)
    state, before = dpo.train_step(state, *map(dpo.pack, loader()))
    state, after = dpo.train_step(state, *map(dpo.pack, loader()))
    for name in ("loss/simpo", "loss/orpo"):
        assert after[name] < before[name]
    assert after["rewards/margins"] > before["rewards/margins"]


def test_kto_raises_good_answers_and_lowers_bad_ones(tiny_model, tiny_params):
    dpo = trainer(tiny_model, tiny_params, loss_type="kto")
    state = dpo.create_train_state(jax.random.key(0))
    (batch,) = loader(6, is_paired=False)
    state, first = dpo.train_step(state, dpo.pack(batch))
    # σ(0) of every answer, good or bad, and no distance from the reference yet.
    np.testing.assert_allclose([first["loss"], first["kl"]], [0.5, 0.0], atol=1e-6)
    for _ in range(10):
        state, metrics = dpo.train_step(state, dpo.pack(batch))
    assert metrics["loss"] < 0.5
    assert metrics["rewards/chosen"] > 0 > metrics["rewards/rejected"]


def test_kto_compares_with_the_answers_of_other_rows(tiny_model, tiny_params, other_params):
    dpo = trainer(tiny_model, None, ref_params=tiny_params, loss_type="kto", desirable_weight=2.0)
    (batch,) = loader(6, is_paired=False)
    out = loss_of(dpo, other_params, {"ref": tiny_params}, batch)
    items = preferences(is_paired=False).items
    own, partner = (
        np.array(
            [
                by_hand(tiny_model, other_params, i.prompt, getattr(i, n))[0].sum()
                - by_hand(tiny_model, tiny_params, i.prompt, getattr(i, n))[0].sum()
                for i in items
            ]
        )
        for n in ("chosen", "rejected")
    )
    z = max(partner.mean(), 0.0)
    good = np.array([i.is_desirable for i in items])
    sign = np.where(good, -1, 1)
    losses = np.where(good, 2.0, 1.0) / (1 + np.exp(-0.1 * sign * (own - z)))
    np.testing.assert_allclose(out.loss, losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(out.metrics["kl"], z, rtol=1e-4)
    np.testing.assert_allclose(
        out.metrics["rewards/chosen"].value, 0.1 * own[good].mean(), rtol=1e-4
    )


def test_training_from_python_teaches_the_pairs(tiny_model, tiny_params):
    data = loader(5)
    dpo = DPOTrainer(tiny_model, optax.adam(1e-2), ref_params=tiny_params, beta=0.5)
    state = dpo.train(data, num_epochs=20, key=jax.random.key(0))
    metrics = dpo.validate(state, data)
    assert metrics["rewards/accuracies"] == 1 and metrics["loss"] < 0.3
    assert bits(state.frozen["ref"]) == bits(tiny_params)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"loss_type": "dpo"}, "unknown loss_type 'dpo'. Known: sigmoid"),
        ({"loss_type": ["kto", "sft"]}, "or kto alone"),
        ({"loss_weights": [1.0, 2.0]}, "one per loss_type, got 2 for 1"),
        ({"loss_type": "exo_pair"}, "above 0 for exo_pair"),
        ({"label_smoothing": 0.5}, r"label_smoothing in \[0, 0.5\)"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"loss_type": "simpo", "ref_params": {}}, "ref_params has no effect"),
        ({"precomputed": True, "sync_ref_model": True}, "a reference with its own weights"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, reason, tiny_model):
    with pytest.raises(ValueError, match=reason):
        DPOTrainer(tiny_model, optax.sgd(1.0), **options)


def test_every_loss_gives_a_finite_gradient_though_rows_are_empty(tiny_model, tiny_params):
    dpo = trainer(tiny_model, tiny_params, loss_type=list(PREFERENCE_LOSSES), label_smoothing=0.1)
    batch = dpo.pack(dict(next(iter(loader(6))), ref_logprobs=np.full((6, 2), -3, np.float32)))
    slope = jax.jit(jax.grad(lambda p: dpo.compute_loss(p, batch, frozen={}).loss))(tiny_params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo", "sft"])
def test_a_pair_without_a_prompt_is_trained_on_from_its_second_tokens_as_in_sft(
    loss_type, tiny_model, tiny_params, other_params
):
    """Its prompt has merged into the completions: the first token of each has no context."""
    pairs = [([3, 4], [5, 6], [7]), ([], [8, 9, 10], [11, 12]), ([13], [14], [15, 16])]
    items = [Preference(*(np.array(part, np.int32) for part in pair)) for pair in pairs]
    data = PreferenceLoader(Preferences(items, True), 3, shuffle=False)
    (batch,) = data
    ref = tiny_params if loss_type == "sigmoid" else None
    dpo = trainer(tiny_model, other_params, loss_type=loss_type, ref_params=ref)

    def logprob(params, prompt, completion) -> tuple[float, int]:
        prompt, completion = (prompt, completion) if prompt else (completion[:1], completion[1:])
        values = by_hand(tiny_model, params, prompt, completion)[0]
        return values.sum(), len(values)

    wanted = np.array([[logprob(other_params, p, c) for c in both] for p, *both in pairs])
    sums, counts = wanted[:, :, 0], wanted[:, :, 1]
    np.testing.assert_allclose(dpo.answer_logprobs(other_params, batch), sums, rtol=1e-5)
    if loss_type == "sigmoid":
        refs = np.array([[logprob(tiny_params, p, c)[0] for c in both] for p, *both in pairs])
        expected = np.log1p(np.exp(-0.1 * np.subtract(*(sums - refs).T))).mean()
    elif loss_type == "simpo":
        expected = np.log1p(np.exp(-(0.1 * np.subtract(*(sums / counts).T) - 0.5))).mean()
    else:
        expected = -sums[:, 0].sum() / counts[:, 0].sum()
    out = loss_of(dpo, other_params, {"ref": tiny_params} if ref else {}, batch)
    np.testing.assert_allclose(out.loss, expected, rtol=1e-5)
    assert float(out.metrics["entropy"].weight) == counts.sum()
