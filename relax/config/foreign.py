"""Flags and values of TRL, transformers and others that have another name or no place here.

Covers the fields of transformers' TrainingArguments and of TRL's SFTConfig, DPOConfig, KTOConfig,
GRPOConfig, RLOOConfig, RewardConfig, ModelConfig and ScriptArguments (transformers 5.24, TRL 1.16),
and older names that are still in use.
"""

from collections.abc import Collection

# Our names -> the names elsewhere. Of several names of ours, the first existing one counts.
_RENAMED = {
    "model_name_or_path": "base_model model model_path",
    "per_device_train_batch_size": "batch_size micro_batch_size per_gpu_train_batch_size",
    "compilation_cache_dir": "cache_dir",
    "dataset_name": "dataset dataset_path",
    "num_train_epochs": "epochs n_epochs num_epochs",
    "eval_dataset_name": "eval_dataset",
    "eval_strategy": "evaluation_strategy",
    "environment_factory": "environment env",
    "gradient_accumulation_steps": "gradient_accumulation",
    "chat_template_path": "chat_template",
    "kl_coef": "init_kl_coef",
    "lora_r": "lora_rank",
    "lora_target_modules": "lora_target",
    "num_mini_batches": "local_mini_batch_size",
    "output_dir": "logging_dir",
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_scheduler",
    "max_length max_completion_length": "cutoff_len max_context_length max_seq_length",
    "max_steps": "num_train_steps total_episodes",
    "optim": "optimizer",
    "overwrite_output_dir": "overwrite",
    "per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
    "num_ppo_epochs": "ppo_epochs",
    "dtype": "precision torch_dtype",
    "resume": "resume_from",
    "reward_funcs": "reward_model_path",
    "max_completion_length": "response_length",
    "stop_sequences": "stop_strings",
    "test_size": "val_set_size val_size",
    "value_model": "value_model_path",
    "weight_decay": "weight_decay_rate",
}
# The advice -> the names elsewhere; a name that ends in * is a prefix.
_ADVICE = {
    "--mesh shards weights, gradients and optimizer state over devices": (
        "accelerator_config deepspeed ignore_bias_buffers parallelism_config ds3_* fsdp*"
    ),
    "completions come from the built-in sampler, which shares the model's weights": (
        "cache_implementation transformers_* use_transformers_* use_vllm* vllm_*"
    ),
    "--mesh and --coordinator set up several devices and processes": (
        "eval_use_gather_object gpus tpu_num_cores use_mps_device ddp_*"
    ),
    "runs upload nothing; upload the final/ directory with `hf upload REPO DIR`": (
        "log_completions_hub_repo push_to_hub push_to_hub_model_id hub_* push_to_*"
    ),
    "XLA compiles every step": "use_ipex use_legacy_prediction_loop jit_mode* torch*",
    "each run prints the same lines and writes metrics.jsonl": (
        "include_for_metrics log_level log_level_replica"
    ),
    "use --use_peft --quantize_base nf4 or int8": "bnb_4bit_quant_type load_in_*",
    "scales are float32, one for 64 weights; see --quantize_base": (
        "use_bnb_nested_quant bnb_4bit_use_double_quant"
    ),
    "use --quantize_base; the precision of the computation is --dtype": "bnb_*",
    "use --gradient_checkpointing_policy": (
        "activation_checkpointing_kwargs gradient_checkpointing_kwargs"
    ),
    "use --dtype bfloat16": "bf16 half_precision_backend",
    "not needed: metrics are summed batch by batch": (
        "eval_accumulation_steps eval_do_concat_batches"
    ),
    "use --dtype bfloat16; float16 is not supported": "fp16 fp16_full_eval",
    "use --packing, which leaves no padding": "group_by_length length_column_name",
    "models run in JAX and take no keyword arguments of transformers": (
        "model_init_kwargs past_index"
    ),
    "set JAX_PLATFORMS=cpu in the environment to run on the CPU": "no_cuda use_cpu",
    "set the tracker's own environment variables": "project trackio_* wandb_*",
    "the tokenizer is that of --model_name_or_path": "tokenizer_name tokenizer_name_or_path",
    "not needed: losses never hold the logits of a whole batch": "liger* use_liger*",
    "use --gradient_checkpointing": "activation_checkpointing",
    "use --attn_implementation": "flash_attn",
    "use --use_peft for adapters; without it all weights are trained": "finetuning_type train_type",
    "use --gradient_checkpointing to save memory": "activation_offloading",
    "--dry_run shows whether a batch fits into memory": "auto_find_batch_size",
    "not needed: losses are always averaged over all tokens": "average_tokens_across_devices",
    "not needed: metrics are computed batch by batch": "batch_eval_metrics",
    "use --dtype bfloat16, which holds for evaluation too": "bf16_full_eval",
    "put fixed values into the template of --chat_template_path": "chat_template_kwargs",
    "not needed: a thread tokenises ahead, on all cores": "dataset_num_proc",
    "not needed: rows of large files stay in them, see docs/data.md": "dataset_streaming",
    "use --debug_nans to find the operation that makes a NaN": "debug",
    "not needed: models have no dropout; --lora_dropout 0 disables adapters'": "disable_dropout",
    "not needed: the progress bar is shown on terminals only": "disable_tqdm",
    "use --eval_strategy": "do_eval",
    "use `relax sample` with the trained model": "do_predict",
    "not needed: the command trains": "do_train",
    "not needed: SIGTERM always saves; see --grace_s": "enable_jit_checkpoint",
    "use --eval_steps, and --no_eval_on_start": "eval_delay",
    "not needed: runs with equal flags and --seed give equal bytes": "full_determinism",
    "use --steps_per_generation": "generation_batch_size",
    "use --temperature, --top_k, --top_p, --min_p and --repetition_penalty": "generation_kwargs",
    "a resumed run always continues at its place in the data": "ignore_data_skip",
    "not needed: the number of tokens is always logged": "include_num_input_tokens_seen",
    "not needed: tokens per second are always logged": "include_tokens_per_second",
    "not needed: the trained columns follow from the algorithm": "label_names",
    "use --process_id, or --coordinator auto": "local_rank",
    "only text is trained on": "log_multimodal",
    "process 0 alone logs": "log_on_each_node",
    "use --num_completions_to_print": "log_unique_prompts",
    "use --logging_steps 1, or --logging_steps of your choice": "logging_first_step",
    "non-finite steps are skipped and counted; see --max_nonfinite_steps": "logging_nan_inf_filter",
    "use --logging_steps; a ratio below 1 is a share of the run": "logging_strategy",
    "use --lora_target_modules": "lora_target_parameters",
    "not needed: the task follows from the algorithm": "lora_task_type",
    "use --min_lr_rate and --num_decay_steps": "lr_scheduler_kwargs",
    "prompts are never truncated; filter the rows beforehand": "max_prompt_length",
    "use --dtype bfloat16 and --param_dtype": "mixed_precision",
    "not needed: config.json of --model_name_or_path names it": "model_architecture",
    "download the revision, and give its directory as --model_name_or_path": "model_revision",
    "use --scale_rewards": "normalize_advantages",
    "use --adam_beta1, --adam_beta2, --adam_epsilon and --weight_decay": "optim_args",
    "use --freeze to choose the weights that are trained": "optim_target_modules",
    "not needed: padding is masked by length, whatever its token is": "pad_token",
    "use --packing": "padding_free",
    "--per_device_eval_batch_size is used": "precompute_ref_batch_size",
    "not needed: evaluation computes losses and keeps no predictions": "prediction_loss_only",
    "use --model_name_or_path, whose directory holds the tokenizer": "processing_class",
    "hyper-parameter search is left to the caller": "ray_scope",
    "not needed: unused columns are ignored and listed in the report": "remove_unused_columns",
    "not needed: --resume always restores them": "restore_callback_states_from_checkpoint",
    "clip the reward in its function": "reward_clip_range",
    "the coefficient is router_aux_loss_coef in the model's config.json": "router_aux_loss_coef",
    "processes share one --output_dir": "save_on_each_node",
    "final/ holds the model alone; checkpoints hold the whole state": "save_only_model",
    "not needed: models are always saved as safetensors": "save_safetensors",
    "not needed: --dry_run shows the memory": "skip_memory_metrics",
    "set JAX_DEFAULT_MATMUL_PRECISION in the environment": "tf32",
    "use --shuffle_dataset; --packing groups rows by length": "train_sampling_strategy",
    "code that comes with a model is never run": "trust_remote_code",
    "not needed: sampling always uses a KV cache, training never": "use_cache",
    "use --attn_implementation; auto takes the device's kernel": "use_flash_attention_2",
    "`relax --version` prints the version": "version",
    "not needed: config.json of --model_name_or_path says it": "vocab_size",
    "batches are made in the training process, which needs no loader workers": "dataloader_*",
}

