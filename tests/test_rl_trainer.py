"""From prompts to experience: keys, rewards, metrics, evaluation, log-probabilities."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from families import tiny_family
from rl import EOS, TABLE, Letters, TableTrainer, items_of, rollout_of

from relax.callbacks import MetricsLog
from relax.models.config import LoRA
from relax.rewards import RewardRunner
from relax.sampling import SamplingConfig
from relax.trainers import GRPOTrainer
from relax.trainers.rl_trainer import EVALUATION, ORDER, RESAMPLING, ROLLOUT

KEY = jax.random.key(3)


def first(trainer, state=None, item=None):
    """What the first batch of an item comes with."""
    state = state or trainer.create_train_state(KEY)
    return next(iter(trainer.make_batches(state, item or items_of(1)[0])))


# Randomness.


def test_a_state_and_an_item_decide_the_completions_and_another_update_draws_others():
    trainer, item = TableTrainer(), items_of(1)[0]
    state = trainer.create_train_state(KEY)
    texts = [
        [record["completion"] for record in first(TableTrainer(), s, item).records]
        for s in (state, state, state.replace(step=jnp.int32(1)))
    ]
    assert texts[0] == texts[1] != texts[2]
    other = trainer.create_train_state(jax.random.key(4))
    assert texts[0] != [record["completion"] for record in first(trainer, other, item).records]


def test_no_update_has_the_number_of_a_stream():
    """`train_step` folds the update's number into the root key, and others fold in theirs first."""
    streams = [int(s) for s in (ROLLOUT, EVALUATION, ORDER, RESAMPLING)]
    assert len(set(streams)) == 4 and min(streams) > np.iinfo(np.int32).max
    keys = [jax.random.fold_in(KEY, s) for s in (ROLLOUT, EVALUATION, ORDER, RESAMPLING)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 4


def test_every_evaluation_draws_with_the_same_keys():
    trainer, items = TableTrainer(), items_of(2)
    state = trainer.create_train_state(KEY)
    once = trainer.validate(state, items)
    assert once == trainer.validate(state.replace(step=jnp.int32(9)), items)
    assert once != trainer.validate(state, items, max_batches=1)


# Rewards.


def test_the_logged_reward_is_the_weighted_sum():
    functions = [lambda completions, r=r: [r] * len(completions) for r in (1.0, 0.0)]
    trainer = TableTrainer(reward_funcs=functions, reward_weights=[0.7, 0.3])
    metrics = first(trainer).metrics
    assert metrics["reward"] == pytest.approx(0.7)
    assert metrics["rewards/lambda/mean"] == 1.0 and metrics["rewards/lambda_2/mean"] == 0.0


def test_reward_statistics_equal_hand_counted_ones():
    rewards = iter([1.0, 2.0, 3.0, None, 5.0, 5.0, 5.0, 5.0])
    trainer = TableTrainer(reward_funcs=[lambda completions: [next(rewards) for _ in completions]])
    with pytest.warns(UserWarning, match="1 of 8 completions have no reward from any function"):
        metrics = first(trainer).metrics
    assert metrics["reward"] == pytest.approx(26 / 7)
    assert metrics["reward_std"] == pytest.approx(np.std([1, 2, 3, 5, 5, 5, 5], ddof=1))
    assert metrics["reward_group_std"] == pytest.approx((1 + 0) / 2)
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["rewards/lambda/std"] == metrics["reward_std"]


def test_when_no_function_applies_the_run_goes_on_and_says_so():
    trainer = TableTrainer(reward_funcs=[lambda completions: [None] * len(completions)])
    with pytest.warns(UserWarning, match="8 of 8 completions have no reward"):
        state = trainer.train(items_of(1), key=KEY)
    assert int(state.step) == 1
    np.testing.assert_array_equal(state.params["table"], TABLE)
    with pytest.warns(UserWarning):
        given = first(trainer)
    assert "reward" not in given.metrics and given.metrics["frac_reward_zero_std"] == 1.0
    assert all(
        record["advantage"] == 0 and math.isnan(record["reward"]) for record in given.records
    )


def test_a_failure_is_counted_and_shown_with_function_prompt_and_completion():
    def breaks(completions):
        raise ZeroDivisionError("by nought")

    runner = RewardRunner([breaks], max_errors=1.0)
    trainer = TableTrainer(reward_funcs=runner)
    with pytest.warns(UserWarning) as caught:
        given = first(trainer)
    said = str(caught[0].message)
    assert "reward functions failed on 8 of 8 completions" in said
    assert "'breaks'" in said and "by nought" in said and "'00'" in said
    assert given.metrics["reward_errors"] == 8
    with pytest.warns(UserWarning):
        assert trainer.validate(trainer.create_train_state(KEY), items_of(2))["reward_errors"] == 16


def test_columns_messages_and_ids_reach_the_functions():
    seen = {}

    def spy(prompts, completions, completion_ids, answer, trainer_state):
        seen.update(locals())
        return [0.0] * len(prompts)

    item = items_of(1, answer="7")[0]
    item["rows"][1] = {"prompt": [{"role": "user", "content": "?"}]}
    first(TableTrainer(reward_funcs=[spy]), item=item)
    assert seen["answer"] == ["7"] * 4 + [None] * 4
    assert seen["trainer_state"].global_step == 0
    assert isinstance(seen["completions"][0], str)
    (message,) = seen["completions"][4]
    assert message["role"] == "assistant"
    decoded = [Letters().decode(ids) for ids in seen["completion_ids"]]
    assert decoded == seen["completions"][:4] + [c[0]["content"] for c in seen["completions"][4:]]


def test_a_runner_has_its_weights_and_takes_no_others():
    runner = RewardRunner([lambda completions: [0.0] * len(completions)])
    with pytest.raises(ValueError, match="remove reward_weights"):
        TableTrainer(reward_funcs=runner, reward_weights=[0.5])


def test_the_end_token_of_the_tokenizer_ends_completions_in_training_and_evaluation():
    trainer = TableTrainer(eval_sampling=SamplingConfig(temperature=0.0))
    assert trainer.sampling.eos_token_ids == trainer.eval_sampling.eos_token_ids == (EOS,)
    own = SamplingConfig(eos_token_ids=(3,))
    trainer = TableTrainer(sampling=own)
    assert trainer.sampling.eos_token_ids == trainer.eval_sampling.eos_token_ids == (3,)


# Evaluation.


def test_pass_at_k_equals_hand_counted_values():
    """Three prompts of two completions: both pass, one passes, none does (one has no reward)."""
    rewards = iter([1.0, 1.0, 0.0, 0.9, None, 0.3])

    class Scripted(TableTrainer):
        def generate(self, state, item, key, sampling=None):
            P = len(item["rows"])
            return rollout_of(np.ones((P, 2, 3)), [[3, 2]] * P, item["rows"])

    trainer = Scripted(
        reward_funcs=[lambda completions: [next(rewards) for _ in completions]], pass_reward=0.9
    )
    items = [items_of(1)[0], items_of(1, prompts=1)[0]]
    with pytest.warns(UserWarning, match="no reward"):
        metrics = trainer.validate(trainer.create_train_state(KEY), items)
    assert metrics["pass@1"] == pytest.approx(3 / 6)
    assert metrics["pass@2"] == pytest.approx(2 / 3)
    assert metrics["reward"] == pytest.approx(3.2 / 5)
    assert metrics["completions/mean_length"] == pytest.approx(2.5)


def test_evaluation_draws_as_asked_and_changes_nothing():
    asked = SamplingConfig(max_new_tokens=3, n=5)
    trainer = TableTrainer(eval_sampling=asked)
    state = trainer.create_train_state(KEY)
    metrics = trainer.validate(state, items_of(2))
    assert "pass@5" in metrics and metrics["completions/mean_length"] <= 3
    np.testing.assert_array_equal(state.params["table"], TABLE)
    with pytest.raises(ValueError, match="gave no batch"):
        trainer.validate(state, [])


def test_held_out_completions_are_judged_while_the_next_are_drawn(monkeypatch):
    events = []

    class Watched(TableTrainer):
        def generate(self, *args, **options):
            events.append("draw")
            return super().generate(*args, **options)

    trainer = Watched()
    submit = trainer.rewards.submit

    def watched(*args, **options):
        events.append("submit")
        pending = submit(*args, **options)
        result = pending.result
        pending.result = lambda: (events.append("wait"), result())[1]
        return pending

    monkeypatch.setattr(trainer.rewards, "submit", watched)
    trainer.validate(trainer.create_train_state(KEY), items_of(2))
    assert events == ["draw", "submit", "draw", "submit", "wait", "wait"]


# What is logged.


def logged(tmp_path, name, items, **options):
    log = MetricsLog(tmp_path / f"{name}.jsonl", logging_steps=2)
    trainer = TableTrainer(callbacks=[log], **options)
    trainer.train(items, key=KEY)
    return [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]


def test_metrics_are_those_of_trl_the_same_in_every_run_and_times_add_up(tmp_path):
    runs = [
        logged(tmp_path, name, items_of(2), num_iterations=2, beta=0.1, max_resample_rounds=1)
        for name in "ab"
    ]
    phases = ("rollout", "reward", "reference", "update", "other")
    for record in runs[0]:
        split = [record[f"time/{phase}"] for phase in phases]
        assert min(split) >= 0
        assert sum(split) == pytest.approx(record["step_time"], rel=1e-9)
    clock = {f"time/{phase}" for phase in phases} | {"step_time", "elapsed_s", "tokens_per_second"}
    plain = [[{k: v for k, v in r.items() if k not in clock} for r in run] for run in runs]
    assert plain[0] == plain[1]
    assert set(plain[0][0]) == {
        "step", "epoch", "loss", "grad_norm", "skipped_steps", "num_tokens", "entropy", "kl",
        "reward", "reward_drawn", "reward_std", "reward_group_std", "frac_reward_zero_std",
        "rewards/lambda/mean", "rewards/lambda/std", "reward_errors", "resampled_groups",
        "completions/mean_length",
        "completions/min_length", "completions/max_length", "completions/mean_terminated_length",
        "completions/min_terminated_length", "completions/max_terminated_length",
        "completions/clipped_ratio", "clip_ratio/low_mean",
        "clip_ratio/low_min", "clip_ratio/high_mean", "clip_ratio/high_max",
        "clip_ratio/region_mean", "sampling/logp_difference/mean", "sampling/logp_difference/max",
    }  # fmt: skip


def test_a_function_that_applies_to_some_rollouts_is_averaged_over_these(tmp_path):
    calls = iter([1.0, None])

    def sometimes(completions):
        return [next(calls)] * len(completions)

    def always(completions):
        return [0.5] * len(completions)

    (record,) = logged(tmp_path, "some", items_of(2), reward_funcs=[sometimes, always])
    assert record["rewards/sometimes/mean"] == 1.0
    assert record["reward"] == pytest.approx((1.5 + 0.5) / 2)


# The sampler and the trainer agree.


PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9]]


