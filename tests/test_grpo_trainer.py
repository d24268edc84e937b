"""GRPO: its loss against loops over tokens, its options, its reference, its accumulation."""

import functools
import math
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import bits
from rl import EOS, TABLE, Letters, TableTrainer, V, items_of, rollout_of

from relax.config.grpo import GRPOSection
from relax.losses import CORRECTIONS, PolicyOptions
from relax.sampling import SamplingConfig
from relax.trainers import GRPOTrainer, grpo_trainer
from relax.trainers.rl.differences import Correction
from relax.trainers.rl_trainer import ScoredRollout

KEY = jax.random.key(3)
P, G, C = 2, 4, 6
LENGTHS = np.array([[6, 1, 3, 5], [2, 6, 4, 3]])
REWARDS = np.array([[1.0, 0.0, 0.5, 2.0], [0.0, 3.0, 1.0, np.nan]])
TEMPERATURE = 0.7


def rollout(old=None):
    """Two groups of very unequal completions, of which two did not end; padding holds garbage."""
    ids = np.random.default_rng(1).integers(0, EOS, (P, G, C))
    for p, g in np.ndindex(P, G):
        if (p, g) not in [(0, 0), (1, 1)]:
            ids[p, g, LENGTHS[p, g] - 1] = EOS
    noise = 0.4 * np.random.default_rng(2).normal(size=ids.shape)
    return rollout_of(ids, LENGTHS, logprobs=(TABLE[ids] if old is None else old) + noise)


def collected(rewards=REWARDS, **options) -> ScoredRollout:
    return ScoredRollout(rollout(**options), rewards, rewards[:, :, None], {}, {})


def batches(trainer, state=None, found=None):
    """The batches of an item's updates from given completions and rewards."""
    found = found or collected()
    state = state or trainer.create_train_state(KEY)
    return list(trainer._split(found.rollout, trainer.experience(state, found), KEY))


def update(trainer, state=None, **given):
    """The state after the updates of an item, and the metrics of the last."""
    state = state or trainer.create_train_state(KEY)
    for batch in batches(trainer, state, **given):
        state, metrics = trainer.train_step(state, batch)
    return state, metrics


# A second account of the algorithm: plain loops over prompts, completions and tokens.


def group_advantages(rewards, kind="group"):
    out = np.zeros(rewards.shape)
    for p, group in enumerate(rewards):
        real = group[~np.isnan(group)]
        for g, r in enumerate(group):
            if not np.isnan(r):
                spread = {
                    "group": np.std(real, ddof=1) + 1e-4,
                    "batch": np.std(rewards[~np.isnan(rewards)], ddof=1) + 1e-4,
                    "none": 1.0,
                }
                others = (real.sum() - r) / (len(real) - 1)
                centred = r - (others if kind == "rloo" else real.mean())
                out[p, g] = centred / spread.get(kind, 1.0)
    return out


def token_loss(rho, advantage, logprob, o):
    """Of each token of a completion; rho carries the gradient."""
    low, high = 1 - o["epsilon"], 1 + (o["epsilon_high"] or o["epsilon"])
    weight = jax.lax.stop_gradient(rho)
    bounded = jnp.where(weight < low, low, jnp.where(weight > high, high, weight))
    if o["loss_type"] == "cispo":
        return -bounded * advantage * logprob
    if o["loss_type"] == "cispo_absolute":
        return -jnp.where(weight > high - 1, high - 1, weight) * advantage * logprob
    free, inside = rho * advantage, bounded * advantage
    if o["delta"] is not None:
        free = jnp.where(weight > o["delta"], o["delta"] * advantage, free)
    return -jnp.where(free <= inside, free, inside)


KL = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: jnp.exp(-d) + d - 1}
PLAIN = {
    "loss_type": "dapo", "epsilon": 0.2, "epsilon_high": None, "delta": None, "beta": 0.0,
    "kl_estimator": "k3", "kl_in_reward": False, "use_bias_correction_kl": True,
    "importance_sampling_level": "token",
    "scale_rewards": "group", "mask_truncated_completions": False, "entropy_coef": 0.0,
}  # fmt: skip


