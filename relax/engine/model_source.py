"""The parts of a run, made from its configuration: tokenizer, model, data, optimizer, trainer."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from relax import data
from relax.config import TrainerConfig, resolve_steps
from relax.config.run_rules import OPTIMIZER_FIELDS
from relax.data.loader import epoch_order
from relax.errors import ConfigError, ErrorList
from relax.models import (
    Transformer,
    TransformerConfig,
    load_pretrained,
    read_generation_config,
    read_pretrained_config,
)
from relax.models.config import LoRA
from relax.models.huggingface.peft import base_of, is_adapter_directory, load_merged
from relax.models.huggingface.pretrained import find_directory
from relax.optimizers.optimizers import OPTIMIZERS, learning_rate_schedule
from relax.optimizers.stochastic_rounding import stochastic_rounding
from relax.trainers.state import initial_state

# The model that is trained from scratch where none is named: 0.8 M parameters.
EMBEDDED_MODEL = TransformerConfig(
    vocab_size=261,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)


def make_tokenizer(config: TrainerConfig):
    """The model's tokenizer, or the embedded one."""
    path = config.model.model_name_or_path
    changes = (config.profile.chat_template_path, config.data.eos_token)
    if path is None:
        return data.adapt_tokenizer(data.arithmetic_tokenizer(), *changes)
    return load_tokenizer(path, *changes)


def load_tokenizer(path: str, chat_template_path: str | None = None, eos_token: str | None = None):
    """The tokenizer of a model or adapter directory, or a hub name."""
    changes = (chat_template_path, eos_token)
    # The model first: a wrong path would be reported as a directory without a tokenizer.
    directory = find_directory(path)
    read_pretrained_config(_of_model(directory))
    if not (directory / "tokenizer_config.json").exists():
        directory = _of_model(directory)
    return data.load_tokenizer(directory, *changes)


def make_model(
    config: TrainerConfig, *, weights: bool, load=None
) -> tuple[Transformer, dict | None]:
    """The model, and its parameters where it has any to begin with and `weights` asks for them.

    A directory with an adapter stands for the model that it belongs to, with the adapter merged.
    `load` takes the place of `load_model`.
    """
    path = config.model.model_name_or_path
    options = {
        "param_dtype": jnp.dtype(config.model.param_dtype),
        "gradient_checkpointing": config.hyperparams.gradient_checkpointing,
    }
    dtype, params = jnp.dtype(config.model.dtype), None
    if path is None:
        model = Transformer(EMBEDDED_MODEL, dtype, **options)
    else:
        if weights:
            model, params = (load or load_model)(path, dtype, **options)
        else:
            shape = read_pretrained_config(_of_model(find_directory(path)))
            model = Transformer(shape, dtype, **options)
    p = config.peft
    if p.use_peft:
        targets = tuple(p.lora_target_modules)
        model = model.clone(lora=LoRA(p.lora_r, p.lora_alpha, p.lora_dropout, targets))
    return model.clone(
        gradient_checkpointing_policy=config.hyperparams.gradient_checkpointing_policy,
        attn_implementation=config.model.attn_implementation,
    ), params


def shape_of(config: TrainerConfig) -> TransformerConfig:
    """The sizes of the model of a job, without its weights."""
    path = config.model.model_name_or_path
    if path is None:
        return EMBEDDED_MODEL
    return read_pretrained_config(_of_model(find_directory(path)))


def load_model(path: str, dtype, **options) -> tuple[Transformer, dict]:
    """As `load_pretrained`; an adapter directory is its model with the adapter merged."""
    directory = find_directory(path)
    load = load_merged if is_adapter_directory(directory) else load_pretrained
    return load(directory, dtype, **options)


def generation_config(path: str | None) -> dict:
    """What generation_config.json says of a model; {} of the embedded one."""
    return {} if path is None else read_generation_config(_of_model(find_directory(path)))


def end_tokens(path: str | None, tokenizer) -> tuple[int, ...]:
    """All ids that end a turn: those of generation_config.json, and the tokenizer's."""
    ids = generation_config(path).get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    found = {i for i in (*ids, tokenizer.eos_token_id) if isinstance(i, int)}
    return tuple(sorted(found))


def adapter_base(config: TrainerConfig) -> str | None:
    """The directory or hub name that the run's adapter is saved for; None: it is to be merged.

    So it is where it was asked for, and where the base is no directory that PEFT could load: a
    model from scratch, or one that an adapter was merged into.
    """
    path = config.model.model_name_or_path
    if not config.peft.use_peft or config.peft.merge_lora or path is None:
        return None
    local = Path(path).expanduser()
    if is_adapter_directory(find_directory(path)):
        return None
    return str(local.resolve()) if local.is_dir() else path


def _of_model(directory: Path) -> Path:
    """The directory of the model itself, where there may be an adapter in the one given."""
    return find_directory(base_of(directory)) if is_adapter_directory(directory) else directory


