"""Common parts of GRPO and PPO runs: prompts, reward functions, sampling, callbacks."""

import dataclasses
import json
import zlib
from typing import Any

import jax.numpy as jnp

from relax.callbacks.completions import Completions, RewardCounters
from relax.callbacks.curriculum import CurriculumProgress
from relax.config import DistillConfig, GRPOConfig, OnlineDPOConfig, PPOConfig
from relax.data.curriculum import PassRateCurriculum
from relax.data.prompt_loader import PromptLoader
from relax.data.prompts import Prompts, prepare_prompts
from relax.engine.devices import rollout_mesh
from relax.engine.model_source import ModelSource
from relax.engine.reward_model import PREFIX, ModelReward, reward_functions
from relax.engine.rows import Data, Sources, data_seed, limits_of
from relax.engine.run import Run
from relax.errors import DataError, ErrorList
from relax.models import TransformerConfig
from relax.rewards import EpisodeRunner, RewardRunner
from relax.sampling import SamplingConfig
from relax.sampling.config import max_positions
from relax.trainers.rl.differences import Correction
from relax.trainers.rl.generation import check_prompts, make_partner, tools_of
from relax.trainers.rl.partners import Partner

RLRun = Run[GRPOConfig] | Run[PPOConfig] | Run[DistillConfig] | Run[OnlineDPOConfig]

HEADLINE = ("eval_reward", "eval_pass@1")


def load_rewards(run: RLRun, tokenizer) -> Any:
    """Loads a run's reward functions, in worker processes, or `model:DIR` in this process.

    Returns:
      A `RewardRunner`, closed when the run ends; None if there is a problem, which `load_data`
      reports.
    """
    m, r = run.config.model, run.config.reward
    dtypes = {"dtype": jnp.dtype(m.dtype), "param_dtype": jnp.dtype(m.param_dtype)}

    def make() -> RewardRunner:
        specs = r.reward_funcs
        if tokenizer is None:  # the other functions can still be checked
            functions = [spec for spec in specs if not spec.startswith(PREFIX)]
        else:
            ends = run.source.end_tokens(tokenizer)
            limits = limits_of(run.config)
            functions = reward_functions(specs, tokenizer, ends, limits=limits, **dtypes)
        return RewardRunner(
            functions,
            r.reward_weights if len(functions) == len(specs) else None,
            parameters=r.reward_kwargs,
            timeout_s=r.reward_timeout_s,
            max_errors=r.max_reward_errors,
            workers=r.reward_workers,
        )

    return run.close_at_end(run.attempt(make))


def load_partner(run: RLRun, tokenizer) -> Any:
    """Loads a run's tools and environment, and how the chat template renders them.

    Returns:
      A `Partner`, whose processes end with the run; None if there is none, or a problem, which
      `load_data` reports.
    """
    e = run.config.episodes

    def make() -> EpisodeRunner:
        return EpisodeRunner(
            e.tools, e.environment_factory, timeout_s=e.tool_timeout_s, workers=e.tool_workers
        )

    if not e.tools and e.environment_factory is None:
        return None
    runner = run.close_at_end(run.attempt(make))
    if runner is None or tokenizer is None:
        return None
    return run.attempt(
        lambda: make_partner(
            tokenizer,
            run.source.end_tokens(tokenizer),
            runner,
            tool_format=e.tool_format,
            max_tool_calling_iterations=e.max_tool_calling_iterations,
        )
    )


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of rollouts and updates.

    Attributes:
      completions_per_update: completions per optimizer step.
      prompts_per_item: prompts per rollout, each with a group of `num_generations` completions.
      updates_per_item: updates per rollout, over all passes.
    """

    completions_per_update: int
    prompts_per_item: int
    updates_per_item: int
    plan: str

    @classmethod
    def make(cls, config, *, updates_per_pass: int, passes: int) -> "Sizes":
        """Computes the sizes from a configuration.

        Args:
          updates_per_pass: updates per pass over the completions of a rollout.
          passes: number of passes.
        """
        h, G = config.hyperparams, config.rollout.num_generations
        completions = h.per_device_train_batch_size * h.gradient_accumulation_steps
        prompts, updates = completions * updates_per_pass // G, updates_per_pass * passes
        plan = (
            f"{completions} completions ({h.per_device_train_batch_size} x "
            f"{h.gradient_accumulation_steps}), {updates} per rollout of {prompts} prompts x {G}"
        )
        return cls(completions, prompts, updates, plan)


@dataclasses.dataclass(frozen=True)
class PromptReport:
    """The report on a dataset's prompts, with the number per epoch that fill no rollout."""

    prompts: Prompts
    left_out: int

    def to_dict(self) -> dict:
        lengths = self.prompts.lengths
        return {
            "num_rows": len(self.prompts),
            "columns": list(self.prompts.columns),
            "num_tokens": int(lengths.sum()),
            "longest": int(lengths.max()),
            "left_out_per_epoch": self.left_out,
        }


