"""Orders of rows that depend on integers alone, on every machine and with every numpy."""

import numpy as np


def permutation(num_rows: int, *words: int) -> np.ndarray:
    """A permutation of `range(num_rows)` that depends on `words` (each >= 0) alone.

    It sorts the raw 64-bit words of numpy's PCG64, because numpy keeps the raw stream of a bit
    generator (and `SeedSequence`) the same in every version and on every machine; it does not
    promise that for `Generator.permutation`.
    """
    raw = np.random.PCG64(np.random.SeedSequence(words)).random_raw(num_rows)
    order = np.argsort(raw, kind="stable")
    return order.astype(np.int32) if num_rows < 2**31 else order  # kept for an epoch


def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of rows in an epoch.

    >>> sorted(epoch_order(5, seed=0, epoch=3).tolist())
    [0, 1, 2, 3, 4]
    """
    return permutation(num_rows, seed, epoch)