def looped_loss(logprobs, entropies, found, o, ref=None):
    """The loss; `logprobs[p][g]` and `entropies[p][g]` are the arrays of real tokens."""
    old, rewards = found.rollout.logprobs, found.rewards.copy()
    o = PLAIN | o
    if o["kl_in_reward"]:
        for p, g in np.ndindex(P, G):
            n = LENGTHS[p, g]
            kl = KL[o["kl_estimator"]](old[p, g, :n] - ref[p, g, :n]).sum()
            rewards[p, g] -= o["beta"] * float(kl)
    advantages = group_advantages(rewards, o["scale_rewards"])
    sums, counts = [], []
    for p, g in np.ndindex(P, G):
        n = LENGTHS[p, g]
        truncated = found.rollout.finish[p, g] == "length"
        if o["mask_truncated_completions"] and truncated:
            sums.append(0.0), counts.append(0)
            continue
        log_rho = logprobs[p][g] - old[p, g, :n]
        level = o["importance_sampling_level"]
        shared = {"token": log_rho, "sequence": log_rho.mean(), "trajectory": log_rho.sum()}
        losses = token_loss(jnp.exp(shared[level]), advantages[p, g], logprobs[p][g], o)
        total = (losses * np.ones(n)).sum() - o["entropy_coef"] * entropies[p][g].sum()
        if o["beta"] and not o["kl_in_reward"]:
            kl = KL[o["kl_estimator"]](logprobs[p][g] - ref[p, g, :n])
            weight = jnp.exp(shared[level]) if o["use_bias_correction_kl"] else 1.0
            total += o["beta"] * (weight * kl).sum()
        sums.append(total), counts.append(n)
    if o["loss_type"] == "grpo":
        return sum(s / max(n, 1) for s, n in zip(sums, counts, strict=True)) / (P * G)
    if o["loss_type"] == "dr_grpo":
        return sum(sums) / (P * G * C)
    return sum(sums) / sum(counts)


REF = (TABLE + 0.3 * np.random.default_rng(8).normal(size=V)).astype(np.float32)
IN_LOSS, BY_K1 = {"beta": 0.3}, {"beta": 0.3, "kl_estimator": "k1"}
GRPO = {"loss_type": "grpo"}
VARIANTS = [
    {},
    GRPO,
    {"loss_type": "dr_grpo", "scale_rewards": "batch"},
    {"loss_type": "cispo", "epsilon_high": 0.1},
    {"loss_type": "cispo_absolute", "epsilon_high": 5.0},
    {"epsilon": 0.05},
    {"epsilon_high": 0.5},
    {"delta": 1.3},
    GRPO | {"importance_sampling_level": "sequence"},
    GRPO | {"importance_sampling_level": "trajectory", "scale_rewards": "rloo"},
    GRPO | {"scale_rewards": "none"},
    IN_LOSS,
    BY_K1,
    BY_K1 | {"kl_in_reward": True},
    IN_LOSS | {"kl_estimator": "k2"},
    IN_LOSS | {"use_bias_correction_kl": False},
    IN_LOSS | GRPO | {"importance_sampling_level": "sequence"},
    {"mask_truncated_completions": True},
    GRPO | {"mask_truncated_completions": True},
    {"entropy_coef": 0.2},
]


def table_state(trainer):
    state = trainer.create_train_state(KEY)
    return state.replace(frozen={"ref": {"table": jnp.asarray(REF)}}) if trainer.beta else state


@functools.cache
def updated(*options):
    """The state after an item's updates with options, pairs of name and value; and metrics."""
    trainer = TableTrainer(**dict(options))
    return update(trainer, table_state(trainer))


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: " ".join(map(str, o.values())) or "-")
def test_the_update_of_every_variant_is_that_of_a_loop_over_tokens(options):
    found = collected()
    ids = found.rollout.completion_ids

    def loss_of(table):
        rows = [[table[ids[p, g, : LENGTHS[p, g]]] for g in range(G)] for p in range(P)]
        entropies = [[0.1 * x**2 for x in row] for row in rows]
        return looped_loss(rows, entropies, found, options, REF[ids])

    expected, gradient = jax.value_and_grad(loss_of)(jnp.asarray(TABLE))
    state, metrics = updated(*options.items())
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(TABLE - state.params["table"], gradient, rtol=1e-4, atol=1e-6)
    assert np.abs(gradient).max() > 0.01


