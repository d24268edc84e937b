"""The configuration of GRPO: its flags, what is refused, and that every option arrives."""

import dataclasses

import jax.numpy as jnp
import pages
import pytest

from relax.config import GRPOConfig, SFTConfig, options
from relax.config.grpo import GRPOSection, RolloutConfig
from relax.config.loader import ConfigLoader
from relax.engine.recipes.grpo import rollout_sizes, train_grpo
from relax.errors import ConfigError
from relax.trainers import GRPOTrainer

# Adding, renaming or removing a flag is a visible act: it changes this list.
OWN_FLAGS = """
agent agent_max_length agent_timeout_s async_rollouts beta cast_lm_head_to_fp32 clip_cov_lb
clip_cov_ratio clip_cov_ub curriculum curriculum_floor delta entropy_coef entropy_coef_delta
entropy_coef_max entropy_coef_min entropy_target environment_factory epsilon epsilon_high
eval_temperature importance_sampling_clip_max importance_sampling_correction
importance_sampling_level importance_sampling_mode kl_cov_coef kl_cov_ratio kl_estimator
kl_in_reward log_completions mask_truncated_completions max_completion_length max_resample_rounds
max_reward_errors max_tool_calling_iterations min_p multi_objective_aggregation
num_completions_to_print num_generations num_generations_eval num_iterations
off_policy_mask_threshold pass_reward recompute_old_logprobs ref_model_mixup_alpha
ref_model_sync_steps repetition_penalty reward_funcs reward_kwargs reward_timeout_s reward_weights
reward_workers rollout_devices rollout_dtype rollout_reuse rollout_slots sapo_temperature_neg
sapo_temperature_pos scale_rewards steps_per_generation sync_ref_model temperature tool_format
tool_timeout_s tool_workers tools top_entropy_quantile top_k top_p use_adaptive_entropy
use_bias_correction_kl vespo_k_neg vespo_k_pos vespo_lambda_neg vespo_lambda_pos
""".split()
SFT_ONLY = """
assistant_only_loss completion_only_loss dataset_text_field eval_packing
label_smoothing_factor max_length neftune_noise_alpha packing packing_strategy pad_to_multiple_of
thinking train_on truncation_mode z_loss_coef
""".split()

GIVEN = {"dataset_name": "rows.jsonl", "reward_funcs": ["exact_match"]}
SEVERAL = {"num_iterations": 2}
AGENT = {"agent": "own.py:solve"}


def config(**fields) -> GRPOConfig:
    return GRPOConfig().replace(**GIVEN | fields)


def test_the_list_of_flags_is_frozen():
    expected = (set(options(SFTConfig)) - set(SFT_ONLY)) | set(OWN_FLAGS)
    assert set(options(GRPOConfig)) == expected
    assert not set(OWN_FLAGS) & set(options(SFTConfig))


def test_the_embedded_run_and_the_plainest_run_are_valid():
    GRPOConfig().replace(**GRPOConfig.demo).validate()
    config().validate()


def test_a_saved_configuration_reads_back_equal(tmp_path):
    saved = config(loss_type="grpo", num_iterations=3, epsilon=0.1, reward_kwargs={"f": {"k": 2}})
    (tmp_path / "config.json").write_text(saved.to_json())
    assert ConfigLoader(tmp_path / "config.json", GRPOConfig).load() == saved


