"""PPO as a job."""

import dataclasses

import jax

from relax.engine.model_source import load_model, load_tokenizer, make_optimizer
from relax.engine.recipes.rl import RLRecipe
from relax.errors import ConfigError
from relax.models import TransformerConfig, read_pretrained_config
from relax.models.huggingface.classifiers import load_classifier
from relax.models.huggingface.directories import find_directory
from relax.models.huggingface.peft import is_adapter_directory
from relax.models.huggingface.pretrained import is_classifier
from relax.sampling.config import max_positions
from relax.trainers import PPOTrainer
from relax.trainers.ppo_trainer import COPY


class PPORecipe(RLRecipe):
    """Completions against what a critic expected."""

    def __init__(self, config, console):
        super().__init__(config, console)
        path = config.ppo.value_model
        self.critic = None  # the directory of the critic, if it has one
        if path not in (None, COPY):
            self.critic = find_directory(path)
            if is_adapter_directory(self.critic):
                raise ConfigError(
                    "value_model must be the directory of a model or a reward model, and "
                    f"'{path}' holds an adapter. Merge it first."
                )

    @property
    def updates_per_pass(self) -> int:
        return self.config.ppo.num_mini_batches

    @property
    def passes(self) -> int:
        return self.config.ppo.num_ppo_epochs

    @property
    def reference_is_initial_model(self) -> bool:
        named = self.config.model.model_name_or_path is not None
        return self.config.ppo.kl_coef > 0 and named

    def positions(self, shape: TransformerConfig) -> tuple[int, str]:
        found = [max_positions(shape)]
        if self.critic is not None:
            critic = read_pretrained_config(self.critic)
            found.append((critic.max_position_embeddings, "of value_model"))
        return min(found)

    def optimizer(self, steps: int):
        """Of the policy, and of the critic."""
        rate, warmup = self.config.ppo.critic_learning_rate, self.config.ppo.critic_warmup_steps
        if warmup >= steps:
            raise ConfigError(
                f"critic_warmup_steps must leave updates for the policy, got {warmup} of {steps}. "
                "Lower it."
            )
        critic = self.config if rate is None else self.config.replace(learning_rate=rate)
        return make_optimizer(self.config, steps - warmup), make_optimizer(critic, steps)

    def trainer(self, model, tokenizer, optimizer, callbacks: tuple) -> PPOTrainer:
        policy, critic = optimizer
        options = dataclasses.asdict(self.config.ppo)
        for name in ("num_mini_batches", "critic_learning_rate"):
            options.pop(name)
        if self.critic is not None:
            self._check_tokens(tokenizer)
            shape = read_pretrained_config(self.critic)
            options["value_model"] = model.clone(config=shape, lora=None)
        return PPOTrainer(
            model,
            policy,
            critic_optimizer=critic,
            callbacks=callbacks,
            **self._shared_options(tokenizer),
            **options,
        )

    def start(self, trainer, params):
        key = jax.random.key(self.config.hyperparams.seed)
        trainer.params, trainer.donate_params = params, True
        trainer.value_params = self._critic_params(trainer)
        return trainer.create_train_state(key)

    def _critic_params(self, trainer):
        if self.critic is None:
            return None
        load = load_classifier if is_classifier(self.critic) else load_model
        model = trainer.value_model
        return load(self.critic, model.dtype, param_dtype=model.param_dtype)[1]

    def _check_tokens(self, tokenizer) -> None:
        if load_tokenizer(str(self.critic)).get_vocab() != tokenizer.get_vocab():
            raise ConfigError(
                f"value_model reads the policy's tokens, and the tokenizer of '{self.critic}' has "
                "others. Take a critic of the same family, or none."
            )
