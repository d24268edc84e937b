"""What reinforcement learning with completions has in common as a job."""

import abc
import dataclasses
import json
import zlib

from relax.callbacks.completions import Completions, RewardCounters
from relax.data.prompts import PromptLoader, Prompts, prepare_prompts
from relax.engine.model_source import data_seed, end_tokens
from relax.engine.recipes.demo import CHUNK, MOST, pretrain_demo
from relax.engine.recipes.judges import reward_functions_of, shortest
from relax.engine.recipes.recipe import Datasets, Recipe
from relax.errors import DataError, ErrorList
from relax.models import TransformerConfig
from relax.rewards import RewardRunner, load_environment
from relax.sampling import SamplingConfig
from relax.sampling.config import max_positions
from relax.trainers.interrupt import Interrupt, Interrupted


@dataclasses.dataclass(frozen=True)
class PromptReport:
    """What is known about the prompts of a data set."""

    prompts: Prompts
    left_out: int  # per epoch, since they fill no rollout

    def to_dict(self) -> dict:
        lengths = [len(ids) for ids in self.prompts.prompt_ids]
        return {
            "num_rows": len(self.prompts),
            "columns": list(self.prompts.columns),
            "num_tokens": sum(lengths),
            "longest": max(lengths),
            "left_out_per_epoch": self.left_out,
        }


