"""The configuration of PPO: its flags, what is refused, and that every option arrives."""

import dataclasses
from types import SimpleNamespace

import pages
import pytest

from relax.config import GRPOConfig, PPOConfig, options
from relax.config.grpo import GRPOSection
from relax.config.loader import ConfigLoader
from relax.config.ppo import PPOSection
from relax.engine.recipes.ppo import rollout_sizes, train_ppo
from relax.errors import ConfigError

# Adding, renaming or removing a flag is a visible act: it changes this list.
OWN_FLAGS = """
cliprange cliprange_value critic_learning_rate critic_warmup_steps dual_clip entropy_coef gamma
kl_coef kl_estimator kl_horizon kl_target lam loss_chunk_size missing_eos_penalty num_mini_batches
num_ppo_epochs reward_at target_kl value_model vf_coef whiten_rewards
""".split()
GIVEN = {"dataset_name": "rows.jsonl", "reward_funcs": ["exact_match"]}
ONE_UPDATE = {"num_ppo_epochs": 1}


def config(**fields) -> PPOConfig:
    return PPOConfig().replace(**GIVEN | fields)


def test_the_list_of_flags_is_frozen():
    grpo = {field.name for field in dataclasses.fields(GRPOSection)}
    own = {"steps_per_generation", "num_iterations"}
    own |= {"agent", "agent_timeout_s", "agent_max_length"}
    shared = set(options(GRPOConfig)) - grpo - own
    assert set(options(PPOConfig)) == shared | set(OWN_FLAGS)
    assert not shared & set(OWN_FLAGS)


def test_the_embedded_run_and_the_plainest_run_are_valid():
    PPOConfig().replace(**PPOConfig.demo).validate()
    config().validate()


def test_a_saved_configuration_reads_back_equal(tmp_path):
    saved = config(reward_at="after_eos", kl_target=6.0, value_model="policy", target_kl=0.1)
    (tmp_path / "config.json").write_text(saved.to_json())
    assert ConfigLoader(tmp_path / "config.json", PPOConfig).load() == saved


REFUSED = [
    ({"per_device_train_batch_size": 6, "num_generations": 4}, "num_generations 4 does not divide",
     "per_device_train_batch_size 6 x 1", "4 or 8 would fit"),
    ({"per_device_train_batch_size": 3, "num_mini_batches": 2, "num_generations": 4},
     "3 x 2 micro-batches", "2 or 4 would fit"),
    # no reference
    ({"kl_horizon": 100.0}, "kl_horizon has no effect: kl_target is none"),
    # the critic
    ({"critic_warmup_steps": 10, "max_steps": 10}, "leave steps for the policy, got 10 of 10"),
    # shared with GRPO
    ({"reward_funcs": []}, "reward_funcs must name a reward function"),
    ({"reward_weights": [1.0, 2.0]}, "got 2 for 1"),
    ({"pass_reward": 0.5}, "pass_reward has no effect: no rows are held out"),
    # ranges
    ({"kl_estimator": "k2"}, "kl_estimator must be"),
    ({"reward_at": "eos"}, "reward_at must be"),
    ({"gamma": 1.5}, "gamma must be at most 1"),
    ({"lam": -0.1}, "lam must be at least 0"),
    ({"vf_coef": 0.0}, "vf_coef must be above 0"),
    ({"missing_eos_penalty": -1.0}, "missing_eos_penalty must be above 0"),
    ({"num_mini_batches": 0}, "num_mini_batches must be at least 1"),
    ({"critic_learning_rate": 0.0}, "critic_learning_rate must be above 0"),
]  # fmt: skip


@pytest.mark.parametrize(
    "case", REFUSED, ids=[" ".join(f"{k}={v}" for k, v in case[0].items()) for case in REFUSED]
)
def test_what_cannot_be_meant_is_refused_in_one_sentence(case):
    fields, *parts = case
    with pytest.raises(ConfigError) as caught:
        config(**fields).validate()
    said = str(caught.value)
    assert all(part in said for part in parts), said
    assert len(said.splitlines()) == 1, said