REFUSED = [
    ({"agent": "a.py:f", "async_rollouts": 1}, "agent excludes async_rollouts"),
    ({"rollout_reuse": True, "async_rollouts": 1}, "rollout_reuse excludes async_rollouts"),
    ({"rollout_reuse": True, "repetition_penalty": 1.1}, "excludes repetition_penalty"),
    ({"rollout_reuse": True, "tools": ["a.py:f"]}, "rollout_reuse excludes tools"),
    (SEVERAL | {"async_rollouts": 3}, "a multiple of the 2 updates of a rollout, got 3; 4 would"),
    ({"rollout_devices": 1}, "rollout_devices has no effect: async_rollouts is 0"),
    ({"num_generations": 1}, "num_generations must be at least 2", "got 1"),
    # numbers that do not divide
    ({"per_device_train_batch_size": 6}, "num_generations 8", "per_device_train_batch_size 6",
     "per_device_train_batch_size 8 would fit"),
    ({"per_device_train_batch_size": 20}, "per_device_train_batch_size 16 or 24 would fit"),
    ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
     "per_device_train_batch_size 3 x 4 micro-batches", "2 or 4 would fit"),
    ({"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3}, "size 8 would fit"),
    ({"steps_per_generation": 3, "gradient_accumulation_steps": 2},
     "steps_per_generation must be a multiple of gradient_accumulation_steps, got 3 and 2"),
    # no reward, or not as many weights
    ({"reward_funcs": []}, "reward_funcs must name a reward function"),
    ({"reward_weights": [1.0, 2.0]}, "reward_weights must be one per reward function, got 2 for 1"),
    ({"num_completions_to_print": 3}, "num_completions_to_print has no effect", "log_completions"),
    # no reference
    ({"sync_ref_model": True, "beta": 0.1, "use_peft": True}, "sync_ref_model excludes use_peft"),
    ({"sync_ref_model": True, "beta": 0.1, "freeze": "norm"}, "sync_ref_model excludes use_peft"),
    ({"ref_model_sync_steps": 5, "beta": 0.1}, "ref_model_sync_steps has no effect"),
    ({"ref_model_mixup_alpha": 0.5, "beta": 0.1}, "ref_model_mixup_alpha has no effect"),
    # sampling
    ({"eval_temperature": 0.5}, "eval_temperature has no effect: no rows are held out"),
    ({"num_generations_eval": 2}, "num_generations_eval has no effect: no rows are held out"),
    ({"pass_reward": 0.5}, "pass_reward has no effect: no rows are held out"),
    ({"test_size": 2, "eval_temperature": 0.0, "num_generations_eval": 4},
     "eval_temperature 0 always gives the same completion"),
    # ranges
    ({"temperature": 0.0}, "temperature must be above 0"),
    ({"beta": -0.1}, "beta must be at least 0"),
    ({"max_reward_errors": 1.5}, "max_reward_errors must be at most 1"),
    ({"loss_type": "sapoo"}, "loss_type must be one of dapo, ", "Did you mean sapo?"),
    ({"scale_rewards": "maxlr"}, "scale_rewards must be one of group, ", "Did you mean maxrl?"),
    # variants of the loss
    ({"scale_rewards": "pass@16"}, "compares groups of 16 completions, and num_generations is 8"),
    ({"clip_cov_lb": 9.0, "loss_type": "clip_cov"}, "clip_cov_lb must be below clip_cov_ub"),
    ({"use_adaptive_entropy": True, "entropy_coef_min": 2.0}, "at most entropy_coef_max"),
    ({"entropy_target": 0.5}, "entropy_target has no effect: use_adaptive_entropy is false"),
    ({"loss_type": "gmpo", "top_entropy_quantile": 0.2}, "excludes loss_type gmpo"),
    ({"beta": 0.1, "kl_in_reward": True, "multi_objective_aggregation": "normalize_then_sum"},
     "kl_in_reward excludes"),
    ({"agent_timeout_s": 5.0}, "agent_timeout_s has no effect: agent is none"),
    (AGENT | {"environment_factory": "calculator"}, "agent excludes environment_factory"),
    (AGENT | {"top_k": 5}, "agent excludes top_k"),
    (AGENT | {"max_completion_length": 64, "agent_max_length": 64}, "leaves no room for a prompt"),
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
    ({"kl_estimator": "k1"}, "kl_estimator has no effect: beta is 0"),
    ({"kl_in_reward": True}, "kl_in_reward has no effect: beta is 0"),
    ({"sync_ref_model": True}, "sync_ref_model has no effect: beta is 0"),
    ({"epsilon": 0.1}, "epsilon has no effect: a rollout is one step", "num_iterations"),
    (SEVERAL | {"loss_type": "cispo_absolute", "epsilon": 0.1}, "epsilon has no effect",
     "loss_type cispo_absolute does not use it"),
    ({"epsilon_high": 0.28}, "epsilon_high has no effect: a rollout is one step"),
    ({"delta": 2.0}, "delta has no effect: a rollout is one step"),
    (SEVERAL | {"loss_type": "cispo", "delta": 2.0}, "delta has no effect: loss_type cispo"),
    (SEVERAL | {"delta": 1.1}, "delta has no effect", "bounds the ratio by less"),
    ({"loss_type": "cispo", "importance_sampling_level": "sequence"},
     "importance_sampling_level has no effect: a rollout is one step"),
    ({"sapo_temperature_pos": 2.0}, "sapo_temperature_pos has no effect: loss_type dapo"),
    (SEVERAL | {"loss_type": "luspo", "importance_sampling_level": "trajectory"},
     "importance_sampling_level has no effect: loss_type luspo is defined with its own"),
    ({"scale_rewards": "batch", "multi_objective_aggregation": "normalize_then_sum"},
     "scale_rewards has no effect"),
    ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32 has no effect"),
    ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold has no effect"),
    ({"top_k": 5, "recompute_old_logprobs": True}, "recompute_old_logprobs has no effect: top_k"),
    ({"rollout_dtype": "float32"}, "rollout_dtype has no effect: it is the dtype already"),
    ({"importance_sampling_clip_max": 2.0}, "has no effect: rollout_dtype is none"),
    ({"reward_workers": 2}, "reward_workers has no effect: more processes than reward functions"),
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
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    {"per_device_train_batch_size": 4, "steps_per_generation": 4, "epsilon_high": 0.28},
    {"dtype": "bfloat16", "epsilon": 0.1},
    {"use_peft": True, "lora_dropout": 0.1, "epsilon": 0.1},
    {"test_size": 2, "eval_temperature": 0.0, "num_generations_eval": 1},
    {"loss_type": "cispo_absolute", "epsilon_high": 5.0},
    {"loss_type": "own.py:mine", "sapo_temperature_pos": 2.0, "scale_rewards": "own.best"},
    SEVERAL | {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    SEVERAL | {"delta": 1.5, "epsilon_high": 0.3},
    AGENT | {"reward_funcs": [], "agent_max_length": 1024, "top_p": 0.9},
]


@pytest.mark.parametrize(
    "fields", FITTING, ids=lambda f: " ".join(f"{k}={v}" for k, v in f.items())
)
def test_what_has_an_effect_is_accepted(fields):
    config(**fields).validate()  # where a warning would be an error


def test_adapters_have_no_dropout_unless_asked_for():
    """The sampler has none: with it the ratio of an update would be noise."""
    assert GRPOConfig().peft.lora_dropout == 0.0 and SFTConfig().peft.lora_dropout == 0.05


# Every option arrives at the trainer, another value than the default.

OPTIONS = {
    "beta": 0.1, "kl_estimator": "k2", "kl_in_reward": True, "use_bias_correction_kl": False,
    "loss_type": "grpo", "epsilon": 0.1,
    "epsilon_high": 0.3, "delta": 1.5, "importance_sampling_level": "sequence",
    "scale_rewards": "none", "mask_truncated_completions": True, "entropy_coef": 0.1,
    "max_resample_rounds": 2, "sync_ref_model": True, "ref_model_mixup_alpha": 0.5,
    "ref_model_sync_steps": 7, "loss_chunk_size": 9, "num_generations": 4,
    "max_completion_length": 33, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1,
    "repetition_penalty": 1.1, "steps_per_generation": 4, "num_iterations": 3,
    "recompute_old_logprobs": True, "num_generations_eval": 6, "eval_temperature": 0.5,
    "rollout_slots": 3, "pass_reward": 0.5, "rollout_dtype": "bfloat16",
    "async_rollouts": 2, "rollout_reuse": True,
    "importance_sampling_correction": False, "importance_sampling_mode": "sequence_mask",
    "importance_sampling_clip_max": 2.0,
    "multi_objective_aggregation": "normalize_then_sum",
    "off_policy_mask_threshold": 0.5, "top_entropy_quantile": 0.5, "use_adaptive_entropy": False,
    "entropy_target": 0.3, "entropy_coef_delta": 0.1, "entropy_coef_min": 0.1,
    "entropy_coef_max": 0.9, "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 2.0,
    "vespo_k_pos": 1.0, "vespo_lambda_pos": 1.0, "vespo_k_neg": 1.0, "vespo_lambda_neg": 1.0,
    "clip_cov_ratio": 0.1, "clip_cov_lb": 2.0, "clip_cov_ub": 6.0, "kl_cov_ratio": 0.1,
    "kl_cov_coef": 0.5, "cast_lm_head_to_fp32": True,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Model:
    dtype: object
    lora: object = None
    cast_lm_head_to_fp32: bool = False
    clone = dataclasses.replace


@pytest.fixture
def trainer_of(monkeypatch):
    """Makes the trainer of the page of GRPO, whose rewards start no workers."""

    def make(**fields) -> GRPOTrainer:
        c = config(**fields)
        trainer = pages.trainer_of(train_grpo, c, Model(jnp.float32), monkeypatch)
        assert trainer.updates_per_item == rollout_sizes(c).updates_per_item
        return trainer

    return make


def told(trainer: GRPOTrainer) -> dict:
    """All numbers of a trainer."""
    kinds = int | float | str | tuple | None
    plain = {k: v for k, v in vars(trainer).items() if isinstance(v, kinds)}
    plain["cast"] = trainer.model.cast_lm_head_to_fp32
    plain["reuses"] = trainer.drafts is not None
    plain["ahead"] = trainer.ahead and trainer.ahead.count
    plain |= {"correction": trainer.correction, "rollout_dtype": trainer.rollout_model.dtype}
    for name in ("sampling", "eval_sampling"):
        sampling = dataclasses.asdict(getattr(trainer, name))
        plain |= {f"{name}.{key}": value for key, value in sampling.items()}
    return plain


def test_every_option_arrives_at_the_trainer(trainer_of):
    declared = {f.name for section in (GRPOSection, RolloutConfig)
                for f in dataclasses.fields(section)} | {"pass_reward"}  # fmt: skip
    declared -= {"agent", "agent_timeout_s", "agent_max_length"}  # of a process of its own
    assert declared == {*OPTIONS, "rollout_devices"}  # which needs more devices than there are
    plain = {"beta": 0.3, "use_adaptive_entropy": True}  # a reference, and a target
    corrected = plain | {"rollout_dtype": "bfloat16"}
    for name, value in OPTIONS.items():
        given = corrected if name.startswith("importance_sampling") else plain
        default, found = told(trainer_of(**given)), told(trainer_of(**given | {name: value}))
        assert {k for k in found if found[k] != default[k]}, name


def test_batch_sizes_count_completions(trainer_of):
    """2 micro-batches of 4 make an update; a rollout is 4 of them: 2 prompts of 8, 2 updates."""
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = trainer_of(**sizes, steps_per_generation=4)
    assert trainer.updates_per_item == 2 and trainer.row_size == 4
    plan = rollout_sizes(config(**sizes, steps_per_generation=4)).plan
    assert plan == "8 completions (4 x 2), 2 per rollout of 2 prompts x 8"
