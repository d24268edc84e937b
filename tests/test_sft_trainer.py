"""Supervised fine-tuning: the dense loss, its weights, what is not trained, greedy exact match."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import bits, packed_batch

from relax.data import DataLoader, Encoded
from relax.models.forward import neftune_noise
from relax.optimizers import adamw, learning_rate_schedule
from relax.trainers import SFTTrainer

KEY = jax.random.key(1)
EOS = 22
# Rows of documents, (prompt, completion) each, of very unequal numbers of trained tokens.
ROWS = [
    [([1, 2, 3, 4], [5]), ([6, 7], [8, 9, 10])],
    [([3], [4, 5, 6, 7, 8, 9, 10, 11, EOS])],
    [([11, 12, 13], [14, EOS])],
    [([2, 4, 6, 8], [10, 12])],
]


def trainer_of(model, params, optimizer=None, **options):
    return SFTTrainer(model, optimizer or optax.sgd(1.0), params=params, **options)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, input_ids, positions=None, segment_ids=None):
    return model.apply({"params": params}, input_ids, positions, segment_ids)


def dense(model, params, batch):
    """Loss, metrics and token count in float64 from whole logits, with a loop over tokens."""
    inputs = [batch[name] for name in ("input_ids", "positions", "segment_ids")]
    logits = np.asarray(logits_of(model, params, *inputs), np.float64)
    nll, hits, entropy = [], [], []
    for row, labels in enumerate(batch["labels"]):
        for t, label in enumerate(labels[1:]):
            if label != -100:
                p = np.exp(logits[row, t] - logits[row, t].max())
                p /= p.sum()
                nll.append(-np.log(p[label]))
                hits.append(p.argmax() == label)
                entropy.append(-(p * np.log(p)).sum())
    return {
        "loss": np.mean(nll),
        "mean_token_accuracy": np.mean(hits),
        "entropy": np.mean(entropy),
        "num_tokens": (batch["segment_ids"] > 0).sum(),
    }, len(nll)


def dense_loss(model, params, batch):
    """The loss again, as jax differentiates it: whole logits, no chunks, no custom gradient."""
    inputs = [batch[name] for name in ("input_ids", "positions", "segment_ids")]
    logits = logits_of(model, params, *inputs)
    targets = batch["labels"][:, 1:]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], jnp.maximum(targets, 0))
    return jnp.where(targets == -100, 0, nll).sum() / (targets != -100).sum()


def assert_close(tree, expected, atol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), tree, expected
    )


def test_loss_and_metrics_are_the_dense_ones_over_trained_tokens(tiny_model, tiny_params):
    batch = packed_batch(ROWS, 12)
    expected, tokens = dense(tiny_model, tiny_params, batch)
    assert tokens == 4 + 9 + 2 + 2
    for chunk_size in (256, 5):
        trainer = trainer_of(tiny_model, tiny_params, loss_chunk_size=chunk_size)
        state = trainer.create_train_state(KEY)
        metrics = trainer.validate(state, [batch])
        assert metrics == pytest.approx(expected, rel=1e-5)
        assert trainer.eval_step(tiny_params, {}, batch).weight == tokens


def test_three_updates_are_those_of_the_dense_gradient_however_the_batch_is_cut(
    tiny_model, tiny_params
):
    batches = [packed_batch(ROWS[i:] + ROWS[:i], 12) for i in range(3)]
    optimizer = adamw(lambda n: 1e-2 / (n + 1), weight_decay=0.1)
    params, opt_state = tiny_params, optimizer.init(tiny_params)
    gradient = jax.jit(jax.value_and_grad(lambda p, b: dense_loss(tiny_model, p, b)))
    losses = []
    for batch in batches:
        loss, gradients = gradient(params, batch)
        updates, opt_state = jax.jit(optimizer.update)(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    logged = {}
    for count in (1, 2, 4):
        trainer = trainer_of(tiny_model, tiny_params, optimizer, gradient_accumulation_steps=count)
        state, logged[count] = trainer.create_train_state(KEY), []
        for batch in batches:
            state, metrics = trainer.train_step(state, batch)
            logged[count].append({name: float(value) for name, value in metrics.items()})
        assert_close(state.params, params)
        assert [metrics["loss"] for metrics in logged[count]] == pytest.approx(losses, rel=1e-6)
    for one, two, four in zip(*logged.values(), strict=True):
        assert two == pytest.approx(one, rel=1e-5) and four == pytest.approx(one, rel=1e-5)


def test_a_micro_batch_without_a_trained_token_has_no_say(tiny_model, tiny_params):
    batch = packed_batch(ROWS[:1] + [[], [([1, 2, 3], [])], []], 12)
    one = trainer_of(tiny_model, tiny_params)
    four = trainer_of(tiny_model, tiny_params, gradient_accumulation_steps=4)
    state, metrics = four.train_step(four.create_train_state(KEY), batch)
    expected, of_one = one.train_step(one.create_train_state(KEY), batch)
    assert_close(state.params, expected.params)
    assert metrics["loss"] == pytest.approx(of_one["loss"]) and metrics["num_tokens"] == 13
    assert metrics["skipped_steps"] == 0


@pytest.mark.parametrize("count", [1, 4])
def test_a_batch_without_a_trained_token_has_a_zero_gradient(tiny_model, tiny_params, count):
    batch = packed_batch([[([1, 2, 3], [])], [], [], []], 12)
    trainer = trainer_of(tiny_model, tiny_params, gradient_accumulation_steps=count)
    state, metrics = trainer.train_step(trainer.create_train_state(KEY), batch)
    assert metrics["loss"] == metrics["grad_norm"] == metrics["skipped_steps"] == 0
    assert_close(state.params, tiny_params, atol=0)


def test_padding_and_what_it_holds_change_nothing(tiny_model, tiny_params):
    trainer = trainer_of(tiny_model, tiny_params)

    def updated(batch):
        state, metrics = trainer.train_step(trainer.create_train_state(KEY), batch)
        return state.params, metrics

    batch = packed_batch(ROWS, 12)
    params, metrics = updated(batch)
    other_ids = dict(batch, input_ids=np.where(batch["segment_ids"] > 0, batch["input_ids"], 17))
    for padded in (other_ids, packed_batch(ROWS, 16)):
        same, same_metrics = updated(padded)
        assert_close(same, params)
        assert_close(same_metrics, metrics)


def test_a_prompt_token_is_no_target_and_a_document_sees_itself_only(tiny_model, tiny_params):
    trainer = trainer_of(tiny_model, tiny_params)
    loss = jax.jit(lambda batch: trainer.compute_loss(tiny_params, batch).loss)
    prompt, completion = ([1, 2, 3], [4, 5])
    alone = loss(packed_batch([[(prompt, completion)]], 12))
    packed = loss(packed_batch([[([9, 8], []), (prompt, completion), ([7, 7, 7], [])]], 12))
    np.testing.assert_allclose(packed, alone, rtol=1e-6)


def test_positions_and_segments_may_be_left_out(tiny_model, tiny_params):
    trainer = trainer_of(tiny_model, tiny_params)
    full = packed_batch([[([1, 2], [3, 4, 5])], [([5], [6, 7, 8, 9])]], 5)
    bare = {name: full[name] for name in ("input_ids", "labels")}
    state = trainer.create_train_state(KEY)
    assert trainer.validate(state, [bare]) == pytest.approx(trainer.validate(state, [full]))


def test_given_params_are_copied_and_without_them_the_key_makes_them(tiny_model, tiny_params):
    before = bits(tiny_params)
    batch = packed_batch(ROWS, 12)
    trainer = trainer_of(tiny_model, tiny_params)
    first = trainer.train([batch], key=KEY)
    assert bits(tiny_params) == before  # not donated, not changed
    assert bits(trainer.train([batch], key=KEY)) == bits(first)
    fresh = SFTTrainer(tiny_model, optax.sgd(1.0))
    params = fresh.create_train_state(jax.random.key(0)).params
    assert bits(params) == before  # the fixture is made from the same key
    assert bits(fresh.create_train_state(jax.random.key(1)).params) != before


# What some models have besides.


def test_soft_capped_logits_are_those_of_the_loss_and_of_exact_match(tiny_model, tiny_params):
    """Against whole logits, which the model caps itself."""
    capped = tiny_model.clone(
        config=dataclasses.replace(tiny_model.config, final_logit_softcapping=0.5)
    )
    batch = packed_batch(ROWS, 12)
    expected, _ = dense(capped, tiny_params, batch)
    assert expected["loss"] != pytest.approx(dense(tiny_model, tiny_params, batch)[0]["loss"])
    trainer = trainer_of(capped, tiny_params)
    state = trainer.create_train_state(KEY)
    assert trainer.validate(state, [batch]) == pytest.approx(expected, rel=1e-5)


def test_routers_add_their_balancing_loss_and_log_it(tiny_model):
    config = dataclasses.replace(
        tiny_model.config,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        router_aux_loss_coef=0.3,
    )
    model, batch = tiny_model.clone(config=config), packed_batch(ROWS, 12)
    trainer = SFTTrainer(model, optax.sgd(1.0))
    state = trainer.create_train_state(KEY)
    expected, _ = dense(model, state.params, batch)
    inputs = [batch[name] for name in ("input_ids", "positions", "segment_ids")]
    apply = jax.jit(functools.partial(model.apply, method="hidden_states_and_aux_loss"))
    _, aux_loss = apply({"params": state.params}, *inputs)
    aux_loss = float(aux_loss)
    assert aux_loss > 1.5  # 2 where all experts get as many tokens
    expected |= {"aux_loss": aux_loss, "loss": expected["loss"] + 0.3 * aux_loss}
    assert trainer.validate(state, [batch]) == pytest.approx(expected, rel=1e-5)
    router = np.array(state.params["layers_0"]["experts"]["router"])
    state, metrics = trainer.train_step(state, batch)
    assert metrics["aux_loss"] == pytest.approx(expected["aux_loss"], rel=1e-5)
    assert (state.params["layers_0"]["experts"]["router"] != router).any()


# From the loader to answers.


def decode_greedily(model, params, prompt, most):
    """Token by token with the whole model, until the end token."""
    ids = list(prompt)
    for _ in range(most):
        padded = np.zeros((1, 8), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(logits_of(model, params, padded)[0, len(ids) - 1].argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


def test_a_model_learns_from_the_loader_and_exact_match_is_what_greedy_decoding_writes(
    tiny_model, tiny_params
):
    # "a b ->" is answered "b a"; half of the pairs are trained on, for a little while.
    rows = [([a, b, 20], [b, a, EOS]) for a in range(1, 7) for b in range(1, 7)]
    examples = [Encoded(p + c, [-100] * len(p) + c) for p, c in rows]
    every, some = DataLoader(examples, 20), DataLoader(examples[:18], 20)
    trainer = trainer_of(
        tiny_model, tiny_params, adamw(learning_rate_schedule("cosine", 3e-2, 40, 4))
    )
    state = trainer.create_train_state(KEY)
    before = trainer.validate(state, some)
    state = trainer.train(some, num_epochs=40, state=state)
    after = trainer.validate(state, some)
    assert after["loss"] < 0.5 * before["loss"]
    assert after["mean_token_accuracy"] > before["mean_token_accuracy"]

    right = sum(decode_greedily(tiny_model, state.params, p, 3) == c for p, c in rows)
    assert 3 < right < 33, "the test wants both right and wrong answers"
    assert trainer.exact_match(state, every) == right / 36  # the last batch has empty rows
    assert trainer.exact_match(state, []) == 0

    packed = DataLoader(examples, 12, packing="bfd", max_length=18)
    assert trainer.validate(state, packed) == pytest.approx(
        trainer.validate(state, every), rel=1e-5
    )


def test_noise_on_embeddings_follows_the_length_of_each_document():
    """By hand: ±6 / sqrt(L D) with L of 3 and 1 tokens of one row, and 6 of the other; D is 64."""
    segments = jnp.array([[1, 1, 1, 2, 0, 0], [1] * 6])
    noise = np.abs(neftune_noise(KEY, (2, 6, 64), segments, 6.0))
    bounds = 6 / np.sqrt(np.array([[3, 3, 3, 1, 2, 2], [6] * 6]) * 64)
    assert (noise <= bounds[:, :, None]).all()
    assert (noise.max(axis=2) > 0.8 * bounds).all()
    whole = np.abs(neftune_noise(KEY, (2, 6, 64), None, 6.0))
    np.testing.assert_array_equal(whole[1], noise[1])


def test_noise_is_of_training_alone_and_of_the_key(tiny_model, tiny_params):
    options = {"neftune_noise_alpha": 5.0, "label_smoothing_factor": 0.1, "z_loss_coef": 0.01}
    trainer = trainer_of(tiny_model, tiny_params, **options)
    batch = packed_batch(ROWS, 16)
    loss_of = jax.jit(lambda key: trainer.compute_loss(tiny_params, batch, rng=key).loss)
    found = [float(loss_of(key)) for key in (KEY, KEY, jax.random.key(2))]
    calm = trainer.eval_step(tiny_params, {}, batch)
    assert found[0] == found[1] and len({*found, float(calm.loss)}) == 3
    nll = dense(tiny_model, tiny_params, batch)[0]["loss"]
    np.testing.assert_allclose(calm.metrics["nll"], nll, rtol=1e-5)
    with pytest.raises(ValueError, match="smooths the targets of loss_type nll, got loss_type"):
        trainer_of(tiny_model, tiny_params, loss_type="dft", label_smoothing_factor=0.1)