def drawn_by(model, params, **options):
    trainer = GRPOTrainer(
        model,
        optax.sgd(0.1),
        reward_funcs=[lambda completions: [float(i % 3) for i in range(len(completions))]],
        tokenizer=Letters(),
        sampling=SamplingConfig(max_new_tokens=8, temperature=0.8),
        num_generations=4,
        params=params,
        **options,
    )
    state = trainer.create_train_state(KEY)
    if model.lora is not None:  # the second matrices begin at 0
        leaves, tree = jax.tree.flatten(state.params)
        rng = np.random.default_rng(0)
        leaves = [x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
        state = state.replace(params=jax.tree.unflatten(tree, leaves))
    item = {"prompt_ids": PROMPTS, "rows": [{"prompt": "p"}, {"prompt": "q"}]}
    (given,) = trainer.make_batches(state, item)
    assert given.batch["completion_lengths"].max() > 5  # more than the window
    return trainer, state, given, trainer.train_step(state, given.batch)[1]


def test_log_probabilities_of_sampler_and_trainer_agree_with_windows_and_caps():
    *_, metrics = drawn_by(*tiny_family("gemma2"))
    assert 0 < metrics["sampling/logp_difference/max"] < 1e-4
    assert metrics["sampling/logp_difference/mean"] <= metrics["sampling/logp_difference/max"]


def test_with_adapters_they_agree_too_and_the_reference_is_the_model_without():
    model, params = tiny_family("mistral")
    adapted = model.clone(lora=LoRA(3, 6, 0.0, ("all-linear",)))
    trainer, state, given, metrics = drawn_by(adapted, params, beta=0.1)
    assert 0 < metrics["sampling/logp_difference/max"] < 1e-4
    assert "ref" not in state.frozen and metrics["kl"] > 1e-3
    batch = given.batch
    for p, prompt in enumerate(PROMPTS):
        ids, c, n = batch["completion_ids"][p, 0], batch["completion_lengths"][p, 0], len(prompt)
        row = np.concatenate([prompt, ids[:c]])
        logits = model.apply({"params": params}, jnp.asarray(row)[None]) / 0.8
        expected = jax.nn.log_softmax(logits[0, n - 1 : n + c - 1])[np.arange(c), ids[:c]]
        np.testing.assert_allclose(batch["ref_logprobs"][p, 0, :c], expected, atol=1e-4)


def test_a_rollout_in_bfloat16_is_weighted_for_it_and_an_evaluation_is_not_in_bfloat16():
    model, params = tiny_family("llama")
    trainer, _, given, metrics = drawn_by(model, params, rollout_dtype="bfloat16")
    assert 1e-4 < metrics["sampling/logp_difference/max"] < 0.1
    name = "sampling/importance_sampling_ratio"
    low, mean, high = (metrics[f"{name}/{kind}"] for kind in ("min", "mean", "max"))
    assert 0.9 < low < mean < high < 1.1
    assert "old_logprobs" not in given.batch
    state = trainer.create_train_state(KEY)
    item = {"prompt_ids": PROMPTS, "rows": [{}, {}]}
    drawn = trainer.generate(state, item, KEY, trainer.eval_sampling)
    own = trainer.token_logprobs(trainer.model_params(state.params, state.frozen), drawn)
    assert np.abs(np.where(drawn.mask, own - drawn.logprobs, 0)).max() < 1e-4
