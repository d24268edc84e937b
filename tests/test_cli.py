"""The strict command line: what is refused, what is read, and that nothing starts by mistake."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import relax
from relax.config import ConfigLoader, SFTConfig, options
from relax.config import cli as command_line
from relax.config.cli import read_command, run
from relax.config.foreign import (
    ADVICE,
    NEAREST_VALUES,
    RENAMED,
    SAME_VALUES,
    advice,
    nearest_value,
    own_value,
)
from relax.config.helptext import help_text
from relax.config.names import ALIASES
from relax.config.schema import TrainerConfig
from relax.config.settings import ALGORITHMS
from relax.errors import ConfigError, DataError

# Adding, renaming or removing a flag is a visible act: it changes this list.
FLAGS = """
adam_beta1 adam_beta2 adam_epsilon allow_config_change alpha_pattern assistant_only_loss
attn_implementation callbacks chat_template_path compilation_cache_dir completion_only_loss
coordinator data_seed dataset_cache_dir dataset_config dataset_kwargs dataset_name
dataset_test_split dataset_text_field dataset_train_split debug_nans dry_run dtype
early_stopping_patience early_stopping_threshold eos_token eval_dataset_name eval_on_start
eval_packing eval_reward_funcs eval_steps eval_strategy eval_tasks eval_tasks_limit freeze grace_s
gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_policy greater_is_better
heartbeat_s label_smoothing_factor learning_rate load_best_model_at_end logging_steps lora_alpha
lora_dropout lora_modules_to_save lora_r lora_target_modules loss_chunk_size loss_type
lr_scheduler_type max_eval_batches max_file_gib max_grad_norm max_json_depth max_length
max_new_tokens max_nonfinite_steps max_row_bytes max_steps merge_lora mesh metric_for_best_model
min_lr_rate mixing_strategy model_name_or_path momentum_dtype neftune_noise_alpha num_decay_steps
num_processes num_samples num_train_epochs offload_optimizer optim output_dir overwrite_output_dir
packing packing_strategy pad_to_multiple_of param_dtype per_device_eval_batch_size
per_device_train_batch_size print_examples process_id profile profile_steps quantize_base
rank_pattern report_to resume run_name save_async save_steps save_strategy save_total_limit seed
sharding_rules shuffle_dataset stop_sequences system_prompt template_memory_mib
template_output_ratio template_timeout_s test_size thinking train_on truncation_mode use_dora
use_peft use_rslora warmup_steps weight_decay z_loss_coef
""".split()


def started(*argv: str) -> SFTConfig | None:
    """The configuration that `main` is called with; None when it is not called."""
    configs = []
    run(SFTConfig, configs.append, list(argv))
    assert len(configs) <= 1
    return configs[0] if configs else None


def value(field: str, *argv: str):
    """The value of one field after a command line."""
    return started(*argv).flat()[field]


def refused(capsys, *argv: str) -> list[str]:
    """The `error:` lines of a command line that must start nothing and exit with 2."""
    with pytest.raises(SystemExit) as caught:
        run(SFTConfig, lambda config: pytest.fail("main was called"), list(argv))
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    *errors, last = err.splitlines()
    assert last.startswith("see --help: ")
    assert all(line.startswith("error: ") for line in errors)
    return [line.removeprefix("error: ") for line in errors]


def test_the_list_of_flags_is_frozen():
    assert sorted(options(SFTConfig)) == FLAGS


def all_options() -> set[str]:
    """The flags of all trainers; tools have names of their own, and join `ALGORITHMS` on import."""
    trainers = (c for c in ALGORITHMS.values() if issubclass(c, TrainerConfig))
    return set().union(*map(options, trainers))


def test_other_names_lead_to_fields_and_shadow_none():
    known = all_options()
    assert set(ALIASES.values()) <= set(FLAGS)
    assert {target for targets in RENAMED.values() for target in targets.split()} <= known
    assert known.isdisjoint({*ALIASES, *RENAMED, *ADVICE})


def test_advice_names_flags_that_exist():
    known = {*all_options(), "version"}
    for name, text in ADVICE.items():
        named = {word.removeprefix("no_") for word in re.findall(r"--(\w+)", text)}
        assert named <= known, name


def test_every_training_argument_of_transformers_is_an_option_or_has_advice():
    from transformers import TrainingArguments

    known = all_options()
    names = [field.name for field in dataclasses.fields(TrainingArguments)]
    assert len(names) > 100
    assert not [n for n in names if n not in known and n not in ALIASES and not advice(n, known)]


def test_every_optimizer_and_schedule_of_transformers_is_accepted_or_refused_with_the_nearest():
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

    for option, theirs in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
        own = get_args(options(SFTConfig)[option].type)
        names = [name.value for name in theirs]
        assert len(names) > len(own)
        accepted = [name for name in names if own_value(option, name) in own]
        assert not [n for n in names if n not in accepted and not nearest_value(option, n)]
        assert set(SAME_VALUES[option].values()) <= set(own)
    for option, values in NEAREST_VALUES.items():
        kinds = get_args(options(SFTConfig)[option].type)
        own = {value for kind in kinds for value in get_args(kind) or (kind,)}
        assert {near.replace(",", "").split()[0] for near in values.values()} <= {*own}


@pytest.mark.parametrize(
    ("name", "value", "ours"),
    [
        ("optim", "adamw_torch_fused", "adamw"),
        ("optim", "paged_lion_32bit", "lion"),
        ("lr_scheduler_type", "warmup_stable_decay", "wsd"),
    ],
)
def test_a_value_that_means_the_same_is_read_as_ours_in_flags_and_files(
    tmp_path, name, value, ours
):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({name: value}))
    for argv in ([f"--{name}={value}"], [f"--config={path}"]):
        assert started(*argv).flat()[name] == ours


# Fields of the configurations of TRL 1.16 that transformers' TrainingArguments does not have.
TRL = """
activation_offloading assistant_only_loss attn_implementation beta bnb_4bit_quant_storage
bnb_4bit_quant_type cache_implementation cast_lm_head_to_fp32 center_rewards_coefficient
chat_template_kwargs chat_template_path completion_only_loss dataset_config dataset_kwargs
dataset_name dataset_num_proc dataset_streaming dataset_test_split dataset_text_field
dataset_train_split delta desirable_weight disable_dropout discopop_tau ds3_gather_for_generation
dtype entropy_coef entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target eos_token
epsilon epsilon_high eval_packing f_alpha_divergence_coef f_divergence_type generation_batch_size
generation_kwargs ignore_bias_buffers importance_sampling_level label_smoothing ld_alpha
load_in_4bit load_in_8bit log_completions log_completions_hub_repo log_multimodal log_unique_prompts
lora_alpha lora_dropout lora_modules_to_save lora_r lora_target_modules lora_target_parameters
lora_task_type loss_type loss_weights mask_truncated_completions max_completion_length max_length
max_tool_calling_iterations min_p model_init_kwargs model_name_or_path model_revision
multi_objective_aggregation normalize_advantages num_completions_to_print num_generations
num_generations_eval num_iterations off_policy_mask_threshold packing packing_strategy
pad_to_multiple_of pad_token padding_free precompute_ref_batch_size precompute_ref_log_probs
ref_model_mixup_alpha ref_model_sync_steps repetition_penalty reward_clip_range reward_weights
router_aux_loss_coef sapo_temperature_neg sapo_temperature_pos scale_rewards shuffle_dataset
steps_per_generation sync_ref_model temperature top_entropy_quantile top_k top_p
transformers_continuous_batching_config truncation_mode trust_remote_code undesirable_weight
use_adaptive_entropy use_bias_correction_kl use_bnb_nested_quant use_dora use_peft use_rslora
use_transformers_continuous_batching use_transformers_paged use_vllm use_weighting vespo_k_neg
vespo_k_pos vespo_lambda_neg vespo_lambda_pos vllm_enable_sleep_mode vllm_gpu_memory_utilization
vllm_group_port vllm_importance_sampling_cap vllm_importance_sampling_clip_max
vllm_importance_sampling_clip_min vllm_importance_sampling_correction vllm_importance_sampling_mode
vllm_max_model_length vllm_mode vllm_model_impl vllm_server_base_url vllm_server_host
vllm_server_port vllm_server_timeout vllm_structured_outputs_regex vllm_tensor_parallel_size
""".split()


def test_every_option_of_trl_is_an_option_or_has_advice():
    known = all_options()
    assert not [name for name in TRL if name not in known and not advice(name, known)]


def test_no_flag_reads_as_the_negation_of_another():
    assert not [f for f in FLAGS for rest in (f[2:], f[3:]) if f[:2] == "no" and rest in FLAGS]


def test_no_arguments_start_with_the_defaults():
    assert started() == SFTConfig().replace(**SFTConfig.demo)


READ = [
    (["--learning_rate=3e-4"], "learning_rate", 3e-4),
    (["--learning_rate", "1"], "learning_rate", 1.0),
    (["--learning-rate", "3e-4"], "learning_rate", 3e-4),
    (["--max_steps", "-1"], "max_steps", -1),
    (["--max_steps=+5"], "max_steps", 5),
    (["--packing"], "packing", True),
    (["--packing", "true"], "packing", True),
    (["--packing", "1"], "packing", True),
    (["--packing=YES"], "packing", True),
    (["--packing", "false"], "packing", False),
    (["--packing=false"], "packing", False),
    (["--packing", "no"], "packing", False),
    (["--packing=0"], "packing", False),
    (["--no_packing"], "packing", False),
    (["--nopacking"], "packing", False),
    (["--no-packing"], "packing", False),
    (["--no-shuffle-dataset"], "shuffle_dataset", False),
    (["--packing", "--seed", "3"], "packing", True),
    (["--completion_only_loss"], "completion_only_loss", True),
    (["--no_completion_only_loss"], "completion_only_loss", False),
    (["--completion_only_loss=none"], "completion_only_loss", None),
    (["--max_length", "none"], "max_length", None),
    (["--max_length=Null"], "max_length", None),
    (["--model_name_or_path=123"], "model_name_or_path", "123"),
    (["--model_name_or_path", "1e10"], "model_name_or_path", "1e10"),
    (["--model_name_or_path", "0x10"], "model_name_or_path", "0x10"),
    (["--model_name_or_path", "1_000"], "model_name_or_path", "1_000"),
    (["--model_name_or_path", "2024_01"], "model_name_or_path", "2024_01"),
    (["--model_name_or_path", "main#1"], "model_name_or_path", "main#1"),
    (["--model_name_or_path", "a,b"], "model_name_or_path", "a,b"),
    (["--model_name_or_path", "a=b"], "model_name_or_path", "a=b"),
    (["--model_name_or_path", "['a']"], "model_name_or_path", "['a']"),
    (["--model_name_or_path", "none"], "model_name_or_path", None),
    (["--output_dir", "None"], "output_dir", "None"),
    (["--output_dir", "-1"], "output_dir", "-1"),
    (["--output_dir=--help"], "output_dir", "--help"),
    (["--system_prompt", "- be brief"], "system_prompt", "- be brief"),
    (["--system_prompt", "--- be brief"], "system_prompt", "--- be brief"),
    (["--system_prompt", " 'x' \"y\"\n"], "system_prompt", " 'x' \"y\"\n"),
    (["--eval_strategy", "no"], "eval_strategy", "no"),
    (["--lr_scheduler_type=cosine"], "lr_scheduler_type", "cosine"),
    (["--warmup_ratio", "0.1"], "warmup_steps", 0.1),
    (["--warmup-ratio=0.1"], "warmup_steps", 0.1),
    (["--resume_from_checkpoint", "out/40"], "resume", "out/40"),
    (["--allow_config_change=seed", "--resume=auto"], "allow_config_change", ["seed"]),
    (["--allow_config_change", "seed,dtype", "--resume=auto"], "allow_config_change",
     ["seed", "dtype"]),
    (["--allow_config_change", '["seed", "dtype"]', "--resume=auto"], "allow_config_change",
     ["seed", "dtype"]),
    (["--allow_config_change=[]"], "allow_config_change", []),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "field", "expected"), READ, ids=[" ".join(a) for a, *_ in READ])
def test_value_is_read_by_its_declared_type(argv, field, expected):
    found = value(field, *argv)
    assert found == expected
    assert type(found) is type(expected)


STRAY = "unexpected argument "
REFUSED = [
    # unknown and misspelt names
    (["--learnng_rate=3e-4"], "unknown flag --learnng_rate. Did you mean --learning_rate?"),
    (["--lerning_rate", "1e-3"], "unknown flag --lerning_rate. Did you mean --learning_rate?"),
    (["--Learning_Rate=1"], "unknown flag --Learning_Rate. Did you mean --learning_rate?"),
    (["--learning", "1"], "unknown flag --learning. Did you mean --learning_rate?"),
    (["--no_packng"], "unknown flag --no_packng. Did you mean --no_packing?"),
    (["--warmup_ration=0.1"], "unknown flag --warmup_ration. Did you mean --warmup_ratio?"),
    (["--trace"], "unknown flag --trace."),
    (["--FIRE_METADATA=1"], "unknown flag --FIRE_METADATA."),
    (["--=5"], "unknown flag ''."),
    (["--a b"], "unknown flag 'a b'."),
    # names of other libraries
    (["--max_seq_length", "9"], "--max_seq_length is not a flag here: use --max_length."),
    (["--evaluation-strategy=no"],
     "--evaluation_strategy is not a flag here: use --eval_strategy."),
    (["--bf16"], "--bf16 is not a flag here: use --dtype bfloat16."),
    (["--fp16", "true"], "--fp16 is not a flag here: use --dtype bfloat16"),
    (["--no_cuda"], "--no_cuda is not a flag here: set JAX_PLATFORMS=cpu"),
    (["--torch_dtype=bfloat16"], "--torch_dtype is not a flag here: use --dtype."),
    (["--push_to_hub"], "--push_to_hub is not a flag here: runs upload nothing"),
    (["--hub_token", "x"], "--hub_token is not a flag here: runs upload nothing"),
    (["--deepspeed", "ds.json"], "--deepspeed is not a flag here: --mesh shards weights"),
    (["--fsdp", "full_shard"], "--fsdp is not a flag here: --mesh shards weights"),
    (["--load_in_4bit"], "--load_in_4bit is not a flag here: use --use_peft --quantize_base"),
    (["--use_liger_kernel"], "--use_liger_kernel is not a flag here: not needed: losses"),
    (["--tokenizer_name", "x"], "--tokenizer_name is not a flag here: the tokenizer is"),
    (["--trust_remote_code"], "--trust_remote_code is not a flag here: code that comes with"),
    (["--use_vllm"], "--use_vllm is not a flag here: completions come from the built-in"),
    (["--version"], "--version is not a flag here: `relax --version` prints the version."),
    (["--model=gpt"], "--model is not a flag here: use --model_name_or_path."),
    (["--dataset", "x"], "--dataset is not a flag here: use --dataset_name."),
    (["--batch_size", "4"],
     "--batch_size is not a flag here: use --per_device_train_batch_size."),
    (["--epochs", "4"], "--epochs is not a flag here: use --num_train_epochs."),
    (["--num_epochs", "4"], "--num_epochs is not a flag here: use --num_train_epochs."),
    (["--lr", "4"], "--lr is not a flag here: use --learning_rate."),
    (["--overwrite"], "--overwrite is not a flag here: use --overwrite_output_dir."),
    # flags of other algorithms
    (["--num_generations", "4"],
     "--num_generations is a flag of distill, grpo, online_dpo, ppo only."),
    (["--center_rewards_coefficient=1"], "--center_rewards_coefficient is a flag of reward only."),
    # mistyped values
    (["--packing", "stray"], "--packing must be true or false, got 'stray'"),
    (["--packing="], "--packing must be true or false, got ''"),
    (["--seed=1.5"], "--seed must be a whole number, got '1.5'"),
    (["--seed=abc"], "--seed must be a whole number, got 'abc'"),
    (["--seed=1_000"], "--seed must be a whole number, got '1_000'"),
    (["--seed=1e3"], "--seed must be a whole number, got '1e3'"),
    (["--seed", "\u0663"], "--seed must be a whole number, got '\u0663'"),
    (["--seed", "-5x"], "--seed must be a whole number, got '-5x'"),
    (["--seed=" + "9" * 5000], "--seed must be a whole number, got '9999"),
    (["--seed=none"], "--seed must be a whole number, got 'none'"),
    (["--learning_rate=1e--4"], "--learning_rate must be a finite number, got '1e--4'"),
    (["--learning_rate=1e400"], "--learning_rate must be a finite number, got '1e400'"),
    (["--learning_rate", "-inf"], "--learning_rate must be a finite number, got '-inf'"),
    (["--learning_rate", "nan"], "--learning_rate must be a finite number, got 'nan'"),
    (["--dtype", "fp32"], "--dtype must be one of float32, bfloat16 or none, got 'fp32'"),
    (["--output_dir="], "--output_dir must not be empty: omit it to use the default"),
    (["--output_dir", ""], "--output_dir must not be empty: omit it to use the default"),
    (["--allow_config_change=a,,b"], "--allow_config_change must be a list a,b without empty"),
    (["--allow_config_change=[1]"], "--allow_config_change must be a list of texts, got [1]"),
    (["--allow_config_change=[a"], "--allow_config_change must be a,b or a JSON list, got '[a'"),
    (["--warmup_ratio=5"], "--warmup_ratio must be at least 0 and below 1, got 5.0."),
    (["--print_config=maybe"], "--print_config must be true or false, got 'maybe'"),
    # missing and superfluous values
    (["--max_steps"], "--max_steps needs a value: --max_steps=INT"),
    (["--max_steps", "--packing"], "--max_steps needs a value: --max_steps=INT"),
    (["--dtype"], "--dtype needs a value: --dtype=float32|bfloat16"),
    (["--config"], "--config needs a value"),
    # values of other libraries
    (["--attn_implementation=sdpa"], "--attn_implementation must be one of auto, xla, cudnn, "
     "splash, got 'sdpa'; the nearest is auto, which takes the device's kernel"),
    (["--dtype=bf16"], "--dtype must be one of float32, bfloat16 or none, got 'bf16'; "),
    (["--optim=galore_adamw_8bit"], "--optim must be one of adamw, adamw_8bit, adafactor, lion, "
     "muon, sgd, schedule_free_adamw, got 'galore_adamw_8bit'; the nearest is adamw_8bit"),
    (["--lr_scheduler_type", "polynomial"], "--lr_scheduler_type must be one of linear, cosine, "
     "constant, constant_with_warmup, cosine_with_min_lr, wsd, got 'polynomial'; the nearest is "
     "linear, which is the same with power 1"),
    (["--no_packing", "false"], "--no_packing takes no value, got 'false': write --packing=false"),
    (["--nopacking=true"], "--nopacking takes no value, got 'true': write --packing=true"),
    (["--no_seed"], "--no_seed negates an option that is not true or false: write --seed=VALUE"),
    # repeated flags, in any spelling
    (["--seed=1", "--seed=2"], "--seed is given twice. Give it once."),
    (["--test-size=0.1", "--test_size=0.1"],
     "--test_size is given twice, as --test-size and as --test_size."),
    (["--packing", "--no_packing"],
     "--packing is given twice, as --packing and as --no_packing."),
    (["--warmup_steps=0", "--warmup_ratio=0.1"],
     "--warmup_steps is given twice, as --warmup_steps and as --warmup_ratio."),
    (["--config=a.json", "--config=b.json"], "--config is given twice."),
    # positional arguments
    (["x"], STRAY + "'x': every argument is a --flag or the value of one."),
    ([""], STRAY + "''"),
    (["-"], STRAY + "'-'"),
    (["--"], STRAY + "'--'"),
    (["-1"], STRAY + "'-1'"),
    (["--seed", "1", "evaluate"], STRAY + "'evaluate'"),
    (["--packing", "false", "x"], STRAY + "'x'"),
    (["learning_rate=1e-3"], STRAY + "'learning_rate=1e-3': every argument is a --flag or the "
     "value of one. Did you mean --learning_rate=1e-3?"),
    (["\u2014seed=1"], STRAY + "'\u2014seed=1': every argument is a --flag or the value of one. "
     "Did you mean --seed=1?"),
    (["--allow_config_change", "a", "b"], STRAY + "'b': every argument is a --flag or the value "
     "of one. Lists have commas: --allow_config_change a,b"),
    (["--system_prompt", "be", "brief"], STRAY + "'brief': every argument is a --flag or the "
     "value of one. A value with spaces is put in quotes."),
    # single dashes
    (["-s", "3"], "one-letter flags do not exist, got -s. Write the name out."),
    (["-l=3"], "one-letter flags do not exist, got -l."),
    (["-seed", "3"], "a flag starts with two dashes, got -seed. Did you mean --seed?"),
    (["-sed", "3"], "unknown flag --sed. Did you mean --seed?"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "message"), REFUSED, ids=[" ".join(a)[:40] for a, _ in REFUSED])
def test_wrong_argument_is_refused_and_starts_nothing(capsys, argv, message):
    errors = refused(capsys, *argv)
    assert len(errors) == 1
    assert errors[0].startswith(message)


def test_two_extra_values_are_two_problems_of_which_none_is_bound(capsys):
    errors = refused(capsys, "x", "5e-5", "--seed", "1", "extra1")
    assert [e.split(":")[0] for e in errors] == [STRAY + repr(a) for a in ("x", "5e-5", "extra1")]


def test_all_problems_are_listed_at_once(capsys):
    errors = refused(capsys, "--lerning_rate=1", "--seed=x", "--max_steps", "--packing=maybe")
    assert len(errors) == 4


def test_contradictions_are_refused_like_wrong_arguments(capsys):
    assert refused(capsys, "--eval_steps=5", "--packing", "--max_length=none") == [
        "packing needs max_length: packed rows are that long; give max_length",
        "eval_steps has no effect: eval_strategy is no; make it steps",
    ]


def test_config_file_is_read_and_flags_go_on_top(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text('{"hyperparams": {"seed": 1, "max_steps": 5}}')
    config = started("--config", str(path), "--max_steps", "9")
    assert (config.hyperparams.seed, config.hyperparams.max_steps) == (1, 9)
    path.write_text('{"sede": 1}')
    assert refused(capsys, f"--config={path}") == [
        f"{path}: unknown field sede. Did you mean seed?"
    ]


def test_print_config_prints_what_a_config_file_reads_and_starts_nothing(tmp_path, capsys):
    assert started("--print-config", "--seed=7", "--system_prompt", "\u00fc\udc80") is None
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out)["hyperparams"]["seed"] == 7
    path = tmp_path / "run.json"
    path.write_text(out)
    expected = SFTConfig().replace(**SFTConfig.demo, seed=7, system_prompt="\u00fc\udc80")
    assert ConfigLoader(path).load() == expected


def test_print_config_refuses_what_a_run_would_refuse(capsys):
    assert refused(capsys, "--print_config", "--eval_steps=5")


@pytest.mark.parametrize(
    "argv", [["--help"], ["-h"], ["--seed", "x", "--help"], ["--wrong", "-h"], ["--", "--help"]]
)
def test_help_starts_nothing_whatever_else_is_wrong(capsys, argv):
    assert started(*argv) is None
    assert capsys.readouterr().out.startswith("usage: ")


@pytest.mark.parametrize("width", [80, 100, 120, 40, 300])
def test_help_shows_every_flag_with_type_default_and_help(width):
    text = help_text(SFTConfig, "relax sft", width=width, colour=False)
    words = text.partition("command line")[2].split()
    assert all(words.count(f"--{name}") == 1 for name in FLAGS)
    assert all(len(line) <= min(max(width, 80), 120) for line in text.splitlines())
    assert "\x1b" not in text
    joined = " ".join(words)
    assert "--learning_rate FLOAT Peak learning rate. [2e-05]" in joined
    assert "--param_dtype float32|bfloat16 Precision of the parameters. [float32]" in joined
    assert "Also --warmup_ratio." in joined
    assert "[outputs/sft]" in joined
    assert "hyperparams: Optimizer, learning rate, batch sizes and length of the run." in joined
    assert "relax sft --model_name_or_path DIR" in " ".join(text.split())


def test_help_is_grouped_by_section_and_bold_on_request():
    text = help_text(SFTConfig, "relax sft", width=100, colour=True)
    titles = re.findall(r"^\x1b\[1m(.+?)\x1b\[0m", text, re.MULTILINE)
    assert titles == [
        "examples", "command line", "hyperparams", "model", "peft", "data", "profile", "limits",
        "inference", "output", "system", "debug", "sft",
    ]  # fmt: skip


def test_error_of_relax_from_main_is_one_message_and_its_exit_code(capsys):
    def main(config):
        raise DataError("rows.jsonl:3: not an object")

    with pytest.raises(SystemExit) as caught:
        run(SFTConfig, main, [])
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "error: rows.jsonl:3: not an object\n")


def test_interruption_of_main_ends_with_its_exit_code(capsys):
    class Stopped(KeyboardInterrupt):
        exit_code = 143

    for stop, code in ((Stopped("stopped by SIGTERM"), 143), (KeyboardInterrupt(), 130)):

        def main(config, stop=stop):
            raise stop

        with pytest.raises(SystemExit) as caught:
            run(SFTConfig, main, [])
        assert caught.value.code == code
    assert capsys.readouterr().err == "stopped by SIGTERM\ninterrupted\n"


def test_other_errors_of_main_keep_their_traceback():
    def main(config):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(SFTConfig, main, [])


def test_what_main_returns_is_neither_printed_nor_chained(capsys):
    run(SFTConfig, lambda config: config, ["--seed=1"])
    run(SFTConfig, lambda config: {"a": 1}, [])
    run(SFTConfig, lambda config: "text", [])
    assert capsys.readouterr() == ("", "")


def test_fire_dispatches_keyword_only_with_a_parser_for_each_flag(monkeypatch):
    import fire

    calls = []
    original = fire.Fire

    def spy(component, command, serialize):
        calls.append((component, command))
        return original(component, command=command, serialize=serialize)

    monkeypatch.setattr(fire, "Fire", spy)
    assert started("--seed", "3", "--no-packing").hyperparams.seed == 3
    [(component, command)] = calls
    assert command == ["--seed=3", "--packing=false"]
    parameters = component.__signature__.parameters.values()
    assert {p.kind for p in parameters} == {p.KEYWORD_ONLY for p in parameters}


TYPED = [n for n, o in options(SFTConfig).items() if o.type is not str and o.type != str | None]
TEXTS = st.text(st.characters(exclude_characters="\0"), max_size=30)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(TYPED), TEXTS, st.booleans()), min_size=1, max_size=4))
def test_random_values_raise_nothing_but_config_error(flags):
    argv = []
    for name, text, joined in flags:
        argv += [f"--{name}={text}"] if joined else [f"--{name}", text]
    try:
        command = read_command(SFTConfig, argv)
    except ConfigError as error:
        assert str(error)
    else:
        assert set(command.flags) <= set(TYPED)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(TEXTS, st.sampled_from(["-", "--", "--seed", "--no_packing", "=", "x"]))
        | st.builds("--{}={}".format, st.sampled_from(FLAGS), TEXTS),
        max_size=5,
    )
)
def test_random_arguments_start_nothing_but_a_valid_configuration(argv):
    def main(config):
        config.check()

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(command_line, "_refuse", raise_it)
            patch.setattr("builtins.print", lambda *args, **kwargs: None)
            run(SFTConfig, main, argv)
    except Refused as refusal:
        assert str(refusal)


class Refused(Exception):
    pass


def raise_it(error, program):
    raise Refused(str(error))


SCRIPT = """
import sys
from relax.config import SFTConfig
from relax.config.cli import run

