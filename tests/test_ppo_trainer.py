"""PPO: its updates against loops over tokens, its critic, its epochs, and what steers it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import bits
from families import tiny_family
from rl import EOS, TABLE, Letters, TablePPO, V, items_of, rollout_of

from relax.config.ppo import PPOSection
from relax.models import Transformer, TransformerConfig
from relax.models.config import LoRA
from relax.models.heads import init_head, with_head
from relax.optimizers import adamw
from relax.sampling import SamplingConfig
from relax.trainers import PPOTrainer
from relax.trainers.groups import pack_groups
from relax.trainers.rl.experience import Experience
from relax.trainers.rl.rollout import with_slot_after_eos
from relax.trainers.rl_trainer import ScoredRollout

KEY = jax.random.key(3)
P, G, C = 2, 4, 6
LENGTHS = np.array([[6, 1, 3, 5], [2, 6, 4, 3]])
REWARDS = np.array([[1.0, 0.0, 0.5, 2.0], [0.0, 3.0, 1.0, np.nan]])
WORTH = np.random.default_rng(6).normal(size=(V, 1)).astype(np.float32)
REF = (TABLE + 0.3 * np.random.default_rng(8).normal(size=V)).astype(np.float32)
KNOWN = [(p, g) for p, g in np.ndindex(P, G) if not np.isnan(REWARDS[p, g])]


def collected(rewards=REWARDS) -> ScoredRollout:
    """Completions of unequal lengths, of which two did not end; padding holds garbage."""
    ids = np.random.default_rng(1).integers(0, EOS, (P, G, C))
    for p, g in np.ndindex(P, G):
        if (p, g) not in [(0, 0), (1, 1)]:
            ids[p, g, LENGTHS[p, g] - 1] = EOS
    noise = 0.3 * np.random.default_rng(2).normal(size=ids.shape)
    found = rollout_of(ids, LENGTHS, logprobs=TABLE[ids] + noise)
    return ScoredRollout(found, rewards, rewards[:, :, None], {}, {})


def start(trainer):
    state = trainer.create_train_state(KEY)
    params = {"policy": {"table": jnp.asarray(TABLE)}, "value": {"score": {"kernel": WORTH}}}
    frozen = {"ref": {"table": jnp.asarray(REF)}} if trainer.kl_coef else {}
    return state.replace(params=jax.tree.map(jnp.array, params), frozen=frozen)


def batches(trainer, state, found=None):
    found = found or collected()
    return list(trainer._split(found.rollout, trainer.experience(state, found), KEY))


def update(trainer, found=None):
    """The state after the updates of an item, and the metrics of each."""
    state, every = start(trainer), []
    for batch in batches(trainer, state, found):
        state, metrics = trainer.train_step(state, batch)
        every.append(jax.device_get(metrics))
    return state, every


# A second account of the algorithm: plain loops over completions and tokens.

PLAIN = {
    "kl_coef": 0.05, "kl_estimator": "k1", "reward_at": "last_token", "missing_eos_penalty": None,
    "whiten_rewards": False, "gamma": 1.0, "lam": 0.95, "cliprange": 0.2, "dual_clip": None,
    "cliprange_value": 0.2, "vf_coef": 0.1, "entropy_coef": 0.0,
}  # fmt: skip
KL = {"k1": lambda d: d, "k3": lambda d: np.exp(-d) + d - 1}


def whitened(rows, keep_mean=False):
    every = np.concatenate(rows)
    mean, spread = every.mean(), np.sqrt(every.var(ddof=1) + 1e-8)
    return [(row - mean) / spread + (mean if keep_mean else 0.0) for row in rows]


def looped_experience(found, o):
    """Per completion with a score: ids, old log-probabilities and values; advantages, returns."""
    rows = []
    for p, g in KNOWN:
        n = LENGTHS[p, g]
        states = n + (o["reward_at"] == "after_eos" and n < C)
        ids = found.rollout.completion_ids[p, g]
        old = found.rollout.logprobs[p, g, :n].astype(float)
        reward = np.zeros(states)
        reward[:n] = -o["kl_coef"] * KL[o["kl_estimator"]](old - REF[ids[:n]])
        score = REWARDS[p, g]
        if o["missing_eos_penalty"] and found.rollout.finish[p, g] == "length":
            score -= o["missing_eos_penalty"]
        reward[-1] += score
        rows.append([ids[:states], old, WORTH[ids[:states], 0].astype(float), reward])
    if o["whiten_rewards"]:
        for row, reward in zip(rows, whitened([row[3] for row in rows], True), strict=True):
            row[3] = reward
    gained = []
    for _, _, values, reward in rows:
        advantages, ahead, later = np.zeros(len(reward)), 0.0, 0.0
        for t in reversed(range(len(reward))):
            later = reward[t] + o["gamma"] * ahead - values[t] + o["gamma"] * o["lam"] * later
            advantages[t], ahead = later, values[t]
        gained.append(advantages)
    white = whitened([a[: len(row[1])] for a, row in zip(gained, rows, strict=True)])
    return [
        (ids, old, values, a, gain + values)
        for (ids, old, values, _), gain, a in zip(rows, gained, white, strict=True)
    ]


def looped_loss(params, found, o):
    """The loss and its two parts; the parameters carry the gradient."""
    table, worth = params["policy"]["table"], params["value"]["score"]["kernel"]
    policy = value = entropy = 0.0
    tokens = states = 0
    for ids, old, old_values, advantages, returns in looped_experience(found, o):
        logprobs = table[ids[: len(old)]]
        for t, advantage in enumerate(advantages):
            rho = jnp.exp(logprobs[t] - old[t])
            inside = jnp.where(rho < 1 - o["cliprange"], 1 - o["cliprange"], rho)
            inside = jnp.where(rho > 1 + o["cliprange"], 1 + o["cliprange"], inside)
            gain = jnp.minimum(rho * advantage, inside * advantage)
            if o["dual_clip"] and advantage < 0:
                gain = jnp.maximum(gain, o["dual_clip"] * advantage)
            policy, entropy = policy - gain, entropy + 0.1 * logprobs[t] ** 2
        for t, (before, target) in enumerate(zip(old_values, returns, strict=True)):
            now, bound = worth[ids[t], 0], o["cliprange_value"]
            error = (now - target) ** 2
            if bound is not None:
                near = jnp.where(now > before + bound, before + bound, now)
                near = jnp.where(now < before - bound, before - bound, near)
                error = jnp.maximum(error, (near - target) ** 2)
            value += error / 2
        tokens, states = tokens + len(old), states + len(returns)
    policy, value, entropy = policy / tokens, value / states, entropy / tokens
    return policy + o["vf_coef"] * value - o["entropy_coef"] * entropy, (policy, value)


VARIANTS = [
    {},
    {"reward_at": "after_eos"},
    {"kl_estimator": "k3"},
    {"kl_coef": 0.0},
    {"missing_eos_penalty": 0.7},
    {"whiten_rewards": True},
    {"gamma": 0.9},
    {"lam": 0.5},
    {"cliprange": 0.05},
    {"dual_clip": 1.3},
    {"vf_coef": 1.0},
    {"entropy_coef": 0.2},
]


@functools.cache
def updated(*options):
    """After an item's updates with options, pairs of name and value."""
    return update(TablePPO(**{"num_ppo_epochs": 1} | dict(options)))


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: " ".join(map(str, o.values())) or "-")
def test_the_first_update_of_every_variant_is_that_of_a_loop_over_tokens(options):
    found, params = collected(), start(TablePPO()).params
    trainer = TablePPO(num_ppo_epochs=1, **options)
    if trainer.reward_at == "after_eos":
        found = found._replace(rollout=placed(found.rollout))
    value_and_grad = jax.value_and_grad(looped_loss, has_aux=True)
    (loss, parts), gradient = value_and_grad(params, found, PLAIN | options)
    state, (metrics,) = update(trainer, found)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["loss/policy_avg"], parts[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["loss/value_avg"], parts[1], rtol=1e-4)
    moved = jax.tree.map(lambda a, b: a - b, params, state.params)
    for ours, expected in zip(jax.tree.leaves(moved), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-6)
        assert np.abs(expected).max() > 1e-3


