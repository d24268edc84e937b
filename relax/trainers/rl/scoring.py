"""Scoring of a rollout: each process scores its share of the prompts; all get all rewards.

All processes hold all completions, since all run the sampler. A reward function may be slow, random
or a remote service, so each completion is scored once, by one process.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from relax.parallel import processes
from relax.rewards import RewardRunner, collect_columns
from relax.trainers.callback import Callback, Event
from relax.trainers.rl.rollout import (
    Rollout,
    ScoredRollout,
    collect_scores,
    warn_of_failures,
    warn_of_none,
)


class RunLength(Callback):
    """Keeps the length of a run, which reward functions get in `trainer_state`."""

    def __init__(self):
        self.max_steps: int | None = None
        self.steps_per_epoch: int | None = None

    def on_train_begin(self, event: Event) -> None:
        self.max_steps = event.total_steps
        if event.epoch_length:
            self.steps_per_epoch = event.epoch_length * event.trainer.updates_per_item

    def trainer_state(self, step: int) -> dict:
        """The fields of transformers' `TrainerState`; outside `train` without the run's length.

        >>> RunLength().trainer_state(3)
        {'global_step': 3, 'max_steps': 0, 'epoch': None}
        """
        epoch = step / self.steps_per_epoch if self.steps_per_epoch else None
        return {"global_step": step, "max_steps": self.max_steps or 0, "epoch": epoch}


def as_runner(reward_funcs, reward_weights, *, required: bool) -> RewardRunner:
    """The runner of reward functions, or the given one.

    Raises:
      ValueError: there must be a function and is none; weights for a runner that has its own.
    """
    given = isinstance(reward_funcs, RewardRunner)
    if not given and not reward_funcs and required:
        raise ValueError(
            "reward_funcs is empty and there is no environment, so no completion gets a "
            "reward. Pass at least one function."
        )
    if given and reward_weights is not None:
        raise ValueError("a RewardRunner has its own weights: remove reward_weights.")
    return reward_funcs if given else RewardRunner(reward_funcs, reward_weights)


def submit_rewards(
    rewards: RewardRunner,
    rollout: Rollout,
    trainer_state: dict,
    *,
    in_turns: bool,
    decode: Callable[[list[int]], str] | None = None,
    eos_token_ids: tuple[int, ...] = (),
) -> Callable[[], ScoredRollout]:
    """Sends completions to the reward functions; returns a function that waits for the rewards.

    Args:
      rewards: the reward functions.
      rollout: the completions.
      trainer_state: attributes of the run for reward functions, such as `global_step`.
      in_turns: whether an environment gave rewards too.
      decode: turns tokens into text with special tokens, for functions that ask for such texts.
      eos_token_ids: tokens removed from the end of those texts.
    """
    pairs = zip(rollout.rows, rollout.columns, strict=True)
    rows: list[Mapping] = [row | own for row, columns in pairs for own in columns]
    prompts = [row["prompt"] for row in rows]
    texts = [text for group in rollout.texts for text in group]
    chats = [messages for group in rollout.messages for messages in group]
    completions = [
        chat or ([{"role": "assistant", "content": text}] if isinstance(prompt, list) else text)
        for prompt, text, chat in zip(prompts, texts, chats, strict=True)
    ]
    lengths = rollout.completion_lengths.reshape(-1)
    ids = rollout.completion_ids.reshape(len(rows), -1)
    completion_ids = [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]
    special = {}
    if rewards.asks_for_texts and decode is not None:
        starts = zip(rollout.prompt_ids, rollout.prompt_lengths, strict=True)
        before = [decode(row[:n].tolist()) for row, n in starts]
        special = {
            "prompt_texts": [text for text in before for _ in rollout.texts[0]],
            "completion_texts": [
                decode(row[:-1] if row and row[-1] in eos_token_ids else row)
                for row in completion_ids
            ],
        }
    pending = rewards.submit(
        prompts,
        completions,
        completion_ids=completion_ids,
        columns=collect_columns(rows),
        trainer_state=trainer_state,
        texts=special,
    )

    def wait() -> ScoredRollout:
        scores = pending.result()
        warn_of_failures(scores, len(texts))
        if not in_turns:  # a truncated episode usually has no reward
            warn_of_none(scores, texts)
        return collect_scores(rollout, scores, with_environment_rewards=in_turns)

    return wait


def evaluation_part(rollout: Rollout, step: int, score, submit) -> Callable[[], tuple]:
    """A function that waits for the rewards of an evaluation's completions.

    It returns what `evaluation_metrics` takes. One process starts the reward functions at once.

    Args:
      score, submit: `RLTrainer.score` and `submit_rewards`.
    """
    alone = processes.count() == 1
    collected = submit(rollout, step) if alone else lambda: score(rollout, step)

    def part() -> tuple:
        rollout, rewards, by_function, _, metrics = collected()
        return rewards, by_function, rollout.completion_lengths, metrics["reward_errors"]

    return part


def score_across_processes(
    score: Callable[[Rollout], ScoredRollout],
    rollout: Rollout,
    everywhere: bool = False,
    callbacks: Iterable[Callback] = (),
) -> ScoredRollout:
    """Computes `score(rollout)`, split over the processes, and tells callbacks.

    Args:
      score: scores the groups of a rollout.
      rollout: the completions, the same in all processes.
      everywhere: every process scores everything, because the function itself runs on the devices
        of all of them; the result of process 0 is used.
    """
    scored = _scored(score, rollout, everywhere)
    for callback in callbacks:
        callback.on_scored(scored)
    return scored


def _scored(score, rollout: Rollout, everywhere: bool) -> ScoredRollout:
    count = processes.count()
    if count == 1:
        return score(rollout)
    if everywhere:
        messages = processes.gather(_to_message(score(rollout)))[:1]
    else:
        mine = np.array_split(np.arange(len(rollout.rows)), count)[processes.index()]
        messages = processes.gather(_to_message(score(rollout.take(mine))) if mine.size else None)
    return _from_messages(rollout, [part for part in messages if part is not None])


def _to_message(part: ScoredRollout) -> dict:
    return {
        "rewards": part.rewards.tolist(),
        "by_function": part.by_function.tolist(),
        "extras": {name: values.tolist() for name, values in part.extras.items()},
        "metrics": part.metrics,
        "size": len(part.rewards),
    }


def _from_messages(rollout: Rollout, parts: list[dict]) -> ScoredRollout:
    def stacked(name, dtype=np.float64):
        return np.concatenate([np.array(part[name], dtype) for part in parts])

    names = set.intersection(*(set(part["extras"]) for part in parts))
    extras = {n: _objects([group for p in parts for group in p["extras"][n]]) for n in names}
    metrics = {name: _total(name, parts) for part in parts for name in part["metrics"]}
    return ScoredRollout(rollout, stacked("rewards"), stacked("by_function"), extras, metrics)


def _objects(groups: list[list]) -> np.ndarray:
    out = np.empty((len(groups), len(groups[0])), object)
    for p, g in np.ndindex(*out.shape):
        out[p, g] = groups[p][g]
    return out


def _total(name: str, parts: list[dict]):
    """Sums a count, or averages a number over the completions of the parts that have it."""
    found = [(p["metrics"][name], p["size"]) for p in parts if name in p["metrics"]]
    if all(isinstance(value, int) for value, _ in found):
        return sum(value for value, _ in found)
    values, sizes = zip(*found, strict=True)
    return float(np.average(values, weights=sizes))
