"""Warnings about suspicious metrics of a run."""

import math
import statistics
from collections.abc import Callable, Iterator

from relax.trainers.callback import Callback, Event

WINDOW = 20  # log lines whose median gradient norm is compared with a new one
LEAST = 5  # log lines before the first comparison
PATIENCE = 3  # log lines in a row with a symptom before it is reported
JUMPS = 3  # maximum number of gradient-norm jumps to report


class LearningMonitor(Callback):
    """Warns about suspicious learning rates, gradient norms, losses, rewards, entropy and KL.

    Each kind of warning is given once, except for up to three jumps of the gradient norm. The
    method `show` is a listener of `MetricsLog`.

    Args:
      say: called with each warning, as a sentence.
      jump: warn when the gradient norm is more than `jump` times the median of the last 20.
    """

    def __init__(self, say: Callable[[str], None], jump: float = 10.0):
        self.say, self.jump = say, jump
        self._reset()

    def _reset(self) -> None:
        self._norms: list[float] = []
        self._streaks: dict[str, int] = {}
        self._said: dict[str, int] = {}
        self._skipped = 0
        self._first_entropy: float | None = None

    def on_train_begin(self, event: Event) -> None:
        if event.step == 0:
            self._reset()

    def show(self, record: dict) -> None:
        """Checks a record of `MetricsLog`; evaluations are ignored."""
        if "grad_norm" not in record:
            return
        self._check_skipped(record)
        self._check_norm(record)
        if self._first_entropy is None:
            self._first_entropy = record.get("entropy")
        symptoms = [*_standing_still(record), *_reward_symptoms(record, self._first_entropy)]
        for kind, holds, text in symptoms:
            self._streaks[kind] = self._streaks.get(kind, 0) + 1 if holds else 0
            if self._streaks[kind] >= PATIENCE:
                self._warn(kind, text)

    def _check_skipped(self, record: dict) -> None:
        skipped = record.get("skipped_steps", 0)
        if skipped > self._skipped:
            self._warn(
                "skipped",
                f"{skipped} updates up to step {record['step']} were skipped: their loss or "
                "gradient was not finite.",
            )
        self._skipped = skipped

    def _check_norm(self, record: dict) -> None:
        norm = record["grad_norm"]
        if len(self._norms) >= LEAST:
            usual = statistics.median(self._norms)
            if norm > self.jump * usual > 0:
                self._warn(
                    "jump",
                    f"the gradient norm rose from {usual:.3g} to {norm:.3g} around step "
                    f"{record['step']}. Look for an unusual row, or lower the learning rate.",
                    JUMPS,
                )
        if math.isfinite(norm):
            self._norms = [*self._norms, norm][-WINDOW:]

    def _warn(self, kind: str, text: str, most: int = 1) -> None:
        self._said[kind] = self._said.get(kind, 0) + 1
        if self._said[kind] <= most:
            self.say(text)

    def state_dict(self) -> dict:
        return {
            "norms": self._norms,
            "streaks": self._streaks,
            "said": self._said,
            "skipped": self._skipped,
            "first_entropy": self._first_entropy,
        }

    def load_state_dict(self, state: dict) -> None:
        self._norms, self._streaks = list(state["norms"]), dict(state["streaks"])
        self._said, self._skipped = dict(state["said"]), state["skipped"]
        self._first_entropy = state["first_entropy"]


def _standing_still(record: dict) -> Iterator[tuple[str, bool, str]]:
    """Yields symptoms of a run that learns nothing: `(kind, whether it holds, sentence)`."""
    yield "rate", record.get("learning_rate") == 0.0, "the learning rate is 0: nothing is learned."
    yield "norm", record["grad_norm"] == 0.0, "the gradient is 0: nothing is learned."
    # In reinforcement learning a loss near 0 is normal: the advantages of a group sum to 0.
    is_zero = "reward" not in record and record.get("loss") == 0.0
    yield "loss", is_zero, "the loss is exactly 0. Check that some tokens are trained on."


def _reward_symptoms(record: dict, first_entropy: float | None) -> Iterator[tuple[str, bool, str]]:
    """Yields symptoms of a failing reinforcement-learning run; none for other runs."""
    if "completions/clipped_ratio" not in record:
        return
    # A group of one has no spread.
    equal = record.get("frac_reward_zero_std", float(record.get("reward_std", 1.0) < 1e-6))
    mean = f"{record['reward']:.2f}" if "reward" in record else "none"
    yield (
        "equal",
        equal > 0.95,
        f"{equal:.0%} of the groups have equal rewards (mean {mean}), which give no gradient. "
        "Make the task easier or harder, or the reward finer.",
    )
    clipped = record["completions/clipped_ratio"]
    yield (
        "clipped",
        clipped > 0.5,
        f"{clipped:.0%} of the completions are truncated at max_completion_length. Raise it, or "
        "check that the model generates its end-of-sequence token.",
    )
    entropy = record.get("entropy")
    fell = first_entropy is not None and entropy is not None and entropy < 0.1 * first_entropy
    yield (
        "entropy",
        fell and equal > 0.5,
        f"the entropy fell from {first_entropy or 0:.2f} to {entropy or 0:.2f} nats: the policy "
        "repeats itself. Lower the learning rate, or raise temperature or entropy_coef.",
    )
    kl = record.get("kl", 0.0)
    yield (
        "kl",
        kl > 10.0,
        f"the KL to the reference model is {kl:.1f} nats per token. Lower the learning rate or "
        "raise beta.",
    )