def total_steps(config: TrainerConfig, updates_per_epoch: int, updates_per_item: int = 1) -> int:
    """Updates of the whole run: `max_steps`, up to the end of the item under way, or all epochs."""
    if config.hyperparams.max_steps > 0:
        return -(-config.hyperparams.max_steps // updates_per_item) * updates_per_item
    return config.hyperparams.num_train_epochs * updates_per_epoch


def make_optimizer(config: TrainerConfig, steps: int):
    """The configured optimizer, with the course of its learning rate over `steps` updates."""
    h = config.hyperparams
    schedule = learning_rate_schedule(
        h.lr_scheduler_type,
        h.learning_rate,
        steps,
        resolve_steps(h.warmup_steps, steps),
        min_lr_rate=h.min_lr_rate,
        num_decay_steps=resolve_steps(h.num_decay_steps, steps),
    )
    arguments = {"adam_beta1": "b1", "adam_beta2": "b2", "adam_epsilon": "eps"}
    settings = {arguments[field]: getattr(h, field) for field in OPTIMIZER_FIELDS[h.optim]}
    optimizer = OPTIMIZERS[h.optim](schedule, weight_decay=h.weight_decay, **settings)
    if config.model.param_dtype == "bfloat16":
        optimizer = stochastic_rounding(optimizer, h.seed)
    return optimizer


def eval_interval(config: TrainerConfig, steps: int) -> int | None:
    """`eval_steps` of `Trainer.train`: None at every epoch's end, 0 only at the run's."""
    inference = config.inference
    if inference.eval_strategy == "steps":
        return resolve_steps(inference.eval_steps or config.output.logging_steps, steps)
    return None if inference.eval_strategy == "epoch" else 0


def save_interval(config: TrainerConfig, steps: int) -> int | None:
    """`save_steps` of `Trainer.train`: 0 at every epoch's end, None only at the run's."""
    output = config.output
    if output.save_strategy == "steps":
        return resolve_steps(output.save_steps, steps)
    return 0 if output.save_strategy == "epoch" else None


def source_rows(config: TrainerConfig, given=None):
    """Rows to train on; and rows to evaluate on, several sets by name, or None.

    `given` are the two, in place of the named ones.
    """
    d = config.data
    if given is None and d.dataset_name is None:
        return data.arithmetic_rows("train"), data.arithmetic_rows("test")
    train_source, eval_source = given or (d.dataset_name, d.eval_dataset_name)
    options, split = d.dataset_kwargs, d.dataset_test_split
    found, train, sets = ErrorList(), None, {}
    with found.catch():
        train = data.read_rows(train_source, d.dataset_train_split, d.dataset_config, options)
    if eval_source is not None:
        with found.catch():
            named = named_sets(eval_source, split)
            for name, source in ({"": eval_source} if named is None else named).items():
                with found.catch():
                    sets[name] = data.read_rows(source, split)
    found.raise_all()
    if sets:
        return train, sets[""] if list(sets) == [""] else sets
    if d.test_size:
        return _split(train, resolve_steps(d.test_size, len(train)), data_seed(config))
    if config.inference.eval_strategy == "no" and not config.inference.eval_on_start:
        return train, None
    if given is not None or Path(d.dataset_name).is_file():
        raise ConfigError(
            "eval_strategy and eval_on_start need rows to evaluate on: pass --eval_dataset_name "
            "FILE, or --test_size 0.1 to hold out a tenth of the rows."
        )
    return train, data.read_rows(d.dataset_name, split, d.dataset_config, options)


def named_sets(source, split: str) -> dict | None:
    """Several evaluation sets by name; None where `source` is a single one.

    Args:
      source: `easy=a.jsonl,hard=b.jsonl`, or a mapping of names to rows; one that has the split is
        a single data set, of splits.

    Raises:
      ConfigError: a name stands twice, or is no word.

    >>> named_sets("easy=a.jsonl,hard=b.jsonl", "test")
    {'easy': 'a.jsonl', 'hard': 'b.jsonl'}
    """
    if isinstance(source, Mapping):
        return None if split in source else dict(source)
    if not isinstance(source, str) or "=" not in source or Path(source).exists():
        return None
    sets: dict[str, str] = {}
    for part in source.split(","):
        name, equals, path = part.partition("=")
        if not (name.isidentifier() and equals and path) or name in sets:
            raise ConfigError(
                "eval_dataset_name must be a data set, or name=FILE of several with commas "
                f"between, each name once and a word, got {source!r}."
            )
        sets[name] = path
    return sets


def _split(rows: data.Rows, size: int, seed: int) -> tuple[data.Rows, data.Rows]:
    """Holds out `size` rows, drawn by the seed; both parts stay in the file's order."""
    if size >= len(rows):
        raise ConfigError(
            f"test_size must leave rows to train on, got {size} of {len(rows)} rows. Lower it."
        )
    held_out = sorted(epoch_order(len(rows), seed, 0)[:size].tolist())
    chosen = set(held_out)
    kept = [i for i in range(len(rows)) if i not in chosen]

    def part(indices):
        origins = [rows.origin(i) for i in indices]
        return data.Rows([rows.rows[i] for i in indices], origins.__getitem__, rows.notes)

    return part(kept), part(held_out)


def data_seed(config: TrainerConfig) -> int:
    """The seed of the order of rows."""
    h = config.hyperparams
    return h.seed if h.data_seed is None else h.data_seed


def make_state(trainer, params, seed: int):
    """The state before the first update; `params` (or None: fresh ones) are taken over."""
    key = jax.random.key(seed)
    reference = getattr(trainer, "reference", False)
    return initial_state(trainer.model, trainer.optimizer, key, params, trainer.freeze, reference)
