"""Results of scoring a batch: rewards, failures, and their counts over a run."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from relax.config.text import quote
from relax.errors import RewardError
from relax.rewards.protocol import text_of
from relax.rewards.workers.scores import Kind, Scores

# Names that trainers log; a reward function's metric of that name gets a prefix.
_TRAINER_METRICS = frozenset(
    "aux_loss critic_aux_loss critic_learning_rate elapsed_s entropy entropy_coef episode epoch "
    "eps first_entropy frac_groups_skipped frac_reward_zero_std frac_tokens_kept global_step "
    "grad_norm kl learning_rate loss "
    "mean_token_accuracy mfu num_tokens resampled_groups reward reward_drawn reward_errors "
    "reward_group_std reward_std skipped_minibatches skipped_steps step step_time "
    "teacher_agreement time_left_s tokens_per_second total_steps".split()
)
_TRAINER_GROUPS = frozenset(
    "clip_ratio completions dry_run episodes logits logps loss memory objective perf policy "
    "rewards sampling sources tasks time tools val".split()
)
# Minimum number of completions for the fraction of failures: one early failure is no trend.
_LEAST_SCORED = 100


@dataclass(frozen=True)
class RewardFailure:
    """A completion without a result from a function.

    Attributes:
      function: name of the function.
      index: index of the completion in the batch.
      kind: raised, hung, died or result.
      reason: what happened.
      prompt, completion: shortened.
    """

    function: str
    index: int
    kind: Kind
    reason: str
    prompt: str
    completion: str

    def __str__(self) -> str:
        return (
            f"reward {self.function!r} {self.reason}; completion {self.index}: {self.completion}; "
            f"prompt: {self.prompt}"
        )


@dataclass(frozen=True)
class RewardBatch:
    """Rewards of n completions.

    Attributes:
      rewards: [n, functions] float64, NaN where a function does not apply or failed.
      total: [n] float64, weighted sum of the rewards that apply, NaN if none does.
      failures: one per completion and function without a result.
      seconds: time that the functions took.
      extras: columns that functions logged, n values each.
      metrics: means of the numbers that functions logged; see `metric_name`.
      printed: beginning of the output of isolated functions.
    """

    rewards: np.ndarray
    total: np.ndarray
    failures: list[RewardFailure]
    seconds: float
    extras: dict[str, list]
    metrics: dict[str, float]
    printed: str


def weighted_total(rewards: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted sum of the rewards that apply.

        r_i = sum over k of w_k r_ik, without NaN; NaN if all are NaN

    Args:
      rewards: [n, functions].
      weights: [functions].

    >>> weighted_total(np.array([[1.0, np.nan], [np.nan, np.nan]]), np.array([0.5, 1.0]))
    array([0.5, nan])
    """
    applies = ~np.isnan(rewards)
    total = np.where(applies, rewards, 0.0) @ weights
    return np.where(applies.any(axis=1), total, np.nan)


class Tally:
    """Counts scored and failed completions, by function, over a whole run.

    Args:
      max_errors: maximum fraction of failures of a function, among at least a hundred
        completions, 0 to 1.
    """

    def __init__(self, max_errors: float):
        self.max_errors = max_errors
        self.scored: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()

    def add(self, names: list[str], n: int, failures: list[RewardFailure]) -> None:
        """Counts a batch of n completions.

        Raises:
          RewardError: a function has failed too often.
        """
        self.scored.update(dict.fromkeys(names, n))
        self.failed.update(failure.function for failure in failures)
        self.kinds.update(failure.kind for failure in failures)
        for last in reversed(failures):
            failed, scored = self.failed[last.function], self.scored[last.function]
            if failed > self.max_errors * max(scored, _LEAST_SCORED):
                raise RewardError(
                    f"reward {last.function!r} has failed on {failed} of {scored} completions, "
                    f"more than max_reward_errors={self.max_errors:g} allows. The last: {last}. "
                    "Correct the function, or raise --max_reward_errors."
                )

    @contextlib.contextmanager
    def undone_if_interrupted(self) -> Iterator[None]:
        """Undoes the counts within if a signal drops the work, which is repeated on resume."""
        before = self.state()
        try:
            yield
        except KeyboardInterrupt:
            self.restore(before)
            raise

    def state(self) -> dict[str, dict[str, int]]:
        """The counts, to be saved in a checkpoint."""
        return {name: dict(getattr(self, name)) for name in ("scored", "failed", "kinds")}

    def restore(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Restores the counts that `state` returned."""
        for name in ("scored", "failed", "kinds"):
            setattr(self, name, Counter(state[name]))


def failures_of(name: str, scores: Scores, prompts: list, completions: list) -> list[RewardFailure]:
    """The failures of one function, with their prompts and completions."""
    return [
        RewardFailure(
            name, i, *why, quote(text_of(prompts[i]), 200), quote(text_of(completions[i]), 200)
        )
        for i, why in sorted(scores.failures.items())
    ]


def metric_name(function: str, name: str) -> str:
    """The metric name of a number that a function logged.

    It is the given name, or `rewards/<function>/<name>` if a trainer logs that name.

    >>> metric_name("f", "hits"), metric_name("f", "loss")
    ('hits', 'rewards/f/loss')
    """
    group, slash, _ = name.partition("/")
    taken = group in _TRAINER_GROUPS if slash else name in _TRAINER_METRICS
    taken = taken or name.startswith(("eval_", "pass@"))
    return f"rewards/{function}/{name}" if taken else name


def gather(
    names: list[str],
    count: int,
    scores: list[Scores],
    weights: np.ndarray,
    failures: list[RewardFailure],
    seconds: float,
    printed: str,
) -> RewardBatch:
    """Combines the scores of the functions `names`, possibly none, `count` from each."""
    values = [[np.nan if v is None else v for v in s.values] for s in scores]
    rewards = np.array(values, np.float64).reshape(len(scores), count).T
    extras = {column: values for s in scores for column, values in s.extras.items()}
    metrics: dict[str, list[float]] = {}
    for function, s in zip(names, scores, strict=True):
        for name, numbers in s.metrics.items():
            metrics.setdefault(metric_name(function, name), []).extend(numbers)
    means = {name: math.fsum(numbers) / len(numbers) for name, numbers in metrics.items()}
    total = weighted_total(rewards, weights)
    return RewardBatch(rewards, total, failures, seconds, extras, means, printed)
