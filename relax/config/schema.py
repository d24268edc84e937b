"""The configuration of a run: one dataclass per section, one documented field per option.

A new algorithm adds one section and the defaults that differ for it:

    @dataclass(slots=True, kw_only=True)
    class GRPOConfig(TrainerConfig):
        algorithm: ClassVar[str] = "grpo"
        hyperparams: Hyperparams = section(Hyperparams, learning_rate=1e-6)
        grpo: GRPOSection = section(GRPOSection)

`slots` makes an assignment to a misspelt field an error.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from relax.config import run_rules
from relax.config.options import option, section
from relax.config.rules import NoEffect, Rule
from relax.config.settings import Settings

Dtype = Literal["float32", "bfloat16"]
CheckpointingPolicy = Literal["matmuls", "attention", "nothing"]
Optimizer = Literal[
    "adamw", "adamw_8bit", "adafactor", "lion", "muon", "sgd", "schedule_free_adamw"
]
Schedule = Literal[
    "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_min_lr", "wsd"
]


@dataclass(slots=True, kw_only=True)
class Hyperparams:
    """Optimizer, learning rate, batch sizes and length of the run."""

    learning_rate: float = option(2e-5, "Peak learning rate.", above=0)
    per_device_train_batch_size: int = option(
        8, "Rows per device and forward-backward pass.", at_least=1
    )
    gradient_accumulation_steps: int = option(1, "Forward-backward passes per step.", at_least=1)
    num_train_epochs: int = option(3, "Epochs: passes over the training rows.", at_least=1)
    max_steps: int = option(
        -1, "Total number of steps; overrides num_train_epochs; -1 = off.", at_least=-1
    )
    optim: Optimizer = option("adamw", "Optimizer.")
    lr_scheduler_type: Schedule = option("linear", "Learning-rate schedule.")
    warmup_steps: float = option(
        0.0, "Linear warm-up in steps; below 1: a fraction of the run.", steps=True, at_least=0
    )
    min_lr_rate: float = option(
        0.0, "Final fraction of the peak in cosine_with_min_lr and wsd.", at_least=0, below=1
    )
    num_decay_steps: float = option(
        0.1, "Decay phase of wsd in steps; below 1: a fraction of the run.", steps=True, above=0
    )
    weight_decay: float = option(
        0.0, "Decoupled weight decay; norms and biases are exempt.", at_least=0
    )
    adam_beta1: float = option(0.9, "Adam beta1.", at_least=0, below=1)
    adam_beta2: float = option(0.999, "Adam beta2.", at_least=0, below=1)
    adam_epsilon: float = option(1e-8, "Adam epsilon.", above=0)
    momentum_dtype: Dtype = option(
        "float32", "Precision of the stored first moment of adamw, lion and muon."
    )
    offload_optimizer: bool = option(
        False, "Keep the optimizer's state in the host's memory, and copy it layer by layer."
    )
    max_grad_norm: float = option(
        1.0, "Gradient clipping: maximum global norm; 0 = off.", at_least=0
    )
    seed: int = option(42, "Random seed.", at_least=0)
    data_seed: int | None = option(None, "Seed of the row order; none = seed.", at_least=0)
    gradient_checkpointing: bool = option(
        True, "Recompute activations in the backward pass to save memory."
    )
    gradient_checkpointing_policy: CheckpointingPolicy = option(
        "matmuls", "Activations kept: outputs of all matrix products, of attention only, or none."
    )


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """Model and precision."""

    model_name_or_path: str | None = option(
        None, "Hugging Face model directory or hub name; none = the demo model."
    )
    dtype: Dtype | None = option(
        None, "Precision of the computation; none = bfloat16 on GPUs and TPUs, float32 on CPUs."
    )
    param_dtype: Dtype = option("float32", "Precision of the parameters.")
    attn_implementation: Literal["auto", "xla", "cudnn", "splash"] = option(
        "auto", "Attention kernel in training; auto = the fastest that the device supports."
    )


@dataclass(slots=True, kw_only=True)
class PeftConfig:
    """Trained weights: all, LoRA adapters only, or all but frozen ones."""

    use_peft: bool = option(False, "Train LoRA adapters and freeze the model.")
    lora_r: int = option(16, "LoRA rank.", at_least=1)
    lora_alpha: int = option(32, "LoRA scaling: lora_alpha / lora_r.", at_least=1)
    use_rslora: bool = option(False, "Scale adapters by lora_alpha / sqrt(lora_r).")
    use_dora: bool = option(
        False, "Train the norms of weights too, and by adapters their directions alone (DoRA)."
    )
    lora_dropout: float = option(0.05, "LoRA dropout.", at_least=0, below=1)
    lora_target_modules: list[str] = option(
        ["all-linear"],
        "Layers with adapters, such as q_proj,v_proj, and embed_tokens; or all-linear, experts "
        "included.",
    )
    lora_modules_to_save: list[str] = option(
        [],
        "Modules trained in full beside adapters and saved with them, such as embed_tokens,norm.",
    )
    rank_pattern: dict = option(
        {}, "Other ranks by regular expressions of ends of modules' names, as JSON."
    )
    alpha_pattern: dict = option({}, "Other values of lora_alpha, in the same way.")
    merge_lora: bool = option(
        False, "Save the merged model, not the adapter; always on for a base without a directory."
    )
    quantize_base: Literal["nf4", "int8"] | None = option(
        None, "Hold the frozen linear layers in 4 or 8 bits (QLoRA); none = as param_dtype."
    )
    freeze: str | None = option(
        None, "Regular expression; weights whose path matches it are frozen."
    )


@dataclass(slots=True, kw_only=True)
class RowsConfig:
    """Training and evaluation data."""

    dataset_name: str | None = option(
        None,
        "File, directory, hub name or reasoning_gym/TASK, or several as FILE:WEIGHT,...; "
        "none = the demo task, addition.",
    )
    mixing_strategy: Literal["concat", "first_exhausted", "all_exhausted"] | None = option(
        None,
        "End of an epoch of several sources: every row once, or one source or all exhausted; "
        "none = concat, with weights first_exhausted.",
    )
    dataset_config: str | None = option(None, "Configuration of a hub data set.")
    dataset_kwargs: dict = option({}, "Options of a reasoning_gym task, as JSON.")
    dataset_train_split: str = option("train", "Training split.")
    dataset_test_split: str = option("test", "Evaluation split.")
    eval_dataset_name: str | None = option(
        None, "Evaluation data, as in dataset_name; several sets: name=FILE,..."
    )
    test_size: float = option(
        0.0, "Training rows held out for evaluation; below 1: a fraction.", steps=True, at_least=0
    )
    shuffle_dataset: bool = option(True, "Reshuffle the rows in every epoch.")
    eos_token: str | None = option(None, "End-of-sequence token; none = the tokenizer's.")


@dataclass(slots=True, kw_only=True)
class CachedRowsConfig(RowsConfig):
    """Training and evaluation data whose tokens are kept between runs."""

    dataset_cache_dir: str | None = option(
        "auto",
        "Directory that keeps tokenised rows between runs; auto: ~/.cache/relax/data, for files of "
        "16 MiB or more; none: not kept.",
    )


@dataclass(slots=True, kw_only=True)
class DataConfig(CachedRowsConfig):
    """Training and evaluation data, truncation and packing."""

    dataset_text_field: str = option("text", "Column of plain-text rows.")
    max_length: int | None = option(1024, "Maximum tokens per row; none = no limit.", at_least=2)
    truncation_mode: Literal["keep_start", "keep_end", "drop", "error", "turns"] = option(
        "keep_start",
        "Treatment of longer rows: keep their start, their end or whole turns, drop them, or stop.",
    )
    packing: bool = option(
        False, "Pack several rows into one of max_length tokens; they do not attend to each other."
    )
    packing_strategy: Literal["bfd", "bfd_split", "wrapped"] = option(
        "bfd", "Best fit, best fit that splits long rows, or one stream cut into rows."
    )
    eval_packing: bool | None = option(None, "Pack evaluation rows; none = as packing.")
    pad_to_multiple_of: int | None = option(
        None, "Pad rows to a multiple of this length.", at_least=1
    )


@dataclass(slots=True, kw_only=True)
class RenderingConfig:
    """Prompt format, system prompt and chat template."""

    name: str = option(
        "chat",
        "Format of prompts and completions: chat (as in the data), emoji_think, regime3, "
        "chain_of_thought, tool_use, a+b, auto, or path/to/file.py:Class; see docs/profiles.md.",
        flag="profile",
    )
    system_prompt: str | None = option(None, "System message of conversations that have none.")
    chat_template_path: str | None = option(
        None, "Tokenizer directory or .jinja file; none = the tokenizer's own template."
    )


@dataclass(slots=True, kw_only=True)
class ProfileConfig(RenderingConfig):
    """Prompt format, system prompt, chat template and stop sequences."""

    stop_sequences: list[str] | None = option(
        None, "Texts that end a sampled completion; none = those of the profile."
    )


@dataclass(slots=True, kw_only=True)
class LimitsConfig:
    """Limits on rows and chat templates, the arguments of `relax.data.Limits`."""

    max_row_bytes: int = option(8 * 2**20, "Maximum bytes of a row; see docs/data.md.", above=0)
    max_json_depth: int = option(64, "Maximum nesting of lists and objects in a row.", above=0)
    max_file_gib: float = option(
        32.0,
        "Maximum GiB of the files of a split together, where they are held in memory.",
        above=0,
    )
    template_timeout_s: float = option(
        5.0, "Maximum seconds to render one conversation with the chat template.", above=0
    )
    template_output_ratio: int = option(
        64, "Maximum characters that a chat template writes per character of input.", above=0
    )
    template_memory_mib: int = option(
        512, "Maximum MiB that rendering a conversation may allocate.", above=0
    )


@dataclass(slots=True, kw_only=True)
class InferenceConfig:
    """Evaluation and sampled previews."""

    eval_strategy: Literal["no", "steps", "epoch"] = option("no", "When to evaluate.")
    eval_steps: float | None = option(
        None,
        "Steps between evaluations; below 1: a fraction; none = logging_steps.",
        steps=True,
        above=0,
    )
    per_device_eval_batch_size: int = option(
        8, "Rows per device and forward pass in evaluation.", at_least=1
    )
    max_eval_batches: int | None = option(
        None, "Maximum number of evaluation batches; none = all.", at_least=1
    )
    eval_on_start: bool = option(False, "Also evaluate before the first step.")
    eval_tasks: list[str] = option(
        [],
        "Tasks of relax eval, such as lm_eval/NAME, evaluated with every evaluation; see "
        "docs/after.md.",
    )
    eval_tasks_limit: int | None = option(
        None, "Rows of each of these tasks, from its first; none = all.", at_least=1
    )
    eval_reward_funcs: list[str] = option(
        [], "Reward functions of tasks that are files of prompts; none = reward_funcs."
    )
    num_samples: int = option(
        0, "Held-out prompts whose sampled completions are shown at every evaluation.", at_least=0
    )
    max_new_tokens: int = option(128, "Maximum tokens of such a completion.", at_least=1)


@dataclass(slots=True, kw_only=True)
class OutputConfig:
    """Output directory, resuming, logging and checkpoints."""

    output_dir: str = option("outputs/run", "Output directory.")
    overwrite_output_dir: bool = option(False, "Delete an earlier run in output_dir.")
    resume: str = option(
        "never",
        "auto (from the last checkpoint in output_dir), never, or the path of a checkpoint.",
    )
    allow_config_change: list[str] = option(
        [], "Fields that may differ from those of the resumed run."
    )
    logging_steps: float = option(
        10.0, "Steps between log lines; below 1: a fraction of the run.", steps=True, above=0
    )
    save_strategy: Literal["no", "steps", "epoch"] = option("steps", "When to save a checkpoint.")
    save_steps: float = option(
        500.0, "Steps between checkpoints; below 1: a fraction of the run.", steps=True, above=0
    )
    save_total_limit: int | None = option(
        None, "Number of checkpoints to keep, the newest ones; none = all.", at_least=1
    )
    save_async: bool | None = option(
        None, "Continue training while a checkpoint is written; none = on GPUs and TPUs."
    )
    metric_for_best_model: str | None = option(
        None, "Evaluation metric, such as eval_loss; the best state is kept in best/."
    )
    greater_is_better: bool | None = option(
        None,
        "Whether a higher value of that metric is better; none = unless its name ends in loss.",
    )
    load_best_model_at_end: bool = option(
        False, "Save the best state instead of the last one in final/."
    )
    early_stopping_patience: int | None = option(
        None, "Stop after this many evaluations without improvement; none = never.", at_least=1
    )
    early_stopping_threshold: float = option(
        0.0, "Minimum change that counts as an improvement.", at_least=0
    )
    report_to: list[str] = option(
        [], "Trackers, besides metrics.jsonl: tensorboard, wandb, trackio or path/to/file.py:Class."
    )
    run_name: str | None = option(
        None, "Name of the run in trackers; none = the name of output_dir."
    )


@dataclass(slots=True, kw_only=True)
class SystemConfig:
    """Devices, processes, compilation cache and callbacks."""

    compilation_cache_dir: str | None = option(
        "auto",
        "Directory that keeps compiled steps between runs; auto: ~/.cache/relax; none: not kept.",
    )
    grace_s: float = option(25.0, "Seconds within which a run ends after SIGTERM.", above=0)
    mesh: str | None = option(
        None, "Devices per mesh axis, such as data=2,fsdp=4; auto = all on fsdp; none = one device."
    )
    sharding_rules: str | None = option(
        None, "File of sharding rules that precede the built-in ones; see docs/scale.md."
    )
    coordinator: str | None = option(
        None,
        "HOST:PORT of process 0; auto = from SLURM, MPI, GKE or a TPU pod; none = one process.",
    )
    num_processes: int | None = option(None, "Number of processes.", at_least=1)
    process_id: int | None = option(None, "Index of this process, from 0.", at_least=0)
    heartbeat_s: int = option(
        100, "Seconds of silence of one process after which the others end.", at_least=5
    )
    max_nonfinite_steps: int = option(
        3, "Stop after this many consecutive non-finite steps; 0 = never.", at_least=0
    )
    callbacks: list[str] = option(
        [], "Your own callbacks: path/to/file.py:Class or package.module.Class."
    )


@dataclass(slots=True, kw_only=True)
class DebugConfig:
    """Dry run, printed rows, NaN search and profiling."""

    print_examples: int = option(
        1, "Rows printed before the run, with the trained tokens marked.", at_least=0
    )
    debug_nans: bool = option(False, "Stop at the operation that produces a NaN (slow).")
    dry_run: bool = option(
        False,
        "Check everything, take one step, print the memory and time that the run needs, and end.",
    )
    profile_steps: str | None = option(
        None, "Steps to profile, such as 10:15, for TensorBoard and Perfetto."
    )


@dataclass(slots=True, kw_only=True)
class TrainerConfig(Settings):
    """The sections that all algorithms share; an algorithm adds one of its own."""

    shared_rules: ClassVar[tuple[Rule, ...]] = run_rules.RULES
    no_effect: ClassVar[tuple[NoEffect, ...]] = run_rules.NO_EFFECT

    hyperparams: Hyperparams = section(Hyperparams)
    model: ModelConfig = section(ModelConfig)
    peft: PeftConfig = section(PeftConfig)
    data: RowsConfig = section(RowsConfig)
    profile: ProfileConfig = section(ProfileConfig)
    limits: LimitsConfig = section(LimitsConfig)
    inference: InferenceConfig = section(InferenceConfig)
    output: OutputConfig = section(OutputConfig)
    system: SystemConfig = section(SystemConfig)
    debug: DebugConfig = section(DebugConfig)


def diff(old: TrainerConfig, new: TrainerConfig) -> list[tuple[str, Any, Any]]:
    """The fields whose values differ, as (name, old, new), in the order of declaration."""
    before, after = old.flat(), new.flat()
    names = list(dict.fromkeys([*before, *after]))
    return [(n, before.get(n), after.get(n)) for n in names if before.get(n) != after.get(n)]