# The option -> our value -> names elsewhere that mean the same: they are accepted.
_SAME_VALUES = {
    "optim": {
        "adamw": (
            "adamw_torch adamw_torch_fused adamw_torch_npu_fused adamw_torch_xla "
            "adamw_apex_fused paged_adamw_32bit"
        ),
        "adamw_8bit": "adamw_bnb_8bit",
        "lion": "lion_32bit paged_lion_32bit",
    },
    "lr_scheduler_type": {"wsd": "warmup_stable_decay"},
}
# The option -> the nearest value here -> names elsewhere, which are refused; * ends a prefix.
_NEAREST_VALUES = {
    "optim": {
        "adamw": "adam adamw_hf ademamix* grokadamw paged_ademamix* stable_adamw",
        "adamw with momentum_dtype bfloat16": "adamw_anyprecision",
        "adamw_8bit": "adamw_torch_4bit adamw_torch_8bit apollo_* galore_adamw* paged_adamw_8bit",
        "adamw with adam_beta1 0": "adagrad rmsprop*",
        "adafactor": "adalomo galore_adafactor*",
        "sgd": "lomo",
        "lion": "lion_8bit paged_lion_8bit",
        "schedule_free_adamw": "schedule_free_radam schedule_free_sgd",
    },
    "attn_implementation": {
        "auto, which takes the device's kernel": (
            "eager flash_attention_2 flash_attention_3 flex_attention kernels-community/* sdpa"
        ),
    },
    "dtype": {
        "bfloat16": "auto bf16 float16 fp16 torch.bfloat16 torch.float16",
        "float32": "fp32 torch.float32",
    },
    "save_strategy": {"steps, with load_best_model_at_end": "best"},
    "lr_scheduler_type": {
        "cosine, which is the same with one cycle": "cosine_with_restarts",
        "linear, which is the same with power 1": "polynomial",
        "linear": "inverse_sqrt",
        "cosine_with_min_lr": "cosine_warmup_with_min_lr",
        "constant_with_warmup": "greedy reduce_lr_on_plateau",
    },
}