class RLRecipe(Recipe):
    """Prompts, reward functions in processes of their own, and their completions on the screen."""

    headline = ("eval_reward", "eval_pass@1")
    what, kind = "prompts", "prompts"
    extra_rounds = 0  # items' worth of prompts that an item holds to replace its own

    def __init__(self, config, console):
        super().__init__(config, console)
        r = config.reward
        self.functions = reward_functions_of(config)
        self.rewards = RewardRunner(
            self.functions,
            r.reward_weights,
            parameters=r.reward_kwargs,
            timeout_s=r.reward_timeout_s,
            max_errors=r.max_reward_errors,
            workers=r.reward_workers,
        )

        self.environment = None if r.environment is None else load_environment(r.environment)

    def close(self) -> None:
        self.rewards.close()

    @property
    @abc.abstractmethod
    def updates_per_pass(self) -> int:
        """Updates of one pass over the completions of a rollout."""

    @property
    @abc.abstractmethod
    def passes(self) -> int:
        """Passes over the completions of a rollout."""

    @property
    def updates_per_item(self) -> int:
        return self.passes * self.updates_per_pass

    @property
    def plan(self) -> str:
        h, r = self.config.hyperparams, self.config.rollout
        return (
            f"{self._completions_per_update} completions ({h.per_device_train_batch_size} x "
            f"{h.gradient_accumulation_steps}), {self.updates_per_item} per rollout of "
            f"{self._prompts_per_item} prompts x {r.num_generations}"
        )

    @property
    def _completions_per_update(self) -> int:
        h = self.config.hyperparams
        return h.per_device_train_batch_size * h.gradient_accumulation_steps

    @property
    def _prompts_per_item(self) -> int:
        completions = self._completions_per_update * self.updates_per_pass
        return completions // self.config.rollout.num_generations

    def _shared_options(self, tokenizer) -> dict:
        """Arguments of `RLTrainer` that the configuration gives, whatever the algorithm."""
        h, r = self.config.hyperparams, self.config.rollout
        return {
            "reward_funcs": self.rewards,
            "tokenizer": tokenizer,
            "environment": self.environment,
            "sampling": self._sampling(tokenizer),
            "eval_sampling": self._eval_sampling(tokenizer),
            "freeze": self.config.peft.freeze,
            "num_generations": r.num_generations,
            "prompts_per_item": self._prompts_per_item,
            "completions_per_update": self._completions_per_update,
            "recompute_old_logprobs": r.recompute_old_logprobs,
            "pass_reward": self.config.reward.pass_reward,
            "gradient_accumulation_steps": h.gradient_accumulation_steps,
            "max_grad_norm": h.max_grad_norm,
        }

    def datasets(self, tokenizer, shape: TransformerConfig, rows=None) -> Datasets:
        parts = self.sources(rows)
        positions, which = shortest(self.functions, *self.positions(shape))
        room = positions - self.config.rollout.max_completion_length
        if room < 1:
            raise DataError(
                f"max_completion_length {self.config.rollout.max_completion_length} leaves no room "
                f"for a prompt in the {positions} positions {which}. Lower it."
            )
        loaders, reports, digest = {}, {}, 0
        found = ErrorList()
        for name, part in parts.items():
            with found.catch():
                prompts = prepare_prompts(
                    part,
                    tokenizer,
                    system_prompt=self.system_prompt,
                    vocab_size=shape.vocab_size,
                    max_prompt_length=room,
                )
                self.rewards.check_rows(prompts.rows)
                loaders[name] = self._loader(prompts, training=name == self.training)
                reports[name] = PromptReport(prompts, loaders[name].num_left_out)
                told = json.dumps([prompts.prompt_ids, prompts.rows], default=str)
                digest = zlib.crc32(told.encode(), digest)
        found.raise_all()
        return self.gathered(loaders, reports, f"{digest:08x}")

    def positions(self, shape: TransformerConfig) -> tuple[int, str]:
        """The positions that prompt and completion have together, and whose they are."""
        return max_positions(shape)

    def embedded_rows(self, rows):
        return with_answers(rows)

    def show_data(self, datasets: Datasets) -> None:
        for note in self.rewards.notes:
            self.console.print(f"note: {note}", style="yellow", markup=False)
        if self.stop_sequences:
            ends = ", ".join(map(repr, self.stop_sequences))
            self.console.print(f"completions end at {ends}, too", markup=False)
        for name, report in datasets.reports.items():
            self.console.rule(name, align="left", style="dim")
            self.console.print(report.prompts.report(), markup=False)
            if report.left_out:
                self.console.print(
                    f"{report.left_out} prompts of each epoch are left out: they do not fill a "
                    f"rollout of {self._prompts_per_item} prompts",
                )
        shown = datasets.reports[self.training].prompts.rows[: self.config.debug.print_examples]
        for row in shown:
            text = json.dumps(row, ensure_ascii=False, default=str)
            self.console.print(text[:2000], markup=False)

    def callbacks(self, run_dir, logging_steps: int) -> tuple:
        r = self.config.reward
        shown = r.num_completions_to_print if r.log_completions else 0
        return (
            RewardCounters(self.rewards),
            Completions(run_dir / "completions", logging_steps, self.console, shown),
        )

    def fresh_params(self, model, tokenizer):
        seed = self.config.hyperparams.seed
        with Interrupt() as interrupt:
            params = pretrain_demo(
                model, tokenizer, seed, self.console, CHUNK if self.config.debug.dry_run else MOST
            )
            if interrupt.requested is not None:  # half a warm-up is nothing to go on from
                raise Interrupted(interrupt.requested)
        return params

    def _sampling(self, tokenizer) -> SamplingConfig:
        r = self.config.rollout
        return SamplingConfig(
            max_new_tokens=r.max_completion_length,
            temperature=r.temperature,
            top_k=r.top_k,
            top_p=r.top_p,
            min_p=r.min_p,
            repetition_penalty=r.repetition_penalty,
            eos_token_ids=end_tokens(self.config.model.model_name_or_path, tokenizer),
            stop=self.stop_sequences,
            slots=r.rollout_slots,
        )

    def _eval_sampling(self, tokenizer) -> SamplingConfig:
        r, sampling = self.config.rollout, self._sampling(tokenizer)
        temperature = r.temperature if r.eval_temperature is None else r.eval_temperature
        if temperature == 0:
            sampling = dataclasses.replace(sampling, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
            return dataclasses.replace(sampling, n=1)
        n = r.num_generations_eval or r.num_generations
        return dataclasses.replace(sampling, temperature=temperature, n=n)

    def _loader(self, prompts: Prompts, *, training: bool) -> PromptLoader:
        if not training:
            rows = self.config.inference.per_device_eval_batch_size
            return PromptLoader(prompts, rows, shuffle=False, keep_last=True)
        return PromptLoader(
            prompts,
            self._prompts_per_item,
            seed=data_seed(self.config),
            shuffle=self.config.data.shuffle_dataset,
            extra_prompts=self._prompts_per_item * self.extra_rounds,
        )


def with_answers(rows: list[dict]) -> list[dict]:
    """The embedded rows, with what the assistant should say as the column `answer`."""
    return [{"prompt": row["prompt"], "answer": row["completion"][0]["content"]} for row in rows]