# A sweep over another option may hold these fixed.
WARNED = [
    ({"kl_coef": 0.0, "kl_estimator": "k3"}, "kl_estimator has no effect: kl_coef is 0"),
    ({"kl_coef": 0.0, "kl_target": 6.0}, "kl_target has no effect: kl_coef is 0"),
    (ONE_UPDATE | {"cliprange": 0.1}, "cliprange has no effect: a rollout is one step"),
    (ONE_UPDATE | {"cliprange_value": 0.1}, "cliprange_value has no effect: a rollout is one"),
    ({"dual_clip": 1.1}, "dual_clip has no effect: cliprange 0.2 bounds the ratio by less"),
    (ONE_UPDATE | {"dual_clip": 3.0}, "dual_clip has no effect: a rollout is one step"),
    (ONE_UPDATE | {"target_kl": 0.1}, "target_kl has no effect", "num_ppo_epochs or"),
    ({"top_k": 5, "recompute_old_logprobs": True}, "recompute_old_logprobs has no effect: top_k"),
]  # fmt: skip


@pytest.mark.parametrize(
    "case", WARNED, ids=[" ".join(f"{k}={v}" for k, v in case[0].items()) for case in WARNED]
)
def test_what_a_sweep_may_hold_fixed_is_warned_of_in_one_sentence(case):
    fields, *parts = case
    checked = config(**{"dtype": "float32"} | fields)
    checked.check()
    [said] = checked.warnings()
    assert all(part in said for part in parts), said


FITTING = [
    ONE_UPDATE | {"num_mini_batches": 2, "cliprange": 0.1},
    ONE_UPDATE | {"dtype": "bfloat16", "target_kl": 0.1},
    {"num_generations": 4, "per_device_train_batch_size": 2, "num_mini_batches": 2},
    {"kl_target": 6.0, "kl_horizon": 100.0},
    {"use_peft": True, "value_model": "policy"},
]


@pytest.mark.parametrize(
    "fields", FITTING, ids=lambda f: " ".join(f"{k}={v}" for k, v in f.items())
)
def test_what_has_an_effect_is_accepted(fields):
    config(**fields).validate()  # where a warning would be an error


# Every option arrives at the trainer, another value than the default.

OPTIONS = {
    "num_ppo_epochs": 3, "num_mini_batches": 2, "value_model": "policy",
    "critic_learning_rate": 0.5, "critic_warmup_steps": 5, "vf_coef": 0.7, "cliprange_value": 0.3,
    "kl_coef": 0.2, "kl_estimator": "k3", "kl_target": 5.0, "kl_horizon": 99.0,
    "reward_at": "after_eos", "missing_eos_penalty": 0.5, "whiten_rewards": True, "gamma": 0.9,
    "lam": 0.8, "cliprange": 0.1, "dual_clip": 3.0, "entropy_coef": 0.1, "target_kl": 0.3,
    "loss_chunk_size": 9,
}  # fmt: skip


def told(monkeypatch, **fields) -> dict:
    """All that can be seen of a trainer and its optimizers."""
    trainer = pages.trainer_of(train_ppo, config(**fields), Model(), monkeypatch)
    assert trainer.updates_per_item == rollout_sizes(config(**fields)).updates_per_item
    found = {k: v for k, v in vars(trainer).items() if isinstance(v, int | float | str | tuple)}
    states = trainer.optimizer.init({"policy": {}, "value": {}}).parts
    return found | {
        "clip": trainer.clip,
        "critic": trainer.value_model is not None,
        "policy state": type(states["policy"]).__name__,
        "critic rate": str(states["value"]),
    }


class Model(SimpleNamespace):
    lora, config = None, SimpleNamespace()

    def clone(self, **_):
        return self


def test_every_option_arrives_at_the_trainer(monkeypatch):
    monkeypatch.setattr("relax.trainers.ppo_trainer.trunk", lambda model: model)
    assert {f.name for f in dataclasses.fields(PPOSection)} == set(OPTIONS)
    default = told(monkeypatch)
    for name, value in OPTIONS.items():
        found = told(monkeypatch, **{name: value})
        assert {k for k in found if found[k] != default.get(k)}, name


def test_batch_sizes_count_completions():
    """2 micro-batches of 4 make an update; a rollout is 3 of them, taken 4 times over."""
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    made = rollout_sizes(config(**sizes, num_mini_batches=3, num_generations=2))
    assert made.plan == "8 completions (4 x 2), 12 per rollout of 12 prompts x 2"