MOVING = {"beta": 0.3, "num_iterations": 2, "sync_ref_model": True, "ref_model_sync_steps": 1}
# An option -> what is given with it, and another value than the one there.
LIVE = {
    "beta": ({}, 0.3),
    "kl_estimator": (IN_LOSS, "k1"),
    "kl_in_reward": (BY_K1, True),
    "use_bias_correction_kl": (IN_LOSS, False),
    "loss_type": ({}, "grpo"),
    "epsilon": ({}, 0.05),
    "epsilon_high": ({}, 0.5),
    "delta": ({}, 1.3),
    "importance_sampling_level": (GRPO, "sequence"),
    "scale_rewards": (GRPO, "none"),
    "multi_objective_aggregation": (GRPO, "normalize_then_sum"),
    "mask_truncated_completions": ({}, True),
    "off_policy_mask_threshold": ({"loss_type": "gpg", "num_iterations": 8}, 0.02),
    "top_entropy_quantile": ({}, 0.3),
    "entropy_coef": ({}, 0.2),
    "use_adaptive_entropy": ({"entropy_coef": 0.2}, True),
    "sync_ref_model": (MOVING, False),
    "ref_model_mixup_alpha": (MOVING, 0.3),
    "ref_model_sync_steps": (MOVING, 2),
}
ELSEWHERE = {"loss_chunk_size", "max_resample_rounds"}  # memory; below
ELSEWHERE |= {"cast_lm_head_to_fp32"}  # test_precision
ELSEWHERE |= {"entropy_target", "entropy_coef_delta", "entropy_coef_min", "entropy_coef_max"}
ELSEWHERE |= set(PolicyOptions._fields) - {"clip"}  # test_policy_variants


def test_every_option_of_the_section_is_proven_live():
    assert set(LIVE) | ELSEWHERE == set(GRPOSection.__dataclass_fields__)


@pytest.mark.parametrize("name", LIVE)
def test_an_option_changes_the_update(name):
    given, value = LIVE[name]
    found = [updated(*given.items()), updated(*(given | {name: value}).items())]
    moves = "ref_model" in name
    tables = [(s.frozen["ref"] if moves else s.params)["table"] for s, _ in found]
    assert np.abs(tables[0] - tables[1]).max() > 1e-5


def test_the_entropy_coefficient_is_part_of_the_state():
    """By hand, from entropies of 0.1 log π²: no bonus, then 0.1, then 0.2 at the bound of 0.15."""
    options = {"use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef_delta": 0.1}
    trainer = TableTrainer(optax.sgd(0.0), num_iterations=3, entropy_coef_max=0.15, **options)
    state, coefficients, losses = trainer.create_train_state(KEY), [], []
    for batch in batches(trainer, state):
        state, metrics = trainer.train_step(state, batch)
        coefficients.append(float(metrics["entropy_coef"]))
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(coefficients, [0, 0.1, 0.15], rtol=1e-6)
    np.testing.assert_allclose(state.control["entropy_coef"], 0.15, rtol=1e-6)
    np.testing.assert_allclose(state.control["entropy"], metrics["entropy"])
    bonus = [losses[0] - c * float(metrics["entropy"]) for c in coefficients]
    np.testing.assert_allclose(losses, bonus, rtol=1e-5)


def assert_logprobs_are_the_tables(batch):
    real = batch["mask"]
    expected = TABLE[batch["completion_ids"]]
    np.testing.assert_array_equal(batch["old_logprobs"][real], expected[real])


def test_recomputed_old_logprobs_are_the_trainers():
    found = {}
    for recompute in (False, True):
        trainer = TableTrainer(recompute_old_logprobs=recompute, num_iterations=2)
        found[recompute] = batches(trainer)[0]
    given, own = found[False], found[True]
    np.testing.assert_array_equal(given["old_logprobs"], given["sampling_logprobs"])
    assert_logprobs_are_the_tables(own)
    assert np.nanmax(np.abs(own["old_logprobs"] - given["old_logprobs"])) > 0.1


