"""The result of generation."""

from typing import NamedTuple

import numpy as np


class SampleOutput(NamedTuple):
    """Completions in the order of the prompts: row i * n + j is sample j of prompt i.

    Log-probabilities are those of the distribution that the token was drawn from: after penalties,
    bias, temperature and truncation. Where only the temperature is set, they equal what
    `relax.losses.logprobs.linear_logprobs` gives for the same tokens at that temperature. With
    top_k, top_p or min_p they are those of the tokens left, renormalised, and so larger: a policy
    gradient whose ratio compares a trainer's full softmax with them is biased. Leave those options
    off in reinforcement learning, or let the trainer compute the old log-probabilities. With
    temperature 0 they are those at temperature 1.

    Attributes:
      tokens: `[R, T]` int32, T the longest completion; the end-of-sequence token is a part of its
        completion. 0 after the end.
      logprobs: `[R, T]` float32, nats; 0 after the end.
      mask: `[R, T]` bool, true on the completion.
      lengths: `[R]` int32, at least 1 each.
      finish_reasons: per row `eos`, `stop` (a stop string) or `length`.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    finish_reasons: tuple[str, ...]

    @property
    def completions(self) -> list[list[int]]:
        """The tokens of each row alone."""
        return [row[:n].tolist() for row, n in zip(self.tokens, self.lengths, strict=True)]


def padded(rows: list[tuple[list[int], list[float], str]]) -> SampleOutput:
    """Rows of (tokens, log-probabilities, finish reason) as arrays.

    >>> padded([([5, 6], [-1.0, -2.0], "eos"), ([7], [-3.0], "length")]).tokens.tolist()
    [[5, 6], [7, 0]]
    """
    lengths = np.array([len(tokens) for tokens, _, _ in rows], np.int32)
    shape = (len(rows), int(lengths.max()))
    tokens, logprobs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for i, (row_tokens, row_logprobs, _) in enumerate(rows):
        tokens[i, : lengths[i]] = row_tokens
        logprobs[i, : lengths[i]] = row_logprobs
    mask = np.arange(shape[1])[None, :] < lengths[:, None]
    return SampleOutput(tokens, logprobs, mask, lengths, tuple(reason for _, _, reason in rows))
