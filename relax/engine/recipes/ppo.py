"""PPO: from a configuration to a model directory."""

import dataclasses
from functools import partial
from typing import Any

from relax.config import PPOConfig
from relax.engine.model_source import ModelSource
from relax.engine.recipes import rl
from relax.engine.recipes.demo import pretrain_demo
from relax.engine.run import Run, RunResult
from relax.engine.schedule import make_optimizer
from relax.errors import ConfigError
from relax.models import load_pretrained
from relax.models.heads import trunk
from relax.models.huggingface.classifiers import load_classifier
from relax.models.huggingface.pretrained import is_classifier
from relax.trainers import PPOTrainer
from relax.trainers.ppo_trainer import COPY


def train_ppo(config: PPOConfig, train_rows=None, eval_rows=None, **where) -> RunResult:
    """Trains a model on the rewards of its completions, with a critic as the baseline.

    Args:
      train_rows, eval_rows, **where: arguments of `Run`.
    """
    ppo = config.ppo
    with Run(config, train_rows, eval_rows, **where) as run:
        # 1. The tokenizer, the model, and the critic if it has its own files.
        tokenizer = run.load_tokenizer()
        model, params = run.load_model(has_initial_reference=ppo.kl_coef > 0)
        critic = run.attempt(find_critic, ppo.value_model, tokenizer)

        # 2. The rewards, tools and environment, in processes that can be killed.
        rewards = rl.load_rewards(run, tokenizer)
        partner = rl.load_partner(run, tokenizer)

        # 3. The data: prompts, checked against the columns that rewards read, split into rollouts.
        sizes = rollout_sizes(run.config)
        read = partial(rl.read_prompts, sizes=sizes, partner=partner, critic=critic)
        data = run.load_data(
            read, tokenizer, model, kind="prompts", demo_rows=rl.with_answers, rewards=rewards
        )
        params = pretrain_demo(run, model, tokenizer, params)

        # 4. The trainer.
        policy_optimizer, critic_optimizer = optimizers(run.config, run.steps(data))
        trainer = PPOTrainer(
            model,
            policy_optimizer,
            critic_optimizer=critic_optimizer,
            params=params,
            reward_funcs=rewards,
            **critic_options(run, model, critic),
            **ppo_options(config),
            **rl.rollout_options(run, data, sizes, tokenizer, partner),
            **run.options(data, *rl.completion_callbacks(run, data, rewards)),
        )

        # 5. Training: resume, roll out, score, update, evaluate, save; then the model directory.
        return run.train(trainer, data, headline=rl.HEADLINE)


def rollout_sizes(config: PPOConfig) -> rl.Sizes:
    """Sizes of rollouts and updates, from `num_mini_batches`."""
    ppo = config.ppo
    return rl.Sizes.make(config, updates_per_pass=ppo.num_mini_batches, passes=ppo.num_ppo_epochs)


def find_critic(value_model: str | None, tokenizer) -> ModelSource | None:
    """Finds the files of a separate critic; None: the critic uses the policy's trunk.

    Raises:
      ConfigError: the directory holds an adapter, or its tokens differ from the policy's.
    """
    if value_model is None or value_model == COPY:
        return None
    critic = ModelSource.find(value_model)
    if critic.is_adapter:
        raise ConfigError(
            "value_model must be the directory of a model or a reward model, but "
            f"'{value_model}' holds an adapter. Merge it first."
        )
    if tokenizer is not None and critic.tokenizer().get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"value_model must have the policy's tokens, but the tokenizer of '{value_model}' "
            "has others. Use a critic of the same family, or remove --value_model."
        )
    return critic


def critic_options(run: Run[PPOConfig], model, critic: ModelSource | None) -> dict[str, Any]:
    """`value_model` and `value_params` of `PPOTrainer` for a separate critic."""
    if critic is None:
        return {"value_model": run.config.ppo.value_model}
    value_model = trunk(model.clone(config=critic.model_config, lora=None))
    if run.resume_from is not None and not run.keeps_frozen:  # a checkpoint supplies its parameters
        return {"value_model": value_model}
    load = load_classifier if is_classifier(critic.files) else load_pretrained
    _, params = load(critic.files, value_model.dtype, param_dtype=value_model.param_dtype)
    return {"value_model": value_model, "value_params": params}


def optimizers(config: PPOConfig, steps: int) -> tuple:
    """Makes the optimizers of the policy, which may start later, and of the critic.

    Raises:
      ConfigError: `critic_warmup_steps` leaves the policy no update.
    """
    rate, warmup = config.ppo.critic_learning_rate, config.ppo.critic_warmup_steps
    if warmup >= steps:
        raise ConfigError(
            f"critic_warmup_steps must leave steps for the policy, got {warmup} of {steps}. "
            "Lower it."
        )
    critic = config if rate is None else config.replace(learning_rate=rate)
    return make_optimizer(config, steps - warmup), make_optimizer(critic, steps)


def ppo_options(config: PPOConfig) -> dict[str, Any]:
    """The options of `PPOTrainer` that are fields of `config.ppo`."""
    options = dataclasses.asdict(config.ppo)
    for name in ("num_mini_batches", "critic_learning_rate", "value_model"):
        options.pop(name)
    return options