def placed(rollout):
    """The longest completions end at the limit: there is no place to be made."""
    same = with_slot_after_eos(rollout, C)
    assert same.completion_ids.shape == (P, G, C)
    return same


def test_a_place_behind_a_completion_is_made_where_the_limit_allows_one():
    rollout = rollout_of(np.zeros((1, 2, 8), int), [[8, 3]])
    wider = with_slot_after_eos(rollout, 20)
    assert wider.completion_ids.shape == (1, 2, 12)
    np.testing.assert_array_equal(wider.mask[:, :, :8], rollout.mask)
    assert with_slot_after_eos(rollout, 8).completion_ids.shape == (1, 2, 8)


LATER = {"num_ppo_epochs": 3}
FOLLOWING = {"kl_target": 0.01, "kl_horizon": 10.0}
# An option -> what is given with it, and another value than the one there.
LIVE = {
    "num_ppo_epochs": ({}, 2),
    "kl_coef": ({}, 0.3),
    "kl_estimator": ({}, "k3"),
    "kl_target": ({}, 0.01),
    "kl_horizon": (FOLLOWING, 20.0),
    "reward_at": ({}, "after_eos"),
    "missing_eos_penalty": ({}, 0.7),
    "whiten_rewards": ({}, True),
    "gamma": ({}, 0.9),
    "lam": ({}, 0.5),
    "cliprange": ({}, 0.05),
    "dual_clip": ({}, 1.3),
    "cliprange_value": (LATER, 1e-3),
    "vf_coef": ({}, 1.0),
    "entropy_coef": ({}, 0.2),
    "target_kl": (LATER, 0.01),
    "critic_warmup_steps": ({}, 1),
}
# Below, or in the recipe's tests, or of memory alone.
ELSEWHERE = {"num_mini_batches", "value_model", "critic_learning_rate", "loss_chunk_size"}


