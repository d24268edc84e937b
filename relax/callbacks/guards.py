"""What looks after the numbers of a run: updates that are not finite, and gradients that jump."""

import collections
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from relax.config.text import nan_to_null
from relax.errors import NonFiniteError
from relax.trainers.callback import Callback, Event

_LAG = 2  # updates that may be under way on the device while the ones before are looked at
_MOST_VALUES = 100_000  # of a batch that is written down


class NonFiniteGuard(Callback):
    """Stops a run when updates in a row had a loss or a gradient that is not finite.

    Such an update changes nothing and is counted in `skipped_steps`; a few are survived.

    Args:
      patience: so many in a row end the run (>= 1).
      path: of a file that gets the batches of these updates, a JSON line each; None: none.
    """

    def __init__(self, patience: int = 3, path: str | Path | None = None):
        self.patience, self.path = patience, None if path is None else Path(path)
        self.streak, self.last_finite = 0, (0, math.nan)  # step and loss
        self._pending: collections.deque = collections.deque()
        self._bad: collections.deque = collections.deque(maxlen=patience)

    def on_train_begin(self, event: Event) -> None:
        self._pending.clear()
        if event.step == 0:
            self.streak, self.last_finite = 0, (0, math.nan)

    def on_batch_end(self, event: Event) -> None:
        if "skipped_steps" in event.metrics:
            numbers = [event.metrics["skipped_steps"], event.metrics["loss"]]
            where = {"step": event.step, "epoch": event.epoch, "position": event.position}
            self._pending.append((where, event.batch, numbers))
        self._look(_LAG)

    def on_train_end(self, event: Event) -> None:
        self._look(0)

    def state_dict(self) -> dict:
        self._look(0)
        step, loss = self.last_finite
        return {"streak": self.streak, "step": step, "loss": None if math.isnan(loss) else loss}

    def load_state_dict(self, state: dict) -> None:
        loss = math.nan if state["loss"] is None else state["loss"]
        self.streak, self.last_finite = state["streak"], (state["step"], loss)

    def _look(self, left: int) -> None:
        while len(self._pending) > left:
            where, batch, numbers = self._pending.popleft()
            skipped, loss = (np.asarray(value).item() for value in jax.device_get(numbers))
            if not skipped:
                self.streak, self.last_finite = 0, (where["step"], loss)
                self._bad.clear()
                continue
            self.streak += 1
            self._bad.append({**where, "loss": str(loss), "batch": _plain(batch)})
            if self.streak >= self.patience:
                self._stop(where["step"])

    def _stop(self, step: int) -> None:
        kept = ""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(line) + "\n" for line in self._bad)
            self.path.write_text(lines, encoding="utf-8")
            kept = f" Their batches are in '{self.path}'."
        last, loss = self.last_finite
        before = f"; the last finite loss was {loss:.4g} at update {last}" if last else ""
        raise NonFiniteError(
            f"loss or gradient of {self.streak} updates in a row, {step - self.streak + 1} to "
            f"{step}, were not finite{before}. The weights are those from before.{kept} Lower the "
            "learning rate, look at those rows, find the operation with --debug_nans, or go on "
            "with --max_nonfinite_steps 0."
        )


class LearningMonitor(Callback):
    """Says in words what learning rates, gradient norms and losses mean when they mean trouble.

    Its method `show` is to be a listener of `MetricsLog`.

    Args:
      say: is told each sentence; every kind once, a jump of the gradient norm up to three times.
      jump: a gradient norm so many times the median of the lines before it is one.
    """

    WINDOWS = 20  # log lines that a norm is compared with
    LEAST = 5  # of them must be there
    PATIENCE = 3  # log lines in a row
    JUMPS = 3  # that are told

    def __init__(self, say: Callable[[str], None], jump: float = 10.0):
        self.say, self.jump = say, jump
        self._reset()

    def _reset(self) -> None:
        self._norms: list[float] = []
        self._streaks: dict[str, int] = {}
        self._said: dict[str, int] = {}
        self._skipped = 0

    def on_train_begin(self, event: Event) -> None:
        if event.step == 0:
            self._reset()

    def show(self, record: dict) -> None:
        """Takes a record of `MetricsLog`, as one of its listeners."""
        if "grad_norm" not in record:
            return
        step, norm = record["step"], record["grad_norm"]
        skipped = record.get("skipped_steps", 0)
        if skipped > self._skipped:
            self._tell(
                "skipped",
                f"{skipped} updates up to step {step} were skipped, as loss or gradient were not "
                "finite.",
            )
        self._skipped = skipped
        if len(self._norms) >= self.LEAST:
            usual = statistics.median(self._norms)
            if norm > self.jump * usual > 0:
                self._tell(
                    "jump",
                    f"the gradient norm is {norm:.3g} around step {step}, and was {usual:.3g}: a "
                    "row unlike the others, or a learning rate that is too high.",
                    self.JUMPS,
                )
        if math.isfinite(norm):
            self._norms = [*self._norms, norm][-self.WINDOWS :]
        self._lasting(
            "rate", record.get("learning_rate") == 0.0, "the learning rate is 0: nothing is learned"
        )
        self._lasting("norm", norm == 0.0, "the gradient is 0: nothing is learned")
        # In reinforcement learning a loss near 0 is as it should be.
        still = "reward" not in record and record.get("loss") == 0.0
        self._lasting("loss", still, "the loss is exactly 0: are any tokens trained?")

    def _lasting(self, kind: str, holds: bool, text: str) -> None:
        self._streaks[kind] = self._streaks.get(kind, 0) + 1 if holds else 0
        if self._streaks[kind] >= self.PATIENCE:
            self._tell(kind, f"{text}.")

    def _tell(self, kind: str, text: str, most: int = 1) -> None:
        self._said[kind] = self._said.get(kind, 0) + 1
        if self._said[kind] <= most:
            self.say(text)

    def state_dict(self) -> dict:
        return {
            "norms": self._norms,
            "streaks": self._streaks,
            "said": self._said,
            "skipped": self._skipped,
        }

    def load_state_dict(self, state: dict) -> None:
        self._norms, self._streaks = list(state["norms"]), dict(state["streaks"])
        self._said, self._skipped = dict(state["said"]), state["skipped"]


def _plain(batch):
    """A batch as JSON holds it; of what is too large, or no array, its shape."""

    def plain(leaf):
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        if array.size > _MOST_VALUES or array.dtype.kind not in "iufb":
            return f"{array.dtype}{list(array.shape)}"
        return nan_to_null(array.tolist())

    return jax.tree.map(plain, dict(batch)) if isinstance(batch, dict) else str(type(batch))