SAME_VALUES = {
    option: {name: ours for ours, names in found.items() for name in names.split()}
    for option, found in _SAME_VALUES.items()
}
NEAREST_VALUES = {
    option: {name: near for near, names in found.items() for name in names.split()}
    for option, found in _NEAREST_VALUES.items()
}
RENAMED = {name: ours for ours, names in _RENAMED.items() for name in names.split()}
_BY_NAME = {name: text for text, names in _ADVICE.items() for name in names.split()}
ADVICE = {name: text for name, text in _BY_NAME.items() if not name.endswith("*")}
BY_PREFIX = {name[:-1]: text for name, text in _BY_NAME.items() if name.endswith("*")}


def advice(name: str, known: Collection[str]) -> str | None:
    """The advice for a flag of another library; None if there is none.

    Args:
      name: the flag, without dashes.
      known: the options that the configuration has.

    >>> advice("evaluation_strategy", ["eval_strategy"])
    'use --eval_strategy'
    """
    for ours in RENAMED.get(name, "").split():
        if ours in known:
            return f"use --{ours}"
    if name in ADVICE:
        return ADVICE[name]
    found = [text for prefix, text in BY_PREFIX.items() if name.startswith(prefix)]
    return found[0] if found else None


def own_value(option: str, value: object) -> object:
    """Our name of an option's value that has another name elsewhere; any other value unchanged.

    >>> own_value("optim", "adamw_torch_fused"), own_value("optim", "sgd")
    ('adamw', 'sgd')
    """
    return SAME_VALUES.get(option, {}).get(value, value) if isinstance(value, str) else value


def nearest_value(option: str, value: object) -> str:
    """The end of a sentence that refuses a value of another library; empty for any other value.

    >>> nearest_value("optim", "galore_adamw_8bit")
    '; the nearest is adamw_8bit'
    """
    if not isinstance(value, str):
        return ""
    for name, near in NEAREST_VALUES.get(option, {}).items():
        if value == name or (name.endswith("*") and value.startswith(name[:-1])):
            return f"; the nearest is {near}"
    return ""
