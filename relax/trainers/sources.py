"""Metrics of each source of a mixture, `sources/<name>/...`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from relax.trainers.update import Mean, Sum

PREFIX = "sources/"
COUNT = "count"  # how many items of a source a mean is over


def source_metrics(
    names: Sequence[str], totals: jax.Array, counts: jax.Array, what: str = "loss"
) -> dict[str, Mean | Sum]:
    """The mean of each source, and the number of its items.

    Args:
      names: the names of the S sources.
      totals, counts: `[S]` sums over the items of each source, and their number.
      what: the name of the mean.
    """
    metrics: dict[str, Mean | Sum] = {}
    for name, total, count in zip(names, totals, counts, strict=True):
        mean = Mean(total / jnp.maximum(count, 1), count)
        metrics |= {f"{PREFIX}{name}/{what}": mean}
        metrics |= {f"{PREFIX}{name}/{COUNT}": Sum(count.astype(jnp.int32))}
    return metrics


def row_metrics(names: Sequence[str], batch, losses: jax.Array, mask: jax.Array) -> dict:
    """The same from losses `[N]` of rows, those of `mask`, by the batch's `source_ids` `[N]`."""
    if not names or "source_ids" not in batch:
        return {}
    belongs = (batch["source_ids"] == jnp.arange(len(names))[:, None]) & mask  # [S, N]
    totals = jnp.where(belongs, losses, 0.0).sum(axis=1)
    return source_metrics(names, totals, belongs.sum(axis=1))


def without_absent(metrics: dict) -> dict:
    """The metrics without the means of sources that had no item."""
    absent = {
        name.rpartition("/")[0]
        for name, value in metrics.items()
        if name.startswith(PREFIX) and name.endswith(f"/{COUNT}") and not value
    }
    return {
        name: value
        for name, value in metrics.items()
        if name.rpartition("/")[0] not in absent or name.endswith(f"/{COUNT}")
    }


def source_rewards(
    sources: Sequence[str] | np.ndarray, rewards: np.ndarray
) -> dict[str, float | int]:
    """The mean reward of each source's completions, and their number, without NaN.

    >>> source_rewards(["a", "b"], np.array([[0.0, 1.0], [np.nan, 3.0]]))["sources/b/reward"]
    3.0
    """
    metrics: dict[str, float | int] = {}
    for name in filter(None, dict.fromkeys(sources)):
        given = rewards[[source == name for source in sources]]
        given = given[~np.isnan(given)]
        if given.size:
            metrics[f"{PREFIX}{name}/reward"] = float(given.mean())
            metrics[f"{PREFIX}{name}/{COUNT}"] = given.size
    return metrics
