"""Model files: resolves a model's directory and parses its configuration, once per run."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from relax import data
from relax.config import TrainerConfig
from relax.errors import ConfigError, DataError
from relax.models import (
    Transformer,
    TransformerConfig,
    load_pretrained,
    read_generation_config,
    read_pretrained_config,
)
from relax.models.config import LoRA
from relax.models.huggingface.peft import (
    base_of,
    check_mergeable,
    is_adapter_directory,
    load_merged,
)
from relax.models.huggingface.pretrained import find_directory
from relax.models.huggingface.quantized import BaseQuantizer
from relax.models.huggingface.text_parts import has_text_part

# The demo model, trained from scratch if no model is named: 0.8 M parameters.
DEMO_MODEL = TransformerConfig(
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


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """The source of a model: a directory, an adapter's directory, or the demo model.

    Attributes:
      path: the path or hub name given by the user; None: the demo model.
      directory: the resolved directory of `path`, which may be an adapter's.
      base_directory: the directory of the model itself.
      model_config: the model's configuration.
      is_adapter: whether `directory` holds an adapter, which is merged into its base on loading.
    """

    path: str | None
    directory: Path | None
    base_directory: Path | None
    model_config: TransformerConfig
    is_adapter: bool = False

    @classmethod
    def find(cls, path: str | None) -> "ModelSource":
        """Resolves a path or hub name and reads its configuration.

        Raises:
          ModelLoadError: the directory does not exist, or its config.json is unsupported.
        """
        if path is None:
            return cls(None, None, None, DEMO_MODEL)
        directory = find_directory(path)
        is_adapter = is_adapter_directory(directory)
        base = find_directory(base_of(directory)) if is_adapter else directory
        return cls(path, directory, base, read_pretrained_config(base), is_adapter)

    @property
    def files(self) -> Path:
        """`directory`, of any model but the demo model, which has none."""
        assert self.directory is not None
        return self.directory

    @property
    def surroundings(self) -> Path | None:
        """The directory of a model of images and text whose text part is trained."""
        base = self.base_directory
        return base if base is not None and has_text_part(base) else None

    @functools.cached_property
    def generation_config(self) -> dict:
        """The fields of generation_config.json; {} for the demo model."""
        return {} if self.base_directory is None else read_generation_config(self.base_directory)

    def tokenizer(self, chat_template_path: str | None = None, eos_token: str | None = None):
        """Loads the model's tokenizer, or an adapter's own if it has one.

        Args:
          chat_template_path, eos_token: replacements for the tokenizer's.
        """
        changes = (chat_template_path, eos_token)
        if self.directory is None:
            return data.adapt_tokenizer(data.arithmetic_tokenizer(), *changes)
        own = (self.directory / "tokenizer_config.json").exists()
        return data.load_tokenizer(self.directory if own else self.base_directory, *changes)

    def load(self, dtype, **options) -> tuple[Transformer, dict]:
        """Loads model and parameters, merging an adapter; arguments as for `load_pretrained`.

        Raises:
          ConfigError: the weights of an adapter's base are to be quantised.
        """
        if self.is_adapter and options.get("quantize") is not None:
            raise ConfigError(
                f"quantize_base needs the directory of a model, but '{self.path}' holds an "
                "adapter. Merge it into its base first, with --merge_lora or relax merge."
            )
        load = load_merged if self.is_adapter else load_pretrained
        return load(self.files, dtype, **options)

    def end_tokens(self, tokenizer) -> tuple[int, ...]:
        """All token ids that end a turn: those of generation_config.json and the tokenizer's."""
        ids = self.generation_config.get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        found = {i for i in (*ids, tokenizer.eos_token_id) if isinstance(i, int)}
        return tuple(sorted(found))

    def check_tokens(self, tokenizer) -> None:
        """Checks that the tokenizer's begin and end tokens are in the model's vocabulary.

        Raises:
          DataError: one is not.
        """
        ids = {*self.end_tokens(tokenizer), tokenizer.bos_token_id} - {None}
        wrong = sorted(i for i in ids if not 0 <= i < self.model_config.vocab_size)
        if wrong:
            names = ", ".join(f"{i} ({tokenizer.convert_ids_to_tokens(i)!r})" for i in wrong)
            raise DataError(
                "begin and end tokens of the tokenizer must be among the "
                f"{self.model_config.vocab_size} tokens of the model, got {names}. Check that this "
                "is the model's tokenizer."
            )

    def adapter_base(self, config: TrainerConfig) -> str | None:
        """The base model's directory or hub name to save the adapter with; None: merge it.

        It is merged on request, and if PEFT could not load the base: the demo model, or a model
        that an adapter was merged into.
        """
        if not config.peft.use_peft or config.peft.merge_lora or self.path is None:
            return None
        local = Path(self.path).expanduser()
        if local.is_file() or self.is_adapter:
            return None
        return str(local.resolve()) if local.is_dir() else self.path


def make_model(
    source: ModelSource,
    config: TrainerConfig,
    *,
    weights: bool,
    load: Callable | None = None,
    quantize: BaseQuantizer | None = None,
) -> tuple[Transformer, dict | None]:
    """Makes the model with the settings of a run's flags, and its parameters.

    Args:
      weights: False: load no parameters, since a checkpoint supplies them.
      load: replaces `ModelSource.load`.
      quantize: see `load_pretrained`.

    Returns:
      `(model, params)`; `params` is None without `weights`, and for the demo model.
    """
    options: dict[str, Any] = {
        "param_dtype": jnp.dtype(config.model.param_dtype),
        "gradient_checkpointing": config.hyperparams.gradient_checkpointing,
    }
    dtype = jnp.dtype(config.model.dtype)
    if weights and source.path is not None:
        if quantize is not None:
            options["quantize"] = quantize
        model, params = (load or source.load)(dtype, **options)
    else:
        model, params = Transformer(source.model_config, dtype, **options), None
    p = config.peft
    if p.use_peft:
        if p.use_dora and source.model_config.num_experts:
            raise ConfigError(
                "use_dora excludes models with experts, for whose layers PEFT has no DoRA; got "
                f"model_type {source.model_config.model_type}. Use plain adapters."
            )
        model = model.clone(lora=adapters_of(config))
        if source.adapter_base(config) is None:
            check_mergeable(model)
    return model.clone(
        gradient_checkpointing_policy=config.hyperparams.gradient_checkpointing_policy,
        attn_implementation=config.model.attn_implementation,
    ), params


def adapters_of(config: TrainerConfig) -> LoRA:
    """The adapters that the flags describe."""
    p = config.peft
    scale: dict[str, Any] = {"use_rslora": p.use_rslora, "use_dora": p.use_dora}
    scale["rank_pattern"] = tuple(p.rank_pattern.items())
    scale["alpha_pattern"] = tuple(p.alpha_pattern.items())
    scale["modules_to_save"] = tuple(p.lora_modules_to_save)
    targets = tuple(p.lora_target_modules)
    return LoRA(p.lora_r, p.lora_alpha, p.lora_dropout, targets, **scale)