def test_every_option_of_the_section_is_proven_live():
    assert set(LIVE) | ELSEWHERE == set(PPOSection.__dataclass_fields__)


@pytest.mark.parametrize("name", LIVE)
def test_an_option_changes_the_update(name):
    given, value = LIVE[name]
    found = [updated(*given.items())[0], updated(*(given | {name: value}).items())[0]]
    if name.startswith("kl_t") or name.startswith("kl_h"):  # what the next rollout is charged
        coefficients = [float(s.control.get("kl_coef", 0.05)) for s in found]
        assert abs(coefficients[0] - coefficients[1]) > 1e-6
        return
    leaves = [np.concatenate([x.ravel() for x in jax.tree.leaves(s.params)]) for s in found]
    assert np.abs(leaves[0] - leaves[1]).max() > 1e-5


@pytest.mark.parametrize("reward_at", ["last_token", "after_eos"])
def test_any_cut_into_micro_batches_gives_the_same_update(reward_at):
    """1 x 8 and 8 x 1; the micro-batch of the completion without a score trains nothing."""
    found = []
    for steps in (1, 8):
        trainer = TablePPO(
            reward_at=reward_at, entropy_coef=0.1, num_ppo_epochs=1, prompts_per_item=P,
            gradient_accumulation_steps=steps, completions_per_update=P * G,
        )  # fmt: skip
        assert trainer.row_size == {1: 4, 8: 1}[steps]
        found.append(update(trainer))
    (one, (first,)), (eight, (second,)) = found
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(eight.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for name, value in first.items():
        if not name.startswith("sampling"):
            np.testing.assert_allclose(second[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_the_first_gradient_is_that_of_reinforce_with_a_baseline():
    """One epoch, one mini-batch, λ = 1: Σ Â ∇ log π / #tokens, Â white Monte Carlo less value."""
    rewards = np.nan_to_num(REWARDS)
    ids = np.random.default_rng(1).integers(0, V, (P, G, C))
    given = rollout_of(ids, LENGTHS)  # drawn by the policy itself
    trainer = TablePPO(num_ppo_epochs=1, kl_coef=0.0, lam=1.0)
    state, _ = update(trainer, ScoredRollout(given, rewards, rewards[:, :, None], {}, {}))
    rows = [(ids[p, g, : LENGTHS[p, g]], rewards[p, g]) for p, g in np.ndindex(P, G)]
    advantages = whitened([reward - WORTH[tokens, 0] for tokens, reward in rows])
    expected = np.zeros(V)
    for (tokens, _), advantage in zip(rows, advantages, strict=True):
        np.add.at(expected, tokens, advantage / LENGTHS.sum())
    moved = np.asarray(state.params["policy"]["table"]) - TABLE
    np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-6)


def test_epochs_times_mini_batches_are_optimizer_steps_each_epoch_in_another_order():
    trainer = TablePPO(
        optax.adam(0.01), num_ppo_epochs=3, prompts_per_item=P, completions_per_update=2
    )
    assert trainer.updates_per_item == 12 and trainer.row_size == 2
    state = start(trainer)
    given = batches(trainer, state)
    rows = [tuple(np.asarray(b.old_logprobs).ravel().round(5).tolist()) for b in given]
    passes = [rows[i : i + 4] for i in (0, 4, 8)]
    assert len({tuple(map(str, p)) for p in passes}) == 3
    assert len({tuple(sorted(map(str, p))) for p in passes}) == 1
    again = [tuple(np.asarray(b.old_logprobs).ravel().round(5).tolist())
             for b in batches(trainer, state)]  # fmt: skip
    assert str(again) == str(rows)
    for batch in given:
        state, metrics = trainer.train_step(state, batch)
    assert int(state.step) == 12
    for part in ("policy", "value"):
        assert int(optax.tree.get(state.opt_state.parts[part], "count")) == 12


def test_a_completion_without_a_score_teaches_nothing():
    """Nor does a rollout of them."""
    trainer = TablePPO(optax.adam(0.1), num_ppo_epochs=1, entropy_coef=0.1)
    state, (metrics,) = update(trainer, collected(np.full((P, G), np.nan)))
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and metrics["skipped_steps"] == 0
    assert bits(state.params) == bits(start(trainer).params)


def test_metrics_are_over_real_tokens_and_carry_trls_names():
    trainer, found = TablePPO(num_ppo_epochs=1), collected()
    experience = trainer.experience(start(trainer), found)
    metrics = trainer.experience_metrics(found, experience)
    kls = []
    for p, g in KNOWN:
        ids = found.rollout.completion_ids[p, g, : LENGTHS[p, g]]
        old = found.rollout.logprobs[p, g, : LENGTHS[p, g]]
        kls.append((old - REF[ids]).sum())
    _, (trained,) = update(trainer)
    rows = looped_experience(found, PLAIN)
    returns, values = (np.concatenate([row[i] for row in rows]) for i in (4, 2))
    rho = np.concatenate([np.exp(TABLE[row[0]] - row[1]) for row in rows])
    expected = {
        "episode": 8,
        "objective/kl": np.mean(kls),
        "objective/kl_coef": 0.05,
        "objective/scores": np.nanmean(REWARDS),
        "objective/non_score_reward": -0.05 * np.mean(kls),
        "objective/rlhf_reward": np.nanmean(REWARDS) - 0.05 * np.mean(kls),
        "val/num_eos_tokens": 6,
        "val/explained_variance": 1 - (returns - values).var() / returns.var(),
        "policy/approxkl_avg": (np.log(rho) ** 2).mean() / 2,
        "entropy": np.mean([0.1 * TABLE[i] ** 2 for row in rows for i in row[0]]),
        "val/ratio": rho.mean(),
        "val/ratio_var": ((rho - 1) ** 2).mean(),
        "val/clipfrac_avg": 0.0,
    }
    for name, value in expected.items():
        ours = (metrics | trained)[name]
        np.testing.assert_allclose(ours, value, rtol=1e-4, atol=1e-6, err_msg=name)
    advantages = np.concatenate([row[3] for row in rows])
    outside = ((rho > 1.2) & (advantages > 0)) | ((rho < 0.8) & (advantages < 0))
    np.testing.assert_allclose(trained["policy/clipfrac_avg"], outside.mean(), rtol=1e-5)
    assert outside.any()


# What it steers itself by.


def test_the_coefficient_follows_the_kl_once_per_rollout():
    trainer = TablePPO(
        num_ppo_epochs=2, kl_coef=0.5, kl_estimator="k3", kl_target=0.01, kl_horizon=80.0
    )
    state, found = start(trainer), []
    for _ in range(2):
        for batch in batches(trainer, state):
            before = float(state.control["kl_coef"])
            kl = float(batch.kl[0])
            state, _ = trainer.train_step(state, batch)
            found.append(float(state.control["kl_coef"]) / before)
    assert kl > 0.02
    np.testing.assert_allclose(found, [1, 1.02, 1, 1.02], rtol=1e-5)  # a fifth of 8 / 80
    experience = trainer.experience(state, collected())
    np.testing.assert_allclose(experience["kl_coef"], 0.5 * 1.02**2, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 4])
def test_an_update_that_finds_the_policy_too_far_away_ends_the_rollout(steps):
    """It and those behind it change nothing, are counted, and tell what they find."""
    sizes = {"prompts_per_item": P, "completions_per_update": P * G}
    sizes |= {"gradient_accumulation_steps": steps, "num_ppo_epochs": 4}
    trainer = TablePPO(optax.adam(1.0), target_kl=0.2, **sizes)
    state, skipped, distances = start(trainer), [], []
    frozen_at = None
    for batch in batches(trainer, state):
        before = bits((state.params, state.opt_state))
        state, metrics = trainer.train_step(state, batch)
        skipped.append(int(metrics["skipped_minibatches"]))
        distances.append(float(metrics["policy/approxkl_avg"]))
        assert (bits((state.params, state.opt_state)) == before) == bool(skipped[-1])
        frozen_at = distances[-1] if skipped[-1] and frozen_at is None else frozen_at
    assert skipped == [0, 1, 1, 1] and distances[0] < 0.2 < distances[1]
    np.testing.assert_allclose(distances[1:], frozen_at, rtol=1e-5)
    assert int(state.step) == 4 and not state.control["stopped"]  # the next rollout begins anew


def test_the_policy_stands_still_while_the_critic_warms_up():
    trainer = TablePPO(optax.adam(0.01), num_ppo_epochs=3, critic_warmup_steps=2)
    state = start(trainer)
    policies, critics = [], []
    for batch in batches(trainer, state):
        before = bits(state.params["policy"]), bits(state.params["value"])
        state, _ = trainer.train_step(state, batch)
        policies.append(bits(state.params["policy"]) != before[0])
        critics.append(bits(state.params["value"]) != before[1])
    assert policies == [False, False, True] and critics == [True, True, True]
    assert int(optax.tree.get(state.opt_state.parts["policy"], "count")) == 1


def test_the_critic_has_an_optimizer_of_its_own():
    trainer = TablePPO(adamw(1e-3), critic_optimizer=adamw(1e-2), num_ppo_epochs=1)
    state, (metrics,) = update(trainer)
    assert metrics["learning_rate"] == np.float32(1e-3)
    assert metrics["critic_learning_rate"] == np.float32(1e-2)
    moved = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), state.params, start(trainer).params
    )
    np.testing.assert_allclose(moved["policy"]["table"], 1e-3, rtol=1e-3)
    np.testing.assert_allclose(moved["value"]["score"]["kernel"], 1e-2, rtol=1e-3)