@pytest.mark.parametrize("narrow", [{"top_k": 3}, {"top_p": 0.9}, {"repetition_penalty": 1.1}])
def test_completions_of_a_truncated_distribution_have_their_old_logprobs_computed(narrow):
    trainer = TableTrainer(sampling=SamplingConfig(max_new_tokens=C, **narrow), num_iterations=2)
    assert_logprobs_are_the_tables(batches(trainer)[0])


@pytest.mark.parametrize("options", [{}, IN_LOSS, {"loss_type": "cispo"}], ids=str)
def test_a_rollout_of_one_update_needs_no_forward_pass_for_its_old_logprobs(options):
    given = {"recompute_old_logprobs": True, **options}
    trainer, computed = TableTrainer(**given), TableTrainer(**given)
    vars(computed)["recomputes_old_logprobs"] = False
    exact = rollout()
    exact.logprobs[:] = TABLE[exact.completion_ids]
    found = ScoredRollout(exact, REWARDS, REWARDS[:, :, None], {}, {})
    assert "old_logprobs" not in batches(trainer)[0] and "old_logprobs" in batches(computed)[0]
    states = [update(t, table_state(t), found=found)[0] for t in (trainer, computed)]
    np.testing.assert_allclose(*(s.params["table"] for s in states), rtol=1e-6)


def token_weights(ratios):
    return {
        "token_truncate": np.minimum(ratios, 1.2),
        "token_mask": np.where(ratios > 1.2, 0, ratios),
        "sequence_truncate": np.full_like(ratios, min(np.prod(ratios), 1.2)),
        "sequence_mask": np.full_like(ratios, np.prod(ratios) if np.prod(ratios) <= 1.2 else 0),
    }


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("mode", CORRECTIONS)
def test_a_correction_weights_each_tokens_gradient_by_the_trainers_ratio_to_the_sampler(
    mode, passes
):
    """The first update of a rollout, where the gradient is - Σ w Â ∇log π / #tokens."""
    trainer = TableTrainer(recompute_old_logprobs=True, num_iterations=passes)
    trainer.correction = Correction(mode, clip_max=1.2)
    found, advantages = collected(), group_advantages(REWARDS)
    ids, sampled = found.rollout.completion_ids, found.rollout.logprobs
    gradient, seen = np.zeros(V), []
    for p, g in np.ndindex(P, G):
        real = ids[p, g, : LENGTHS[p, g]]
        ratios = np.exp(TABLE[real] - sampled[p, g, : LENGTHS[p, g]])
        weights = token_weights(ratios)[mode]
        np.add.at(gradient, real, -weights * advantages[p, g] / LENGTHS.sum())
        seen += weights.tolist()
    batch = batches(trainer, found=found)[0]
    state, metrics = trainer.train_step(trainer.create_train_state(KEY), batch)
    np.testing.assert_allclose(TABLE - state.params["table"], gradient, rtol=1e-4, atol=1e-6)
    name = "sampling/importance_sampling_ratio"
    for kind, value in (("min", min(seen)), ("mean", np.mean(seen)), ("max", max(seen))):
        np.testing.assert_allclose(metrics[f"{name}/{kind}"], value, rtol=1e-5)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_any_cut_into_micro_batches_gives_the_same_update(loss_type):
    """1 x 8 to 8 x 1, across groups; some micro-batches hold nothing that is trained on."""
    options = {"loss_type": loss_type, "mask_truncated_completions": True, "beta": 0.1}
    found = []
    for steps in (1, 8):
        trainer = TableTrainer(
            **options, gradient_accumulation_steps=steps, prompts_per_item=P,
            completions_per_update=P * G,
        )  # fmt: skip
        assert trainer.row_size == {1: 4, 8: 1}[steps]
        state, metrics = update(trainer, table_state(trainer))
        found.append((state.params["table"], metrics["loss"], metrics["kl"], metrics["entropy"]))
    assert np.abs(found[0][0] - TABLE).max() > 1e-3
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-7)


