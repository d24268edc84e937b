"""The configuration of a run: one dataclass per section, one documented field per option.

A new algorithm adds one section class, and names the defaults that differ for it:

    @dataclass(slots=True, kw_only=True)
    class GRPOConfig(TrainerConfig):
        algorithm: ClassVar[str] = "grpo"
        hyperparams: Hyperparams = section(Hyperparams, learning_rate=1e-6)
        grpo: GRPOSection = section(GRPOSection)

`slots` makes an assignment to a misspelt field an error.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from relax.config import rules
from relax.config.options import option, options, section
from relax.config.settings import Settings

Dtype = Literal["float32", "bfloat16"]
Optimizer = Literal["adamw", "adafactor", "lion", "muon", "sgd", "schedule_free_adamw"]
Schedule = Literal[
    "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_min_lr", "wsd"
]


@dataclass(slots=True, kw_only=True)
class Hyperparams:
    """The optimizer, the length of the run and the batches."""

    learning_rate: float = option(2e-5, "Peak learning rate.", above=0)
    per_device_train_batch_size: int = option(
        8, "Rows per device in one forward and backward pass.", at_least=1
    )
    gradient_accumulation_steps: int = option(1, "Passes summed into one update.", at_least=1)
    num_train_epochs: int = option(3, "Passes over the training rows.", at_least=1)
    max_steps: int = option(
        -1, "Updates in all, in place of num_train_epochs; -1 = no limit.", at_least=-1
    )
    optim: Optimizer = option("adamw", "What makes updates of gradients.")
    lr_scheduler_type: Schedule = option("linear", "Course of the learning rate after warm-up.")
    warmup_steps: float = option(
        0.0, "Updates of warm-up, or a ratio of all when below 1.", steps=True, at_least=0
    )
    min_lr_rate: float = option(
        0.0,
        "Last learning rate of cosine_with_min_lr and wsd, over the peak.",
        at_least=0,
        below=1,
    )
    num_decay_steps: float = option(
        0.1, "Updates of wsd's decay, or a ratio of all when below 1.", steps=True, above=0
    )
    weight_decay: float = option(
        0.0, "Decoupled weight decay, not of norms and biases.", at_least=0
    )
    adam_beta1: float = option(0.9, "Decay of the gradient's mean.", at_least=0, below=1)
    adam_beta2: float = option(0.999, "Decay of the gradient's square.", at_least=0, below=1)
    adam_epsilon: float = option(1e-8, "Added to the root of the square.", above=0)
    max_grad_norm: float = option(
        1.0, "Gradients are scaled down to this norm; 0 = off.", at_least=0
    )
    seed: int = option(42, "Seed of all randomness.", at_least=0)
    data_seed: int | None = option(None, "Seed of the order of rows; none = seed.", at_least=0)
    gradient_checkpointing: bool = option(
        True, "Recompute activations in the backward pass: less memory."
    )
    gradient_checkpointing_policy: Literal["matmuls", "attention", "nothing"] = option(
        "matmuls", "What is not recomputed: matrix products and attention, attention, nothing."
    )


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """Which model is trained, and in which precision."""

    model_name_or_path: str | None = option(
        None, "Hugging Face model directory or name; none = a small one from scratch."
    )
    dtype: Dtype = option("float32", "Precision of the computation.")
    param_dtype: Dtype = option("float32", "Precision of the parameters.")
    attn_implementation: Literal["auto", "xla", "cudnn", "splash"] = option(
        "auto", "Attention in training: auto = the device's kernel where it can, else xla."
    )


@dataclass(slots=True, kw_only=True)
class PeftConfig:
    """Which weights are trained: all, low-rank adapters alone, or all but some."""

    use_peft: bool = option(False, "Train low-rank adapters (LoRA); all else is frozen.")
    lora_r: int = option(16, "Rank of the adapters.", at_least=1)
    lora_alpha: int = option(32, "Adapters are scaled by lora_alpha / lora_r.", at_least=1)
    lora_dropout: float = option(
        0.05, "Share of the adapters' inputs dropped in training.", at_least=0, below=1
    )
    lora_target_modules: list[str] = option(
        ["all-linear"], "Linear layers with adapters, such as q_proj,v_proj; all-linear = all."
    )
    merge_lora: bool = option(
        False, "Save the merged model, not the adapter; so it is where the base is no directory."
    )
    freeze: str | None = option(
        None, "Regular expression: weights whose path it is found in are frozen."
    )


@dataclass(slots=True, kw_only=True)
class RowsConfig:
    """Which rows are trained on."""

    dataset_name: str | None = option(
        None,
        "File, directory, hub name or reasoning_gym/TASK; none = the embedded arithmetic set.",
    )
    dataset_config: str | None = option(None, "Configuration of a hub data set.")
    dataset_kwargs: dict = option({}, "Options of a reasoning_gym task.")
    dataset_train_split: str = option("train", "Split to train on.")
    dataset_test_split: str = option("test", "Split to evaluate on.")
    eval_dataset_name: str | None = option(
        None, "Rows to evaluate on, as in dataset_name; or name=FILE,... for several sets."
    )
    test_size: float = option(
        0.0,
        "Training rows held out for evaluation, or a fraction when below 1.",
        steps=True,
        at_least=0,
    )
    shuffle_dataset: bool = option(True, "Shuffle the rows anew in every epoch.")
    eos_token: str | None = option(None, "End-of-sequence token; none = the tokenizer's.")


@dataclass(slots=True, kw_only=True)
class DataConfig(RowsConfig):
    """Which rows are trained on, and how they become batches."""

    dataset_text_field: str = option("text", "Column that holds plain text.")
    max_length: int | None = option(1024, "Tokens per row at most; none = no limit.", at_least=2)
    truncation_mode: Literal["keep_start", "keep_end", "drop", "error"] = option(
        "keep_start", "What becomes of a longer row."
    )
    packing: bool = option(False, "Put several rows, isolated, into one of max_length tokens.")
    packing_strategy: Literal["bfd", "bfd_split", "wrapped"] = option(
        "bfd", "Best fit, best fit with long rows split, or one stream cut."
    )
    eval_packing: bool | None = option(None, "Packing in evaluation; none = as packing.")
    pad_to_multiple_of: int | None = option(
        None, "Round the padded length up to a multiple.", at_least=1
    )


@dataclass(slots=True, kw_only=True)
class RenderingConfig:
    """How conversations are made and rendered."""

    name: str = option(
        "chat",
        "What prompts and answers look like: chat (as the data has them), emoji_think, regime3, "
        "chain_of_thought, tool_use, a+b, auto, or path/to/file.py:Class; see docs/profiles.md.",
        flag="profile",
    )
    system_prompt: str | None = option(
        None, "Put before conversations that have no system message."
    )
    chat_template_path: str | None = option(
        None, "Tokenizer directory or .jinja file; none = the tokenizer's template."
    )


@dataclass(slots=True, kw_only=True)
class ProfileConfig(RenderingConfig):
    """And where completions end."""

    stop_sequences: list[str] | None = option(
        None, "Texts that end sampled completions; none = the profile's."
    )


@dataclass(slots=True, kw_only=True)
class InferenceConfig:
    """Evaluation."""

    eval_strategy: Literal["no", "steps", "epoch"] = option("no", "When to evaluate.")
    eval_steps: float | None = option(
        None,
        "Updates between evaluations, or a ratio of all; none = as logging_steps.",
        steps=True,
        above=0,
    )
    per_device_eval_batch_size: int = option(8, "Rows per device in evaluation.", at_least=1)
    max_eval_batches: int | None = option(
        None, "Evaluate on the first batches only; none = on all.", at_least=1
    )
    eval_on_start: bool = option(False, "Evaluate before the first update as well.")
    num_samples: int = option(
        0, "Held-out prompts answered at every evaluation, beside what is expected.", at_least=0
    )
    max_new_tokens: int = option(128, "Tokens of such an answer at most.", at_least=1)


@dataclass(slots=True, kw_only=True)
class OutputConfig:
    """What is written, where and when."""

    output_dir: str = option("outputs/run", "Directory of this run.")
    overwrite_output_dir: bool = option(False, "Delete what an earlier run left there.")
    resume: str = option("never", "auto, never, or the path of a checkpoint to go on from.")
    allow_config_change: list[str] = option([], "Fields that may differ from the resumed run's.")
    logging_steps: float = option(
        10.0, "Updates between log lines, or a ratio of all when below 1.", steps=True, above=0
    )
    save_strategy: Literal["no", "steps", "epoch"] = option("steps", "When to save a checkpoint.")
    save_steps: float = option(
        500.0, "Updates between checkpoints, or a ratio of all when below 1.", steps=True, above=0
    )
    save_total_limit: int | None = option(
        None, "Checkpoints to keep, the newest ones; none = all.", at_least=1
    )
    save_async: bool | None = option(
        None, "Go on while a checkpoint is written; none = where devices have their own memory."
    )
    metric_for_best_model: str | None = option(
        None, "Of evaluations, such as eval_loss: keep the best state in best/."
    )
    greater_is_better: bool | None = option(
        None, "Of that metric; none = unless its name ends in loss."
    )
    load_best_model_at_end: bool = option(False, "Write the best state to final/, not the last.")
    early_stopping_patience: int | None = option(
        None, "Stop after so many evaluations without a better one; none = never.", at_least=1
    )
    early_stopping_threshold: float = option(
        0.0, "A better evaluation is better by more than this.", at_least=0
    )
    report_to: list[str] = option(
        [], "tensorboard, wandb, trackio or path/to/file.py:Class, besides metrics.jsonl."
    )
    run_name: str | None = option(None, "Of the run in trackers; none = the directory's name.")


@dataclass(slots=True, kw_only=True)
class SystemConfig:
    """The machine and the process."""

    compilation_cache_dir: str | None = option(
        None, "Directory where compiled steps are kept; none = not kept."
    )
    grace_s: float = option(25.0, "Seconds from SIGTERM to the end at the latest.", above=0)
    mesh: str | None = option(
        None, "Devices per axis, such as data=2,fsdp=4,tensor=1; auto = all along fsdp; none = one."
    )
    sharding_rules: str | None = option(
        None, "File of rules of how weights are cut, before the built-in ones."
    )
    coordinator: str | None = option(
        None, "HOST:PORT of process 0 of several; auto = from SLURM, MPI, GKE or a TPU pod."
    )
    num_processes: int | None = option(None, "How many processes there are.", at_least=1)
    process_id: int | None = option(None, "Which of them this is, from 0.", at_least=0)
    heartbeat_s: int = option(
        100, "Seconds without a sign of a process after which the others end.", at_least=5
    )
    max_nonfinite_steps: int = option(
        3, "Stop when so many updates in a row were not finite; 0 = never.", at_least=0
    )
    callbacks: list[str] = option([], "Own callbacks, as path/to/file.py:Class or package.Class.")


@dataclass(slots=True, kw_only=True)
class DebugConfig:
    """Looking closer."""

    print_examples: int = option(
        1, "Rows shown, trained tokens marked, before the run.", at_least=0
    )
    debug_nans: bool = option(False, "Stop at the operation that makes a NaN (slow).")
    dry_run: bool = option(
        False, "Check everything, compile, take a step, and say what the run will need; no run."
    )
    profile_steps: str | None = option(
        None, "Updates to trace, such as 10:15, for TensorBoard and Perfetto."
    )


@dataclass(slots=True, kw_only=True)
class SFTSection:
    """Supervised fine-tuning."""

    completion_only_loss: bool | None = option(
        None, "Train on completions only; none = where rows have a prompt."
    )
    assistant_only_loss: bool = option(False, "Train on the assistant's messages only.")
    loss_chunk_size: int = option(256, "Tokens whose logits exist at once.", at_least=1)


@dataclass(slots=True, kw_only=True)
class TrainerConfig(Settings):
    """What all algorithms share; an algorithm adds one section of its own."""

    hyperparams: Hyperparams = section(Hyperparams)
    model: ModelConfig = section(ModelConfig)
    peft: PeftConfig = section(PeftConfig)
    data: RowsConfig = section(RowsConfig)
    profile: ProfileConfig = section(ProfileConfig)
    inference: InferenceConfig = section(InferenceConfig)
    output: OutputConfig = section(OutputConfig)
    system: SystemConfig = section(SystemConfig)
    debug: DebugConfig = section(DebugConfig)

    def problems(self) -> list[str]:
        return rules.problems(options(type(self)), self.flat(), self.embedded)


@dataclass(slots=True, kw_only=True)
class SFTConfig(TrainerConfig):
    """Supervised fine-tuning: next-token cross-entropy over the trained tokens."""

    algorithm: ClassVar[str] = "sft"
    # What the run with no flags needs to learn addition from scratch in about a minute.
    embedded: ClassVar[dict[str, Any]] = {
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 50.0,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "per_device_train_batch_size": 128,
        "pad_to_multiple_of": 4,
        "max_steps": 900,
        "logging_steps": 100.0,
    }

    data: DataConfig = section(DataConfig)
    output: OutputConfig = section(OutputConfig, output_dir="outputs/sft")
    sft: SFTSection = section(SFTSection)


def diff(old: TrainerConfig, new: TrainerConfig) -> list[tuple[str, Any, Any]]:
    """The fields whose values differ, as (name, old, new), in the order of declaration."""
    before, after = old.flat(), new.flat()
    names = list(dict.fromkeys([*before, *after]))
    return [(n, before.get(n), after.get(n)) for n in names if before.get(n) != after.get(n)]
