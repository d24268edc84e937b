"""Rollouts ahead of the updates that they are for, drawn by a thread of their own.

Before the updates of item i, the rollout of item i + K starts, from the policy as it is then:

    item 0: rollouts 0, 1, ..., K with θ_0; item i > 0: rollout i + K with θ_i

So the weights of every rollout, and its keys, follow from the item alone, never from the clock. A
checkpoint waits for the rollouts in progress and holds them, so a resumed run trains on the same
completions.
"""

import base64
import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from relax import parallel
from relax.errors import ConfigError
from relax.parallel import processes
from relax.trainers.callback import Callback, Event
from relax.trainers.items import OrderedLoader
from relax.trainers.rl.rollout import Rollout, ScoredRollout
from relax.trainers.state import TrainState, copy_tree

Draw = Callable[[TrainState, Any, int], ScoredRollout]


class AheadLoader:
    """A loader's items, each with the `count` items that follow it under the key `ahead`.

    The items after the last one of an epoch are the first ones of the next.

    Raises:
      ValueError: the loader is no `OrderedLoader`, which gives the items of any epoch.
    """

    def __init__(self, loader: OrderedLoader, count: int):
        if not isinstance(loader, OrderedLoader):
            raise ValueError(
                "rollouts ahead of their updates need a loader with `batches(epoch, start)` and a "
                f"length, such as relax.data.PromptLoader, got {type(loader).__name__}."
            )
        self.loader, self.count = loader, count

    def __len__(self) -> int:
        return len(self.loader)

    def batches(self, epoch: int, start: int = 0) -> Iterator[dict]:
        epochs = itertools.count(epoch + 1)
        more = itertools.chain.from_iterable(self.loader.batches(n) for n in epochs)
        items = itertools.chain(self.loader.batches(epoch, start), more)
        window = collections.deque(itertools.islice(items, self.count))
        for _ in range(start, len(self)):
            window.append(next(items))
            yield window.popleft() | {"ahead": list(window)}


@dataclasses.dataclass
class _Pending:
    """A rollout in progress or done.

    Attributes:
      begins: the update that its item begins with.
      drawn_at: the update before which it was drawn.
      future: of the rollout; None if it is still in the form of a checkpoint.
      saved: that form.
      item: its item, as the loader gives it.
    """

    begins: int
    drawn_at: int
    future: Future | None = None
    saved: dict | None = None
    item: Any = None