def test_without_sizes_all_completions_of_an_item_are_one_update_however_cut():
    found = [update(TableTrainer(gradient_accumulation_steps=n))[0] for n in (1, 8)]
    np.testing.assert_allclose(*(s.params["table"] for s in found), rtol=1e-5, atol=1e-7)
    assert [int(s.step) for s in found] == [1, 1]


def test_updates_come_in_the_documented_number_and_order():
    """Two passes over 8 completions, two at a time; every pass in an order of its own."""
    trainer = TableTrainer(num_iterations=2, prompts_per_item=P, completions_per_update=2)
    assert trainer.updates_per_item == 8 and trainer.row_size == 2
    passes = np.array([b["advantages"].reshape(-1) for b in batches(trainer)]).reshape(2, 8)
    expected = group_advantages(REWARDS).reshape(-1)
    for found in passes:
        np.testing.assert_allclose(sorted(found), sorted(expected), atol=1e-5)
    assert passes[0].tolist() != passes[1].tolist()
    again = np.array([b["advantages"].reshape(-1) for b in batches(trainer)]).reshape(2, 8)
    assert passes.tolist() == again.tolist()


def test_later_updates_of_a_rollout_compare_with_the_policy_that_drew_it():
    trainer = TableTrainer(num_iterations=3)
    given = batches(trainer)
    for batch in given[1:]:
        order = [np.flatnonzero((given[0]["completion_ids"] == row).all((1, 2)))[0]
                 for row in batch["completion_ids"]]  # fmt: skip
        np.testing.assert_array_equal(batch["old_logprobs"], given[0]["old_logprobs"][order])


def test_a_completion_without_a_reward_has_no_advantage_whatever_a_subclass_returns():
    class Median(TableTrainer):
        def advantages(self, rewards):
            return rewards - jnp.nanmedian(rewards, axis=1, keepdims=True)

    (batch,) = batches(Median())
    np.testing.assert_allclose(
        batch["advantages"], [[0.25, -0.75, -0.25, 1.25], [-1, 2, 0, 0]], atol=1e-6
    )


def test_no_reward_at_all_is_an_advantage_of_zero():
    state, metrics = update(TableTrainer(), found=collected(np.full((P, G), np.nan)))
    assert metrics["loss"] == 0 and metrics["skipped_steps"] == 0
    np.testing.assert_array_equal(state.params["table"], TABLE)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_when_all_is_truncated_and_masked_nothing_changes(loss_type):
    found = collected()
    found.rollout.finish[:] = "length"
    trainer = TableTrainer(
        optax.adam(0.1), loss_type=loss_type, beta=0.1, entropy_coef=0.1,
        mask_truncated_completions=True,
    )  # fmt: skip
    state, metrics = update(trainer, found=found)
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and metrics["skipped_steps"] == 0
    assert bits(state.params) == bits({"table": TABLE})


def test_the_kl_metric_is_the_mean_estimate_over_tokens():
    trainer, found = TableTrainer(beta=0.1), collected()
    _, metrics = update(trainer, table_state(trainer), found=found)
    values = []
    for p, g in np.ndindex(P, G):
        for v in found.rollout.completion_ids[p, g, : LENGTHS[p, g]]:
            delta = float(TABLE[v]) - float(REF[v])
            values.append(math.exp(-delta) + delta - 1)
    np.testing.assert_allclose(metrics["kl"], np.mean(values), rtol=1e-4)


def test_clip_metrics_count_tokens_by_hand():
    _, metrics = update(TableTrainer(), found=(found := collected()))
    advantages, low, high, sequences = group_advantages(REWARDS), 0, 0, []
    for p, g in np.ndindex(P, G):
        n = LENGTHS[p, g]
        rho = np.exp(
            TABLE[found.rollout.completion_ids[p, g, :n]] - found.rollout.logprobs[p, g, :n]
        )
        lows, highs = (rho < 0.8) & (advantages[p, g] < 0), (rho > 1.2) & (advantages[p, g] > 0)
        low, high = low + lows.sum(), high + highs.sum()
        sequences.append((lows.mean(), highs.mean()))
    tokens = LENGTHS.sum()
    assert low and high
    expected = {
        "clip_ratio/low_mean": low / tokens,
        "clip_ratio/high_mean": high / tokens,
        "clip_ratio/region_mean": (low + high) / tokens,
        "clip_ratio/low_min": min(x for x, _ in sequences),
        "clip_ratio/high_max": max(x for _, x in sequences),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)


