"""Plain words about a reinforcement-learning run that goes wrong."""

from collections.abc import Callable

from rich.console import Console

from relax.trainers.callback import Callback, Event

PATIENCE = 3  # logging windows in a row


class RewardWarnings(Callback):
    """Says once, in a sentence, what the numbers of a run mean when they mean trouble.

    Args:
      console: where to.

    Attributes:
      also_say: is told each sentence as well, where there is one.
    """

    def __init__(self, console: Console):
        self.console = console
        self.also_say: Callable[[str], None] | None = None
        self._streaks: dict[str, int] = {}
        self._first_entropy: float | None = None
        self._said: set[str] = set()

    def show(self, record: dict) -> None:
        """Takes a record of `MetricsLog`, as one of its listeners."""
        if "completions/truncated_ratio" not in record:
            return
        entropy = record.get("entropy", record.get("policy/entropy_avg"))
        if self._first_entropy is None:
            self._first_entropy = entropy
        for name, holds, text in self._symptoms(record, entropy):
            self._streaks[name] = self._streaks.get(name, 0) + 1 if holds else 0
            if self._streaks[name] >= PATIENCE and name not in self._said:
                self._said.add(name)
                self.console.print(f"warning: {text}", style="yellow", markup=False)
                if self.also_say is not None:
                    self.also_say(text)

    def _symptoms(self, record: dict, entropy: float | None):
        # A group of one has no spread of its own.
        equal = record.get("frac_reward_zero_std", float(record.get("reward_std", 1.0) < 1e-6))
        mean = f"{record['reward']:.2f}" if "reward" in record else "none"
        yield (
            "equal",
            equal > 0.95,
            f"{equal:.0%} of the groups have equal rewards (mean {mean}): there is "
            "next to nothing to learn from. Make the task easier or harder, or the reward finer.",
        )
        truncated = record["completions/truncated_ratio"]
        yield (
            "truncated",
            truncated > 0.5,
            f"{truncated:.0%} of the completions are cut at max_completion_length. Raise it, or "
            "see whether the model ever writes its end token.",
        )
        first = self._first_entropy
        yield (
            "entropy",
            bool(first) and entropy is not None and entropy < 0.1 * first and equal > 0.5,
            f"the entropy fell from {first or 0:.2f} to {entropy or 0:.2f} nats: the policy "
            "repeats itself and explores no more. Lower the learning rate, or raise temperature "
            "or entropy_coef.",
        )
        kl = record.get("kl", 0.0)
        yield (
            "kl",
            kl > 10.0,
            f"the policy is {kl:.1f} nats a token away from the reference. Lower the learning rate "
            "or raise beta.",
        )

    def state_dict(self) -> dict:
        return {
            "streaks": self._streaks,
            "first_entropy": self._first_entropy,
            "said": sorted(self._said),
        }

    def load_state_dict(self, state: dict) -> None:
        self._streaks, self._said = dict(state["streaks"]), set(state["said"])
        self._first_entropy = state["first_entropy"]

    def on_train_begin(self, event: Event) -> None:
        if event.step == 0:
            self._streaks, self._first_entropy, self._said = {}, None, set()
