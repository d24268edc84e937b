"""Guard against updates with a non-finite loss or gradient."""

import collections
import json
import math
from pathlib import Path

import jax
import numpy as np

from relax.config.text import nan_to_null
from relax.errors import NonFiniteError
from relax.files import atomic_write
from relax.trainers.callback import Callback, Event

_LAG = 2  # updates that may be queued on the device before an earlier one is checked
_MOST_VALUES = 100_000  # largest array of a batch that is written; of larger ones only the shape


class NonFiniteGuard(Callback):
    """Stops a run after several consecutive updates with a non-finite loss or gradient.

    Such an update changes nothing and is counted in `skipped_steps`.

    Args:
      patience: number of such updates in a row that ends the run (>= 1).
      path: file for the batches of these updates, one JSON line each; None: no file.
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
            lines = "".join(json.dumps(line) + "\n" for line in self._bad)
            try:
                atomic_write(self.path, lines.encode(), sync=False)
                kept = f" Their batches are in '{self.path}'."
            except OSError as error:  # must not hide the reason for stopping
                kept = f" Their batches could not be written: {error}."
        last, loss = self.last_finite
        before = f"; the last finite loss was {loss:.4g} at update {last}" if last else ""
        raise NonFiniteError(
            f"loss or gradient of {self.streak} updates in a row, {step - self.streak + 1} to "
            f"{step}, were not finite{before}. None of them changed the weights.{kept} Lower the "
            "learning rate, inspect those rows, find the operation with --debug_nans, or continue "
            "with --max_nonfinite_steps 0."
        )


def _plain(batch):
    """A batch as JSON values; an array that is too large becomes its type and shape."""

    def plain(leaf):
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        if array.size > _MOST_VALUES or array.dtype.kind not in "iufb":
            return f"{array.dtype}{list(array.shape)}"
        return nan_to_null(array.tolist())

    return jax.tree.map(plain, dict(batch)) if isinstance(batch, dict) else str(type(batch))
