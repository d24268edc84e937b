"""What reward functions say of a rollout; of several processes each asks for its own prompts.

Completions are known to all processes, since all drive the sampler; rewards are not: a function may
be slow, random or a service. So each completion is scored once, and all are told.
"""

from collections.abc import Callable

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
    """Keeps how long a run is, which reward functions see in `trainer_state`."""

    def __init__(self):
        self.max_steps: int | None = None
        self.steps_per_epoch: int | None = None

    def on_train_begin(self, event: Event) -> None:
        self.max_steps = event.total_steps
        if event.epoch_length:
            self.steps_per_epoch = event.epoch_length * event.trainer.updates_per_item

    def trainer_state(self, step: int) -> dict:
        """transformers' `TrainerState`, as far as a run has it; outside of `train` without length.

        >>> RunLength().trainer_state(3)
        {'global_step': 3, 'max_steps': 0, 'epoch': None}
        """
        epoch = step / self.steps_per_epoch if self.steps_per_epoch else None
        return {"global_step": step, "max_steps": self.max_steps or 0, "epoch": epoch}


def submit_rewards(
    rewards: RewardRunner,
    rollout: Rollout,
    trainer_state: dict,
    *,
    in_turns: bool,
    decode: Callable[[list[int]], str] | None = None,
    eos_token_ids: tuple[int, ...] = (),
) -> Callable[[], ScoredRollout]:
    """Hands completions to the reward functions; what it returns waits for their answers.

    Args:
      trainer_state: what reward functions see as its attributes, `global_step` and others.
      in_turns: an environment gave rewards as well.
      decode: tokens to text, special tokens included, for functions that ask for such texts.
      eos_token_ids: of which the last token of a completion is no part of that text.
    """
    rows = [row for row in rollout.rows for _ in rollout.texts[0]]
    prompts = [row["prompt"] for row in rows]
    texts = [text for group in rollout.texts for text in group]
    completions = [
        [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text
        for prompt, text in zip(prompts, texts, strict=True)
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
        if not in_turns:  # an episode that is cut short has no reward, as a rule
            warn_of_none(scores, texts)
        return collect_scores(rollout, scores, with_environment_rewards=in_turns)

    return wait


def score_across_processes(
    score: Callable[[Rollout], ScoredRollout], rollout: Rollout, *, everywhere: bool = False
) -> ScoredRollout:
    """`score(rollout)`, of which every process computes a part.

    Args:
      score: judges some groups.
      rollout: the same in all processes.
      everywhere: all compute all of it, since the function itself runs on their devices; what
        counts is what process 0 found.
    """
    count = processes.count()
    if count == 1:
        return score(rollout)
    if everywhere:
        told = processes.gather(_told(score(rollout)))[:1]
    else:
        mine = np.array_split(np.arange(len(rollout.rows)), count)[processes.index()]
        told = processes.gather(_told(score(rollout.take(mine))) if mine.size else None)
    return _joined(rollout, [part for part in told if part is not None])


def _told(part: ScoredRollout) -> dict:
    return {
        "rewards": part.rewards.tolist(),
        "by_function": part.by_function.tolist(),
        "extras": {name: values.tolist() for name, values in part.extras.items()},
        "metrics": part.metrics,
        "size": len(part.rewards),
    }


def _joined(rollout: Rollout, parts: list[dict]) -> ScoredRollout:
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
    """Counts add up, numbers are averaged over the completions of those that have them."""
    found = [(p["metrics"][name], p["size"]) for p in parts if name in p["metrics"]]
    if all(isinstance(value, int) for value, _ in found):
        return sum(value for value, _ in found)
    values, sizes = zip(*found, strict=True)
    return float(np.average(values, weights=sizes))