def test_the_reference_moves_as_a_mix_every_so_many_updates():
    trainer = TableTrainer(beta=0.1, sync_ref_model=True, ref_model_sync_steps=2)
    state, ref, moved = trainer.create_train_state(KEY), TABLE.astype(np.float64), []
    for step in range(1, 6):
        before = np.asarray(state.frozen["ref"]["table"])
        (batch,) = batches(trainer, state)
        state, _ = trainer.train_step(state, batch)
        now = np.asarray(state.frozen["ref"]["table"])
        moved.append(bool((now != before).any()))
        if step % 2 == 0:
            ref = 0.6 * np.asarray(state.params["table"], np.float64) + 0.4 * ref
        np.testing.assert_allclose(now, ref, rtol=1e-5)
    assert moved == [False, True, False, True, False]


def test_what_cannot_be_meant_is_refused_when_the_trainer_is_made():
    def refused(**options):
        with pytest.raises(ValueError) as caught:
            TableTrainer(**options)
        return str(caught.value)

    assert "at least 2" in refused(num_generations=1)
    assert "unknown loss_type 'dpo'. Did you mean dapo? Known: dapo" in refused(loss_type="dpo")
    assert "unknown kl_estimator 'k4'" in refused(kl_estimator="k4", beta=0.1)
    assert "unknown scale_rewards" in refused(scale_rewards="max")
    assert "unknown importance_sampling_level" in refused(importance_sampling_level="word")
    assert "beta 0.0 and lora None" in refused(sync_ref_model=True)
    assert "got 6 and 4" in refused(
        prompts_per_item=3, completions_per_update=6, gradient_accumulation_steps=4
    )
    assert "2 x 4 completions of an item" in refused(prompts_per_item=2, completions_per_update=3)
    assert "needs prompts_per_item" in refused(completions_per_update=3)


def test_an_item_of_another_size_is_refused():
    trainer = TableTrainer(prompts_per_item=4, completions_per_update=8)
    found = collected()
    with pytest.raises(ValueError, match="must have 4 prompts .*, got 3. Drop the last"):
        list(trainer._split(found.take([0, 1, 0]).rollout, {}, KEY))


# Groups that teach nothing are replaced.


def item_of(useful, extra_prompts):
    def part(flags):
        return {
            "prompt_ids": [[1, 2]] * len(flags),
            "rows": [{"prompt": f"{i}", "useful": flag} for i, flag in enumerate(flags)],
        }

    return part(useful) | {"extra_prompts": part(extra_prompts)}


@pytest.mark.parametrize(
    "rounds, useful, extra_prompts, replaced, left_flat",
    [
        (0, [1, 0, 0], [1, 1, 1], None, 2),
        (
            1,
            [1, 0, 0],
            [1, 0, 1],
            1,
            1,
        ),  # of the extra_prompts of a round, as many as are flat are drawn
        (2, [1, 0, 0], [1, 0, 1, 0, 1, 1], 1, 1),  # and in the next one the one after those
        (3, [1, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1, 0], 2, 0),
        (5, [0, 0, 0], [0, 0, 1], 1, 2),  # the extra_prompts run out
        (5, [1, 1, 1], [1, 1, 1], 0, 0),
    ],
)
def test_groups_without_variance_are_replaced_within_bounds(
    rounds, useful, extra_prompts, replaced, left_flat
):
    def by_row(completions, useful):
        return [float(u and i % 2) for i, u in enumerate(useful)]

    trainer = TableTrainer(reward_funcs=[by_row], max_resample_rounds=rounds)
    state = trainer.create_train_state(KEY)
    item = item_of(useful, extra_prompts)
    found = trainer.collect(state, item, KEY)
    found = trainer.resample(state, item, found) if rounds else found
    assert found.metrics.get("resampled_groups") == replaced
    wanted = None if replaced is None else sum(useful) / 3 / 2  # half of a useful group is right
    assert found.metrics.get("reward_drawn") == wanted
    assert (found.rewards.std(axis=1) == 0).sum() == left_flat
    assert len(found.rollout.rows) == 3 == len(found.rollout.texts)
    for row, rewards in zip(found.rollout.rows, found.rewards, strict=True):
        assert rewards.tolist() == ([0, 1, 0, 1] if row["useful"] else [0] * 4)


