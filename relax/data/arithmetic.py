"""The demo data set: all additions of two numbers below 100, made in code."""

import numpy as np

from relax.errors import DataError

HELD_OUT_PAIRS = 250  # unordered, so 500 rows


def arithmetic_rows(split: str = "train", seed: int = 0) -> list[dict]:
    """Conversational prompt-completion rows, "27+45=" to "72".

    The 500 test rows are 250 pairs of different numbers in both orders: neither a+b nor b+a of a
    test row is among the 9,500 training rows. Rows come in a fixed shuffled order.

    Args:
      split: "train" or "test".
      seed: chooses the held-out pairs and the order, >= 0.

    Raises:
      DataError: if there is no such split.

    >>> row = arithmetic_rows("test")[0]
    >>> [m["role"] for m in row["prompt"] + row["completion"]]
    ['user', 'assistant']
    """
    if split not in ("train", "test"):
        raise DataError(f"the arithmetic set has the splits 'train' and 'test', not {split!r}.")
    pairs = [(a, b) for a in range(100) for b in range(a + 1, 100)]
    held_out = {pairs[i] for i in _order(len(pairs), seed)[:HELD_OUT_PAIRS]}
    rows = [
        _row(a, b)
        for a in range(100)
        for b in range(100)
        if ((min(a, b), max(a, b)) in held_out) == (split == "test")
    ]
    return [rows[i] for i in _order(len(rows), seed)]


def _row(a: int, b: int) -> dict:
    return {
        "prompt": [{"role": "user", "content": f"{a}+{b}="}],
        "completion": [{"role": "assistant", "content": str(a + b)}],
    }


def _order(n: int, seed: int) -> np.ndarray:
    # Raw bit-generator streams are the same in every numpy version.
    return np.argsort(np.random.PCG64(seed).random_raw(n), kind="stable")
