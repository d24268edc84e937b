"""Evaluation over one loader or several named ones, per batch and overall."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any


class Evaluation(dict):
    """Metrics by name, over all batches.

    Attributes:
      parts: the results of each batch, by the name of its set ("" for a single loader).
    """

    def __init__(self, metrics: dict, parts: dict[str, list], reduce: Callable[[list], dict]):
        super().__init__(metrics)
        self.parts, self._reduce = parts, reduce

    @property
    def batches(self) -> list[dict[str, Any]]:
        """The same metrics for each batch; with several sets, the name of its `set` too."""
        return [
            ({"set": name} if name else {}) | self._reduce([part])
            for name, some in self.parts.items()
            for part in some
        ]


def evaluate(trainer, state, loader, max_batches: int | None, items) -> Evaluation:
    """Evaluates every loader and reduces the results; the body of `Trainer.validate`.

    Args:
      loader: a loader of batches, or a mapping of names to such loaders: then `set_metric` is the
        metric of one set, and `metric` that of all sets together. With no set only callbacks
        evaluate.
      max_batches: batches per loader; None: all.
      items: a function from a loader to its items.

    Raises:
      ValueError: a loader gave no batch.
    """
    sets = loader if isinstance(loader, Mapping) else {"": loader}
    params, parts = state.eval_params, {}
    found: dict[str, float] = {}
    for name, one in sets.items():
        given = [
            trainer.evaluate_item(state, params, item, i)
            for i, item in enumerate(itertools.islice(items(one), max_batches))
        ]
        parts[name] = [part() if callable(part) else part for part in given]
        if not parts[name]:
            which = f" of {name!r}" if name else ""
            raise ValueError(
                f"the evaluation loader{which} gave no batch. Pass an iterable that can be "
                "iterated again for every evaluation, such as a list; a generator is exhausted "
                "after one."
            )
        if len(sets) > 1:
            whole = trainer.reduce_evaluation(parts[name])
            found |= {f"{name}_{metric}": value for metric, value in whole.items()}
    everything = [part for some in parts.values() for part in some]
    overall = trainer.reduce_evaluation(everything) if everything else {}
    return Evaluation(overall | found, parts, trainer.reduce_evaluation)