def test_what_cannot_be_meant_is_refused_when_the_trainer_is_made():
    def refused(**options):
        with pytest.raises(ValueError) as caught:
            TablePPO(**options)
        return str(caught.value)

    assert "unknown kl_estimator 'k2'" in refused(kl_estimator="k2")
    assert "unknown reward_at 'eos'. Known: last_token" in refused(reward_at="eos")
    assert "value_params need a value_model" in refused(value_params={})


# With a transformer.


@pytest.fixture(scope="module")
def model():
    return Transformer(
        TransformerConfig(
            vocab_size=V, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=4, initializer_range=0.3,
            max_position_embeddings=64, tie_word_embeddings=False,
        )
    )  # fmt: skip


def ppo_of(model, **options) -> PPOTrainer:
    given = {"prompts_per_item": 2, "completions_per_update": 4, "num_generations": 2}
    return PPOTrainer(
        model,
        optax.adam(1e-2),
        reward_funcs=[lambda completions: [float(len(set(c))) for c in completions]],
        tokenizer=Letters(),
        sampling=SamplingConfig(max_new_tokens=6),
        **given | {"num_ppo_epochs": 1} | options,
    )


@pytest.mark.parametrize("kind", ["head", "policy", "lora"])
def test_a_critic_of_any_kind_values_the_states_before_tokens_and_learns(model, kind):
    options = {}
    if kind == "policy":
        options = {"value_model": "policy"}
    elif kind == "lora":
        model = model.clone(lora=LoRA(2, 4, 0.0, ("all-linear",)))
    trainer = ppo_of(model, **options)
    state = trainer.create_train_state(KEY)
    assert set(state.params) == {"policy", "value"} and "lm_head" not in state.params["value"]
    kernel = np.random.default_rng(0).normal(size=(8, 1)).astype(np.float32)
    state.params["value"]["score"]["kernel"] = jnp.asarray(kernel)
    (item,) = items_of(1)
    (given,) = trainer.make_batches(state, item)
    batch = given.batch
    weights = trainer.model_params(state.params, state.frozen)
    trunk_model, trunk = (model, weights)
    if kind == "policy":
        trunk_model, trunk = trainer.value_model, state.params["value"]
    tokens = {name: np.asarray(value) for name, value in batch.tokens.items()}
    prompts = item["prompt_ids"]
    ends = list(zip(map(len, prompts), tokens["completion_lengths"][:, 0], strict=True))
    rows = np.zeros((2, 16), np.int32)
    for row, (n, m) in enumerate(ends):
        rows[row, :n] = prompts[row]
        rows[row, n : n + m] = tokens["completion_ids"][row, 0, :m]
    states = jax.jit(functools.partial(trunk_model.apply, method="hidden_states"))
    expected = (np.asarray(states({"params": trunk}, rows)) @ kernel)[:, :, 0]
    for row, (n, m) in enumerate(ends):
        found = batch.values[row, 0, :m]
        np.testing.assert_allclose(found, expected[row, n - 1 : n + m - 1], rtol=1e-4, atol=1e-5)
    before = jax.device_get(state.params)
    state, metrics = trainer.train_step(state, batch)
    assert float(metrics["sampling/logp_difference/max"]) < 1e-4
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, jax.device_get(state.params))
    assert all(jax.tree.leaves(changed["value"]))
    assert any(jax.tree.leaves(changed["policy"]))