def main(config):
    print("started", config.hyperparams.seed)

try:
    run(SFTConfig, main)
finally:
    heavy = {"jax", "numpy", "flax", "transformers"} & set(sys.modules)
    print("heavy:", sorted(heavy), "fire:", "fire" in sys.modules, file=sys.stderr)
"""


@pytest.fixture
def script(tmp_path):
    """Runs a real script with some arguments."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    root = str(Path(relax.__file__).parents[1])

    def call(*argv):
        return subprocess.run(
            [sys.executable, str(path), *argv],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | {"PYTHONPATH": root},
        )

    return call


def test_script_refuses_before_anything_heavy_is_imported(script):
    result = script("--lerning_rate", "1e-3")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: unknown flag --lerning_rate. Did you mean --learning_rate?",
        "see --help: python script.py --help",
        "heavy: [] fire: False",
    ]


def test_script_refuses_a_contradiction_before_anything_heavy_is_imported(script):
    result = script("--eval_steps", "5")
    assert result.returncode == 2
    assert result.stderr.splitlines()[0].startswith("error: eval_steps has no effect: ")
    assert "heavy: []" in result.stderr


def test_script_helps_in_plain_text_where_there_is_no_terminal(script):
    result = script("--help")
    assert result.returncode == 0
    assert result.stdout.startswith("usage: python script.py ")
    assert "\x1b" not in result.stdout
    assert "heavy: []" in result.stderr


def test_script_starts_with_good_arguments(script):
    result = script("--seed", "3")
    assert (result.returncode, result.stdout) == (0, "started 3\n")
    assert result.stderr == "heavy: [] fire: True\n"