def test_fresh_groups_are_drawn_by_keys_of_their_own_and_failures_are_counted():
    def fails(completions, **kwargs):
        return [float("nan")] + [1.0] * (len(completions) - 1)

    trainer = TableTrainer(reward_funcs=[fails], max_resample_rounds=1)
    trainer.rewards.tally.max_errors = 1.0
    state = trainer.create_train_state(KEY)
    drawn = []
    generate = trainer.generate
    trainer.generate = lambda *a, **k: drawn.append(generate(*a, **k)) or drawn[-1]
    with pytest.warns(UserWarning, match="functions failed on|no reward"):
        item = item_of([0, 0], [0, 0])
        found = trainer.collect(state, item, trainer._key(state, 1))
        found = trainer.resample(state, item, found)
    assert found.metrics["reward_errors"] == 2 and found.metrics["resampled_groups"] == 0
    assert drawn[0].completion_ids.tolist() != drawn[1].completion_ids.tolist()


# The transformer.


@pytest.fixture(scope="module")
def model_trainer(tiny_model, tiny_params):
    def make(**options):
        options = {"num_generations": G, "params": tiny_params} | options
        return GRPOTrainer(
            tiny_model,
            options.pop("optimizer", optax.sgd(1.0)),
            reward_funcs=[lambda completions: [c.count("b") for c in completions]],
            tokenizer=Letters(),
            sampling=SamplingConfig(max_new_tokens=C, temperature=TEMPERATURE),
            **options,
        )

    return make


def separate_rows(given):
    """Ids, positions and segments of prompt and completion in a row of their own each."""
    L = 5
    ids = np.zeros((P * G, L + C), np.int32)
    segments = np.zeros_like(ids)
    for row, (p, g) in enumerate(np.ndindex(P, G)):
        n, c = given.prompt_lengths[p], LENGTHS[p, g]
        ids[row, : n + c] = [*given.prompt_ids[p, :n], *given.completion_ids[p, g, :c]]
        segments[row, : n + c] = 1
    return ids, np.tile(np.arange(L + C, dtype=np.int32), (P * G, 1)), segments


def dense_logprobs(model, params, given):
    """Log-probabilities and entropies of real tokens, `[p][g]`, from whole logits of each row."""
    logits = model.apply({"params": params}, *separate_rows(given)) / TEMPERATURE
    logs = jax.nn.log_softmax(logits)
    logprobs, entropies = [[] for _ in range(P)], [[] for _ in range(P)]
    for row, (p, g) in enumerate(np.ndindex(P, G)):
        n, c = given.prompt_lengths[p], LENGTHS[p, g]
        here = logs[row, n - 1 : n + c - 1]
        logprobs[p].append(here[np.arange(c), given.completion_ids[p, g, :c]])
        entropies[p].append(-(jnp.exp(here) * here).sum(axis=1))
    return logprobs, entropies


@pytest.fixture(scope="module")
def dense(tiny_model, tiny_params):
    """Completions whose old log-probabilities are near the model's, those values, and their vjp."""
    drawn = rollout()
    (logprobs, entropies), vjp = jax.vjp(
        jax.jit(lambda params: dense_logprobs(tiny_model, params, drawn)), tiny_params
    )
    near = np.zeros((P, G, C))
    for p, g in np.ndindex(P, G):
        near[p, g, : LENGTHS[p, g]] = logprobs[p][g]
    return collected(old=near), logprobs, entropies, vjp