def test_critics_begin_at_zero_and_with_what_they_are_given(model):
    own = ppo_of(model, value_model="policy", kl_coef=0.0).create_train_state(KEY)
    assert not own.params["value"]["score"]["kernel"].any()
    body = {name: own.params["policy"][name] for name in own.params["policy"] if name != "lm_head"}
    found = {name: part for name, part in own.params["value"].items() if name != "score"}
    assert bits(found) == bits(body) and not own.frozen
    given = with_head(
        model.init(KEY, np.zeros((1, 4), np.int32))["params"], init_head(KEY, model.config)
    )
    state = ppo_of(model, value_model=model, value_params=given).create_train_state(KEY)
    assert bits(state.params["value"]) == bits(given)
    assert set(state.frozen) == {"ref"}


# Two prompts with one completion each.
GROUPS = {
    "prompt_ids": np.array([[1, 2, 3], [4, 5, 0]], np.int32),
    "prompt_lengths": np.array([3, 2], np.int32),
    "completion_ids": np.array([[[6, 7, 8, 22]], [[9, 22, 0, 0]]], np.int32),
    "completion_lengths": np.array([[4], [2]], np.int32),
}


@pytest.mark.parametrize("critic", [None, "policy"])
def test_a_heads_gradient_reaches_the_shared_trunk_and_a_separate_critics_does_not(model, critic):
    trainer = ppo_of(model, value_model=critic, kl_coef=0.0)
    state = trainer.create_train_state(KEY)
    state.params["value"]["score"]["kernel"] = jnp.ones((8, 1))
    tokens = pack_groups(GROUPS, [model], 1)
    loss = jax.jit(jax.grad(lambda params: trainer.completion_values(params, {}, tokens).sum()))
    gradient = loss(state.params)
    reached = any(bool(leaf.any()) for leaf in jax.tree.leaves(gradient["policy"]))
    assert reached == (critic is None) and gradient["value"]["score"]["kernel"].any()


def test_a_mixture_of_experts_adds_its_routers_loss_once_per_trunk():
    model, params = tiny_family("mixtral")
    trainer = ppo_of(model, params=params, value_model="policy", vf_coef=0.5, kl_coef=0.0)
    state = trainer.create_train_state(KEY)
    tokens = pack_groups(GROUPS, [model], 1)
    real = tokens["places"] >= 0
    zeros = np.zeros(real.shape, np.float32)
    names = ("sampling_logprobs", "old_logprobs", "values", "advantages", "returns")
    rows = {"kl": np.zeros(2, np.float32), "value_share": np.ones(2, np.float32)}
    batch = Experience(tokens, **dict.fromkeys(names, zeros), mask=real, value_mask=real, **rows)
    out = jax.jit(trainer.compute_loss)(state.params, batch)
    m = {name: np.asarray(getattr(x, "value", x)) for name, x in out.metrics.items()}
    rest = out.loss - m["loss/policy_avg"] - 0.5 * m["loss/value_avg"]
    both = m["aux_loss"] + m["critic_aux_loss"]
    assert m["aux_loss"] > 0 and m["critic_aux_loss"] > 0
    np.testing.assert_allclose(rest, model.config.router_aux_loss_coef * both, rtol=1e-3)
