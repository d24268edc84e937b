"""Arrays of distillation on the host: from the lists of an item to groups with leading axis N.

Axes: P prompts, N groups, L tokens of a prompt, C tokens of a completion, k most likely tokens.
"""

import numpy as np

from relax.data.examples import IGNORE
from relax.trainers.rl.rollout import padded

# Columns of items: prompts that only the teacher sees, and a teacher's stored log-probabilities.
PRIVILEGED = ("teacher_prompt_ids", "teacher_prompt_lengths")
STORED = ("teacher_ids", "teacher_logprobs")


def with_privileged(arrays: dict[str, np.ndarray], item: dict) -> dict[str, np.ndarray]:
    """Adds the prompts of an item that only the teacher sees, `[N, L]`, and their lengths."""
    if PRIVILEGED[0] not in item:
        return arrays
    ids = item[PRIVILEGED[0]]
    repeats = len(arrays["prompt_ids"]) // len(ids)
    lengths = np.array([len(prompt) for prompt in ids], np.int32)
    added = zip(PRIVILEGED, (padded(ids, lengths.max()), lengths), strict=True)
    return arrays | {name: np.repeat(value, repeats, axis=0) for name, value in added}


def example_arrays(item: dict) -> dict[str, np.ndarray]:
    """The arrays of an item's examples, one completion each: the tokens from the first label on."""
    ids, labels = zip(*item["examples"], strict=True)
    starts = [int((row != IGNORE).argmax()) for row in labels]
    lengths = np.array([len(row) - n for row, n in zip(ids, starts, strict=True)], np.int32)
    C = lengths.max()
    arrays = {
        "prompt_ids": padded([r[:n] for r, n in zip(ids, starts, strict=True)], max(starts)),
        "prompt_lengths": np.array(starts, np.int32),
        "completion_ids": padded([r[n:] for r, n in zip(ids, starts, strict=True)], C)[:, None],
        "completion_lengths": lengths[:, None],
        "mask": padded([r[n:] != IGNORE for r, n in zip(labels, starts, strict=True)], C)[:, None]
        > 0,
    }
    for name in STORED:
        if name in item:
            rows = [np.pad(x, ((0, C - len(x)), (0, 0))) for x in item[name]]
            arrays[name] = np.stack(rows)[:, None]
    return with_privileged(arrays, item)


def filled(arrays: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """The arrays with empty groups at their end, so that `count` divides the groups."""
    missing = -len(arrays["prompt_ids"]) % count
    return {
        name: np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1))
        for name, value in arrays.items()
    }


def concatenated(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The groups of several parts, padded to common lengths."""

    def joined(values: list[np.ndarray]) -> np.ndarray:
        shape = np.max([value.shape for value in values], axis=0)[1:]
        gaps = [
            [(0, 0), *((0, n - m) for n, m in zip(shape, v.shape[1:], strict=True))] for v in values
        ]
        return np.concatenate([np.pad(v, gap) for v, gap in zip(values, gaps, strict=True)])

    return {name: joined([part[name] for part in parts]) for name in parts[0]}
