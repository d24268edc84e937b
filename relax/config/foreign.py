"""Flags of TRL, transformers and other trainers that have another name or no place here.

Covers the fields of transformers' TrainingArguments and of TRL's SFTConfig, DPOConfig, KTOConfig,
GRPOConfig, RLOOConfig, RewardConfig, ModelConfig and ScriptArguments (transformers 5.24, TRL 1.16),
and older names of them that are still in use.
"""

from collections.abc import Collection

# Their name -> ours; of several the first that the configuration has.
RENAMED = {
    "base_model": "model_name_or_path",
    "batch_size": "per_device_train_batch_size",
    "cache_dir": "compilation_cache_dir",
    "dataset": "dataset_name",
    "dataset_path": "dataset_name",
    "epochs": "num_train_epochs",
    "eval_dataset": "eval_dataset_name",
    "evaluation_strategy": "eval_strategy",
    "gradient_accumulation": "gradient_accumulation_steps",
    "init_kl_coef": "kl_coef",
    "local_mini_batch_size": "num_mini_batches",
    "logging_dir": "output_dir",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "max_context_length": "max_length max_completion_length",
    "max_seq_length": "max_length max_completion_length",
    "model": "model_name_or_path",
    "model_path": "model_name_or_path",
    "num_epochs": "num_train_epochs",
    "num_train_steps": "max_steps",
    "optimizer": "optim",
    "overwrite": "overwrite_output_dir",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "ppo_epochs": "num_ppo_epochs",
    "precision": "dtype",
    "resume_from": "resume",
    "reward_model_path": "reward_funcs",
    "response_length": "max_completion_length",
    "stop_strings": "stop_sequences",
    "torch_dtype": "dtype",
    "total_episodes": "max_steps",
    "value_model_path": "value_model",
    "weight_decay_rate": "weight_decay",
}

_HUB = "runs upload nothing; upload the final/ directory with `hf upload REPO DIR`"
_QUANTISED = "weights are not quantised; --param_dtype bfloat16 halves their memory"
_SHARDING = "--mesh shards weights, gradients and optimizer state over devices"
_COMPILED = "XLA compiles every step"
_LOADER = "batches are made in the training process, which needs no loader workers"
_PROCESSES = "--mesh and --coordinator set up several devices and processes"
_SAMPLER = "completions come from the built-in sampler, which shares the model's weights"
_TRANSFORMERS = "models run in JAX and take no keyword arguments of transformers"
_TRACKERS = "set the tracker's own environment variables"
_LOGS = "each run prints the same lines and writes metrics.jsonl"
_MOE = "the coefficient is router_aux_loss_coef in the model's config.json"
_ALGORITHM = "this variant of the loss is not implemented"
_IMAGES = "only text is trained on"
_CALLS = "the number of turns is the environment's; see docs/rewards.md"