def read_prompts(
    config,
    tokenizer,
    *,
    model_config: TransformerConfig,
    sources: Sources,
    rewards: RewardRunner,
    sizes: Sizes,
    partner: Partner | None = None,
    extra_rounds: int = 0,
    critic: ModelSource | None = None,
) -> Data:
    """Tokenises the prompts of every set and splits them into rollouts.

    Args:
      rewards: reward functions, checked against the rows' columns.
      partner: tools, which prompts are rendered with, and an environment, tried on the first row.
      extra_rounds: extra prompts for resampling, in multiples of an item's prompts.
      critic: the files of a separate PPO critic, for its number of positions.

    Raises:
      RelaxError: all problems of all sets together.
    """
    limit, whose = _positions(model_config, rewards, critic)
    room = limit - config.rollout.max_completion_length
    if room < 1:
        raise DataError(
            f"max_completion_length {config.rollout.max_completion_length} leaves no room for a "
            f"prompt in the {limit} positions {whose}. Lower it."
        )
    loaders, reports, digest = {}, {}, 0
    found = ErrorList()
    for name, rows in sources.sets.items():
        with found.catch():
            prompts = prepare_prompts(
                rows,
                tokenizer,
                system_prompt=sources.system_prompt,
                vocab_size=model_config.vocab_size,
                max_prompt_length=room,
                limits=limits_of(config),
                tools=tools_of(partner),
                cache=sources.cache,
            )
            rewards.check_rows(prompts.rows, prompts.facts)
            training = name == sources.training
            if training:
                rewards.probe(prompts.rows, prompts.conversational)
            if partner is not None:
                check_prompts(partner, prompts)
            extra = sizes.prompts_per_item * extra_rounds
            loader = _loader(config, prompts, sizes, extra) if training else None
            loaders[name] = loader or _eval_loader(config, prompts)
            reports[name] = PromptReport(prompts, loaders[name].num_left_out)
            digest = zlib.crc32(prompts.digest.to_bytes(4, "big"), digest)
    found.raise_all()
    return Data(
        train=loaders[sources.training],
        eval=sources.eval_loaders(loaders),
        reports=reports,
        digest=f"{digest:08x}",
        plan=sizes.plan,
        show=lambda console: _show(console, config, reports, rewards, sources, sizes),
        updates_per_item=sizes.updates_per_item,
        stop_sequences=sources.stop_sequences,
    )


def rollout_options(
    run: RLRun, data: Data, sizes: Sizes, tokenizer, partner: Partner | None = None
) -> dict[str, Any]:
    """The arguments of `RLTrainer` for any algorithm, from the configuration."""
    config = run.config
    r = config.rollout
    sampling = SamplingConfig(
        max_new_tokens=r.max_completion_length,
        temperature=r.temperature,
        top_k=r.top_k,
        top_p=r.top_p,
        min_p=r.min_p,
        repetition_penalty=r.repetition_penalty,
        eos_token_ids=run.source.end_tokens(tokenizer),
        stop=data.stop_sequences,
        slots=r.rollout_slots,
    )
    return {
        "tokenizer": tokenizer,
        "tools": partner or (),
        **_agents(run, tokenizer),
        "sampling": sampling,
        "eval_sampling": _eval_sampling(r, sampling),
        "num_generations": r.num_generations,
        "prompts_per_item": sizes.prompts_per_item,
        "completions_per_update": sizes.completions_per_update,
        "recompute_old_logprobs": r.recompute_old_logprobs,
        "rollout_dtype": r.rollout_dtype,
        "correction": _correction(r),
        "async_rollouts": r.async_rollouts // sizes.updates_per_item,
        "rollout_mesh": rollout_mesh(config),
        "rollout_reuse": r.rollout_reuse,
        "pass_reward": config.reward.pass_reward,
    }


