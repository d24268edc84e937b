"""Metrics and records of a rollout.

Axes: P prompts, G completions of a group, F reward functions.
"""

import math
from collections.abc import Sequence

import numpy as np

from relax.losses.advantages import nan_std
from relax.trainers.rl.rollout import Rollout, ScoredRollout, has_zero_std
from relax.trainers.sources import source_rewards


def completion_records(
    collected: ScoredRollout, names: Sequence[str], advantages: np.ndarray | None
) -> list[dict]:
    """Makes a record of every completion for tables and logs."""
    rollout, rewards, by_function, extras, _ = collected
    records = []
    for p, g in np.ndindex(*rewards.shape):
        record = {
            "prompt": rollout.rows[p]["prompt"],
            "completion": rollout.texts[p][g],
            "finish": str(rollout.finish[p, g]),
            "tokens": int(rollout.completion_lengths[p, g]),
            "rewards": dict(zip(names, by_function[p, g].tolist(), strict=True)),
            "reward": float(rewards[p, g]),
        }
        if advantages is not None and advantages.ndim == 2:
            record["advantage"] = float(advantages[p, g])
        if rollout.episodes[p][g]:
            record |= rollout.episodes[p][g]
            record["messages"] = rollout.messages[p][g]
        # A column logged by a function never replaces one of the record.
        logged = {name: values[p, g] for name, values in extras.items()}
        records.append(record | {f"logged_{n}" if n in record else n: logged[n] for n in logged})
    return records


def rollout_metrics(rollout: Rollout) -> dict[str, float | int]:
    """Metrics of completions under TRL's names; `clipped_ratio` is the truncated share."""
    lengths, truncated = rollout.completion_lengths, rollout.truncated
    ended = lengths[~truncated]
    ended = ended if ended.size else np.zeros(1)
    metrics = {
        "num_tokens": int(lengths.sum() + rollout.prompt_lengths.sum() * lengths.shape[1]),
        "completions/clipped_ratio": float(truncated.mean()),
    }
    metrics |= episode_metrics([e for group in rollout.episodes for e in group if e])
    for name, of in (("length", lengths), ("terminated_length", ended)):
        for statistic in ("mean", "min", "max"):
            metrics[f"completions/{statistic}_{name}"] = float(getattr(of, statistic)())
    return metrics


def episode_metrics(episodes: Sequence[dict]) -> dict[str, float | int]:
    """Turns, calls of tools and failures, `tools/...` under TRL's names; none without episodes.

    `tools/call_frequency` is the mean number of calls of an episode, `tools/failure_frequency` the
    share of them that failed or could not be read.
    """
    if not episodes:
        return {}
    calls, failures = (sum(e[name] for e in episodes) for name in ("tool_calls", "tool_failures"))
    return {
        "episodes/mean_turns": sum(e["turns"] for e in episodes) / len(episodes),
        "episodes/errors": sum(e["failed"] for e in episodes),
        "tools/call_frequency": calls / len(episodes),
        "tools/failure_frequency": failures / calls if calls else 0.0,
    }


def reward_metrics(
    rewards: np.ndarray,
    by_function: np.ndarray,
    names: Sequence[str],
    sources: Sequence[str] | np.ndarray = (),
) -> dict[str, float]:
    """Statistics of rewards, overall and per function, ignoring NaN (not applicable).

    A statistic without any value is omitted, so that it does not enter a mean over rollouts. Group
    statistics need more than one completion per group.

    Args:
      rewards: `[P, G]`.
      by_function: `[P, G, F]`.
      names: `[F]`.
      sources: `[P]`, those of the rollout.
    """
    metrics = {"reward": _mean(rewards), "reward_std": _std(rewards)}
    metrics |= source_rewards(sources, rewards)
    if rewards.shape[1] > 1:
        metrics["reward_group_std"] = float(np.mean([_std(group) for group in rewards]))
        metrics["frac_reward_zero_std"] = float(has_zero_std(rewards).mean())
    for i, name in enumerate(names):
        metrics[f"rewards/{name}/mean"] = _mean(by_function[..., i])
        metrics[f"rewards/{name}/std"] = _std(by_function[..., i])
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def evaluation_metrics(parts: list[tuple], names: Sequence[str], pass_reward: float) -> dict:
    """Rewards, pass@k and lengths of an evaluation.

    Args:
      parts: per item its rewards `[P, G]`, those of each function `[P, G, F]`, the completions'
        lengths `[P, G]`, and the number of errors of reward functions.
      names: of the functions.
      pass_reward: the lowest reward that counts as passed.
    """
    columns = zip(*parts, strict=True)
    rewards, by_function = (np.concatenate(next(columns)) for _ in range(2))
    lengths, errors = columns
    # A completion without a reward counts as failed.
    passed = np.nan_to_num(rewards, nan=-math.inf) >= pass_reward
    return reward_metrics(rewards, by_function, names) | {
        "pass@1": float(passed.mean()),
        f"pass@{passed.shape[1]}": float(passed.any(axis=1).mean()),
        "completions/mean_length": float(np.concatenate([x.ravel() for x in lengths]).mean()),
        "reward_errors": sum(errors),
    }


def _mean(values: np.ndarray) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else float("nan")


def _std(values: np.ndarray) -> float:
    """Unbiased standard deviation; 0 for fewer than two values."""
    std = float(nan_std(values))
    return 0.0 if math.isnan(std) else std