ADVICE = {
    "accelerator_config": _SHARDING,
    "activation_checkpointing": "use --gradient_checkpointing",
    "activation_checkpointing_kwargs": "use --gradient_checkpointing_policy",
    "activation_offloading": "use --gradient_checkpointing to save memory",
    "auto_find_batch_size": "--dry_run shows whether a batch fits into memory",
    "average_tokens_across_devices": "not needed: losses are always averaged over all tokens",
    "batch_eval_metrics": "not needed: metrics are computed batch by batch",
    "bf16": "use --dtype bfloat16",
    "bf16_full_eval": "use --dtype bfloat16, which holds for evaluation too",
    "cache_implementation": _SAMPLER,
    "cast_lm_head_to_fp32": "not needed: logits are always computed in float32",
    "chat_template_kwargs": "put fixed values into the template of --chat_template_path",
    "dataset_num_proc": "not needed: rows are tokenised in one process",
    "dataset_streaming": "rows are read whole; streaming is not supported",
    "debug": "use --debug_nans to find the operation that makes a NaN",
    "deepspeed": _SHARDING,
    "disable_dropout": "not needed: models have no dropout; --lora_dropout 0 disables adapters'",
    "disable_tqdm": "not needed: the progress bar is shown on terminals only",
    "discopop_tau": _ALGORITHM,
    "do_eval": "use --eval_strategy",
    "do_predict": "use `relax sample` with the trained model",
    "do_train": "not needed: the command trains",
    "enable_jit_checkpoint": "not needed: SIGTERM always saves; see --grace_s",
    "entropy_coef_delta": _ALGORITHM,
    "entropy_coef_max": _ALGORITHM,
    "entropy_coef_min": _ALGORITHM,
    "entropy_target": _ALGORITHM,
    "eval_accumulation_steps": "not needed: metrics are summed batch by batch",
    "eval_delay": "use --eval_steps, and --no_eval_on_start",
    "eval_do_concat_batches": "not needed: metrics are summed batch by batch",
    "eval_use_gather_object": _PROCESSES,
    "f_alpha_divergence_coef": _ALGORITHM,
    "f_divergence_type": _ALGORITHM,
    "fp16": "use --dtype bfloat16; float16 is not supported",
    "fp16_full_eval": "use --dtype bfloat16; float16 is not supported",
    "full_determinism": "not needed: runs with equal flags and --seed give equal bytes",
    "generation_batch_size": "use --steps_per_generation",
    "generation_kwargs": "use --temperature, --top_k, --top_p, --min_p and --repetition_penalty",
    "gpus": _PROCESSES,
    "gradient_checkpointing_kwargs": "use --gradient_checkpointing_policy",
    "group_by_length": "use --packing, which leaves no padding",
    "half_precision_backend": "use --dtype bfloat16",
    "ignore_bias_buffers": _SHARDING,
    "ignore_data_skip": "a resumed run always continues at its place in the data",
    "include_for_metrics": _LOGS,
    "include_num_input_tokens_seen": "not needed: the number of tokens is always logged",
    "include_tokens_per_second": "not needed: tokens per second are always logged",
    "label_names": "not needed: the trained columns follow from the algorithm",
    "label_smoothing_factor": "label smoothing of next-token losses is not implemented",
    "ld_alpha": _ALGORITHM,
    "length_column_name": "use --packing, which leaves no padding",
    "local_rank": "use --process_id, or --coordinator auto",
    "log_level": _LOGS,
    "log_level_replica": _LOGS,
    "log_completions_hub_repo": _HUB,
    "log_multimodal": _IMAGES,
    "log_on_each_node": "process 0 alone logs",
    "log_unique_prompts": "use --num_completions_to_print",
    "logging_first_step": "use --logging_steps 1, or --logging_steps of your choice",
    "logging_nan_inf_filter": "non-finite steps are skipped and counted; see --max_nonfinite_steps",
    "logging_strategy": "use --logging_steps; a ratio below 1 is a share of the run",
    "lora_modules_to_save": "use --freeze to train some weights in full instead of adapters",
    "lora_target_parameters": "use --lora_target_modules",
    "lora_task_type": "not needed: the task follows from the algorithm",
    "lr_scheduler_kwargs": "use --min_lr_rate and --num_decay_steps",
    "max_prompt_length": "prompts are never truncated; filter the rows beforehand",
    "max_tool_calling_iterations": _CALLS,
    "mixed_precision": "use --dtype bfloat16 and --param_dtype",
    "model_architecture": "not needed: config.json of --model_name_or_path names it",
    "model_init_kwargs": _TRANSFORMERS,
    "model_revision": "download the revision, and give its directory as --model_name_or_path",
    "multi_objective_aggregation": "rewards are summed with --reward_weights, then normalised",
    "neftune_noise_alpha": "noise on embeddings (NEFTune) is not implemented",
    "no_cuda": "set JAX_PLATFORMS=cpu in the environment to run on the CPU",
    "normalize_advantages": "use --scale_rewards",
    "off_policy_mask_threshold": _ALGORITHM,
    "optim_args": "use --adam_beta1, --adam_beta2, --adam_epsilon and --weight_decay",
    "optim_target_modules": "use --freeze to choose the weights that are trained",
    "pad_token": "not needed: padding is masked by length, whatever its token is",
    "padding_free": "use --packing",
    "parallelism_config": _SHARDING,
    "past_index": _TRANSFORMERS,
    "precompute_ref_batch_size": "--per_device_eval_batch_size is used",
    "prediction_loss_only": "not needed: evaluation computes losses and keeps no predictions",
    "processing_class": "use --model_name_or_path, whose directory holds the tokenizer",
    "project": _TRACKERS,
    "push_to_hub": _HUB,
    "push_to_hub_model_id": _HUB,
    "ray_scope": "hyper-parameter search is left to the caller",
    "remove_unused_columns": "not needed: unused columns are ignored and listed in the report",
    "restore_callback_states_from_checkpoint": "not needed: --resume always restores them",
    "reward_clip_range": "clip the reward in its function",
    "router_aux_loss_coef": _MOE,
    "save_on_each_node": "processes share one --output_dir",
    "save_only_model": "final/ holds the model alone; checkpoints hold the whole state",
    "save_safetensors": "not needed: models are always saved as safetensors",
    "skip_memory_metrics": "not needed: --dry_run shows the memory",
    "tf32": "set JAX_DEFAULT_MATMUL_PRECISION in the environment",
    "tokenizer_name": "the tokenizer is that of --model_name_or_path",
    "tokenizer_name_or_path": "the tokenizer is that of --model_name_or_path",
    "top_entropy_quantile": _ALGORITHM,
    "tpu_num_cores": _PROCESSES,
    "train_sampling_strategy": "use --shuffle_dataset; --packing groups rows by length",
    "trust_remote_code": "code that comes with a model is never run",
    "use_adaptive_entropy": _ALGORITHM,
    "use_bnb_nested_quant": _QUANTISED,
    "use_cache": "not needed: sampling always uses a KV cache, training never",
    "use_cpu": "set JAX_PLATFORMS=cpu in the environment to run on the CPU",
    "use_dora": "only plain LoRA adapters are implemented",
    "use_flash_attention_2": "use --attn_implementation; auto takes the device's kernel",
    "use_ipex": _COMPILED,
    "use_legacy_prediction_loop": _COMPILED,
    "use_mps_device": _PROCESSES,
    "use_rslora": "multiply --lora_alpha by sqrt(lora_r) instead",
    "use_weighting": _ALGORITHM,
    "version": "`relax --version` prints the version",
    "vocab_size": "not needed: config.json of --model_name_or_path says it",
}
BY_PREFIX = {
    "bnb_": _QUANTISED,
    "dataloader_": _LOADER,
    "ddp_": _PROCESSES,
    "ds3_": _SHARDING,
    "fsdp": _SHARDING,
    "hub_": _HUB,
    "jit_mode": _COMPILED,
    "liger": "not needed: losses never hold the logits of a whole batch",
    "load_in_": _QUANTISED,
    "push_to_": _HUB,
    "sapo_": _ALGORITHM,
    "torch": _COMPILED,
    "trackio_": _TRACKERS,
    "transformers_": _SAMPLER,
    "use_liger": "not needed: losses never hold the logits of a whole batch",
    "use_transformers_": _SAMPLER,
    "use_vllm": _SAMPLER,
    "vespo_": _ALGORITHM,
    "vllm_": _SAMPLER,
}


def advice(name: str, known: Collection[str]) -> str | None:
    """The advice for a flag of another library; None: there is none.

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