def completion_callbacks(run: RLRun, data: Data, rewards: RewardRunner) -> tuple:
    """The callbacks that save reward counters, and show and write completions."""
    r = run.config.reward
    shown = r.num_completions_to_print if r.log_completions else 0
    directory = run.run_dir.path / "completions"
    found: tuple = (
        RewardCounters(rewards),
        Completions(directory, run.logging_steps(data), run.console, shown),
    )
    if data.train.curriculum is not None:
        rows = data.train.prompts.rows
        found += (CurriculumProgress(data.train.curriculum, rows, r.pass_reward),)
    return found


def with_answers(rows: list[dict]) -> list[dict]:
    """Rows of the demo task, with the assistant's reply as the column `answer`."""
    return [{"prompt": row["prompt"], "answer": row["completion"][0]["content"]} for row in rows]


def _correction(r) -> Correction | None:
    if not r.importance_sampling_correction:
        return None
    return Correction(r.importance_sampling_mode, r.importance_sampling_clip_max)


def _positions(
    policy: TransformerConfig, rewards: RewardRunner, critic: ModelSource | None
) -> tuple[int, str]:
    """The smallest number of positions of policy, critic and reward models, and whose it is."""
    found = [max_positions(policy)]
    if critic is not None:
        found.append((critic.model_config.max_position_embeddings, "of value_model"))
    found += [
        (f.model.config.max_position_embeddings, f"of reward model {f.__name__!r}")
        for f in rewards.functions
        if isinstance(f, ModelReward)
    ]
    return min(found, key=lambda pair: pair[0])


def _agents(run: RLRun, tokenizer) -> dict[str, Any]:
    """The agent of GRPO, if there is one; its process ends with the run."""
    r: Any = run.config.rollout
    if getattr(r, "agent", None) is None:
        return {}
    from relax.serving.agents import Agents

    agents = Agents(
        r.agent,
        tokenizer,
        timeout_s=r.agent_timeout_s,
        max_length=r.agent_max_length,
        limits=limits_of(run.config),
    )
    return {"agents": run.close_at_end(agents)}


def _eval_sampling(rollout, sampling: SamplingConfig) -> SamplingConfig:
    temperature = rollout.eval_temperature
    temperature = rollout.temperature if temperature is None else temperature
    if temperature == 0:
        return dataclasses.replace(sampling, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, n=1)
    n = rollout.num_generations_eval or rollout.num_generations
    return dataclasses.replace(sampling, temperature=temperature, n=n)


def _loader(config, prompts: Prompts, sizes: Sizes, extra_prompts: int) -> PromptLoader:
    curriculum = None
    if config.reward.curriculum is not None:
        curriculum = PassRateCurriculum(len(prompts), config.reward.curriculum_floor)
    return PromptLoader(
        prompts,
        sizes.prompts_per_item,
        seed=data_seed(config),
        shuffle=config.data.shuffle_dataset,
        extra_prompts=extra_prompts,
        curriculum=curriculum,
    )


def _eval_loader(config, prompts: Prompts) -> PromptLoader:
    rows = config.inference.per_device_eval_batch_size
    return PromptLoader(prompts, rows, shuffle=False, keep_last=True)


def _show(console, config, reports, rewards, sources: Sources, sizes: Sizes) -> None:
    for note in rewards.notes:
        console.print(f"note: {note}", style="yellow", markup=False)
    if sources.stop_sequences:
        ends = ", ".join(map(repr, sources.stop_sequences))
        console.print(f"completions also end at {ends}", markup=False)
    for name, report in reports.items():
        console.rule(name, align="left", style="dim")
        console.print(report.prompts.report(), markup=False)
        if report.left_out:
            console.print(
                f"{report.left_out} prompts of each epoch are dropped: they do not fill a rollout "
                f"of {sizes.prompts_per_item} prompts",
            )
    for row in reports[sources.training].prompts.rows[: config.debug.print_examples]:
        text = json.dumps(row, ensure_ascii=False, default=str)
        console.print(text[:2000], markup=False)