@pytest.mark.parametrize(
    "options",
    [
        {"entropy_coef": 0.1, "mask_truncated_completions": True},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.2},
        {"gradient_accumulation_steps": 4},  # two completions to a row
    ],
    ids=["dapo", "gspo", "rows of two"],
)
def test_loss_and_gradient_with_a_shared_prompt_are_those_of_dense_separate_rows(
    model_trainer, tiny_params, dense, options
):
    found, logprobs, entropies, vjp = dense
    ref = np.zeros((P, G, C))
    for p, g in np.ndindex(P, G):
        ref[p, g, : LENGTHS[p, g]] = logprobs[p][g]  # the reference is the start

    def loss_of(logprobs, entropies):
        return looped_loss(logprobs, entropies, found, options, ref)

    expected, cotangents = jax.value_and_grad(loss_of, argnums=(0, 1))(logprobs, entropies)
    (gradient,) = vjp(cotangents)
    trainer = model_trainer(**options)
    state, metrics = update(trainer, found=found)
    np.testing.assert_allclose(metrics["loss"], expected, atol=1e-5)
    jax.tree.map(
        lambda new, old, g: np.testing.assert_allclose(old - new, g, atol=1e-5),
        state.params, tiny_params, gradient,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"loss_type": "grpo", "scale_rewards": "none"}])
def test_a_group_of_zero_advantages_is_not_computed_and_changes_no_parameter(tiny_model, options):
    """20 updates, ratios other than 1 among them, with groups of equal rewards in most."""

    def run(trainer_type):
        trainer = trainer_type(
            tiny_model,
            optax.adam(0.01),
            reward_funcs=[lambda completions: [float("b" in c) for c in completions]],
            tokenizer=Letters(),
            sampling=SamplingConfig(max_new_tokens=4),
            num_generations=3,
            num_iterations=2,
            **options,
        )
        seen = []
        state = trainer.create_train_state(KEY)
        for item in items_of(10):
            for given in trainer.make_batches(state, item):
                tokens = int((given.batch["segment_ids"] > 0).sum())
                state, metrics = trainer.train_step(state, given.batch)
                seen.append((given.metrics, tokens, float(metrics["loss"])))
        return jax.device_get(state.params), seen

    class Whole(GRPOTrainer):
        skips_zero_advantages = False

    (params, found), (wanted, whole) = run(GRPOTrainer), run(Whole)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, wanted)
    np.testing.assert_allclose([x[2] for x in found], [x[2] for x in whole], atol=1e-6)
    skipped = [m["frac_groups_skipped"] for m, *_ in found if m]
    assert skipped == [m["frac_reward_zero_std"] for m, *_ in whole if m]
    assert 0 < np.mean(skipped) < 1
    assert sum(x[1] for x in found) < 0.8 * sum(x[1] for x in whole)


@pytest.mark.parametrize("options", [{"beta": 0.1}, {"entropy_coef": 0.1}])
def test_with_a_penalty_every_group_is_computed(options):
    assert TableTrainer().skips_zero_advantages
    assert not TableTrainer(**options).skips_zero_advantages


def test_the_subclass_of_the_documentation_learns_from_a_plain_list(tiny_model):
    """Six lines, a lambda for a reward, a list of items; three seeds, for a token the model has
    no liking for."""
    source = grpo_trainer.__doc__.partition("only the advantage:\n")[2].partition(
        "\n\nDifferences"
    )[0]
    namespace = {"GRPOTrainer": GRPOTrainer, "np": np}
    exec(textwrap.dedent(source), namespace)
    assert len(source.strip().splitlines()) <= 6
    trainer = namespace["MyTrainer"](
        tiny_model,
        optax.adam(0.02),
        reward_funcs=[lambda completions: [c.count("b") / 4 for c in completions]],
        tokenizer=Letters(),
        sampling=SamplingConfig(max_new_tokens=4),
        num_generations=8,
    )
    items = items_of(25)
    for seed in range(3):
        state = trainer.create_train_state(jax.random.key(seed))
        before = trainer.validate(state, items[:2])["reward"]
        state = trainer.train(items, num_epochs=1, key=jax.random.key(seed))
        after = trainer.validate(state, items[:2])["reward"]
        assert before < 0.2 and after > 0.7, (seed, before, after)