class Ahead(Callback):
    """Draws every rollout `count` items before its updates.

    Args:
      draw: called as `draw(state, item, lag)` in a thread; `lag` tells apart the rollouts drawn
        before one update. Its `state` has no optimizer state.
      count: number of items ahead (>= 1).
      updates_per_item: updates of each item.
      mesh: devices of the rollouts, apart from those of the updates; None: the same ones, of which
        there must be one.

    Raises:
      ConfigError: several processes, or the same devices of a mesh of several, on which programs
        of two threads would wait for each other.
    """

    def __init__(
        self,
        draw: Draw,
        count: int,
        updates_per_item: int,
        mesh: Mesh | None = None,
    ):
        layout = parallel.layout()
        if processes.count() > 1 or (mesh is None and layout is not None and layout.mesh.size > 1):
            raise ConfigError(
                "rollouts ahead of the updates need one process, and devices of their own beside a "
                f"mesh of several: got {processes.count()} processes and "
                f"{1 if layout is None else layout.mesh.size} devices. Pass --rollout_devices, or "
                "--async_rollouts 0."
            )
        self.draw, self.count, self.updates_per_item = draw, count, updates_per_item
        self.mesh, self.layout = mesh, layout
        self._total_steps: int | None = None  # no rollout is drawn for updates after it
        self._thread: ThreadPoolExecutor | None = None
        self._pending: collections.deque[_Pending] = collections.deque()

    def first(self, state: TrainState, item: dict) -> ScoredRollout:
        """Starts what may be started, and waits for the rollout of `item`.

        It stays pending until the item's first update, so that an interrupted item finds it again.
        """
        step = int(state.step)
        if self._pending and self._pending[0].begins != step:  # of another run
            self._pending.clear()
        items = [item, *item["ahead"]]
        limit, snapshot = self._total_steps, None
        for lag in range(len(self._pending), len(items)):
            begins = step + lag * self.updates_per_item
            if lag and limit is not None and begins >= limit:
                break
            snapshot = self._snapshot(state) if snapshot is None else snapshot
            future = self._submit(snapshot, items[lag], lag)
            self._pending.append(_Pending(begins, step, future, item=items[lag]))
        found = self._pending[0]
        if found.future is None:
            assert found.saved is not None
            collected = rollout_of(found.saved, item)
        else:
            collected = found.future.result()
        metrics = collected.metrics | {"sampling/staleness": float(step - found.drawn_at)}
        return collected._replace(metrics=metrics)

    def _submit(self, state: TrainState, item, lag: int) -> Future:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "rollouts")
        return self._thread.submit(self._draw, state, item, lag)

    def _draw(self, state: TrainState, item, lag: int) -> ScoredRollout:
        layout, mesh = self.layout, self.mesh
        if layout is None:
            with parallel.use(mesh):
                return self.draw(state, item, lag)
        with parallel.use(mesh or layout.mesh, layout.rules, layout.heads):
            return self.draw(state, item, lag)

    def _snapshot(self, state: TrainState) -> TrainState:
        """A copy, which updates do not donate, without the optimizer's state."""
        state = dataclasses.replace(state, opt_state=())
        if self.mesh is None:
            return copy_tree(state)
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return jax.device_put(state, everywhere, may_alias=False)

    def _wait(self) -> None:
        for pending in self._pending:
            if pending.future is not None:
                pending.future.result()

    def on_train_begin(self, event: Event) -> None:
        self._total_steps = event.total_steps

    def on_batch_end(self, event: Event) -> None:
        while self._pending and self._pending[0].begins < event.step:
            self._pending.popleft()

    def on_validation_begin(self, event: Event) -> None:
        self._wait()  # reward functions are called by one thread at a time

    def state_dict(self) -> dict:
        self._wait()
        return {"pending": [self._saved(pending) for pending in self._pending]}

    def _saved(self, pending: _Pending) -> dict:
        saved = pending.saved
        if pending.future is not None:
            saved = state_of(pending.future.result(), pending.item)
        return {"begins": pending.begins, "drawn_at": pending.drawn_at, "rollout": saved}

    def load_state_dict(self, state: dict) -> None:
        self._pending.clear()
        for one in state["pending"]:
            pending = _Pending(one["begins"], one["drawn_at"], saved=one["rollout"])
            self._pending.append(pending)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None


def state_of(collected: ScoredRollout, item: dict) -> dict:
    """A scored rollout as JSON, every number bit for bit; its rows as their places in the item."""
    places = {id(row): place for place, row in enumerate(_rows(item))}
    fields = {f.name: getattr(collected.rollout, f.name) for f in dataclasses.fields(Rollout)}
    del fields["rows"]
    return {
        "rows": [places[id(row)] for row in collected.rollout.rows],
        "fields": {n: _to_json(x) if isinstance(x, np.ndarray) else x for n, x in fields.items()},
        "rewards": _to_json(collected.rewards),
        "by_function": _to_json(collected.by_function),
        "extras": {name: _to_json(values) for name, values in collected.extras.items()},
        "metrics": collected.metrics,
    }


def rollout_of(state: dict, item: dict) -> ScoredRollout:
    """The scored rollout of an item from the result of `state_of`."""
    rows = _rows(item)
    fields: dict[str, Any] = {
        name: _from_json(x) if isinstance(x, dict) else x for name, x in state["fields"].items()
    }
    rollout = Rollout(rows=[rows[i] for i in state["rows"]], **fields)
    return ScoredRollout(
        rollout,
        _from_json(state["rewards"]),
        _from_json(state["by_function"]),
        {name: _from_json(values) for name, values in state["extras"].items()},
        state["metrics"],
    )


def _rows(item: dict) -> list:
    return [*item["rows"], *item.get("extra_prompts", {}).get("rows", ())]


def _to_json(array: np.ndarray) -> dict:
    if array.dtype.kind in "OU":  # objects that reward functions logged, and words
        return {"dtype": array.dtype.str, "shape": array.shape, "values": array.ravel().tolist()}
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"dtype": array.dtype.str, "shape": array.shape, "data": data}


def _from_json(value: dict) -> np.ndarray:
    dtype, shape = np.dtype(value["dtype"]), tuple(value["shape"])
    if "values" in value:
        flat = np.empty(len(value["values"]), dtype)
        flat[:] = value["values"]
        return flat.reshape(shape)
    return np.frombuffer(base64.b64decode(value["data"]), dtype).reshape(shape).copy()
