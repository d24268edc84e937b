"""The result of generation."""

from typing import NamedTuple

import numpy as np


class SampleOutput(NamedTuple):
    """Completions in the order of the prompts: row i * n + j is sample j of prompt i.

    Log-probabilities are those of the distribution that the token was sampled from: after
    penalties, bias, temperature and truncation. With a temperature only, they equal those of
    `relax.losses.logprobs.linear_logprobs` for the same tokens at that temperature. With top_k,
    top_p or min_p they are renormalised over the remaining tokens, and so larger: a policy-gradient
    ratio of a full softmax to them is biased. In reinforcement learning turn those options off, or
    let the trainer compute the old log-probabilities. With temperature 0 they are those at
    temperature 1.

    Attributes:
      tokens: `[R, T]` int32, T the longest completion; a completion includes its EOS token. 0 after
        the end.
      logprobs: `[R, T]` float32, nats; 0 after the end.
      mask: `[R, T]` bool, true on the completion.
      lengths: `[R]` int32, at least 1 each.
      finish_reasons: per row `eos`, `stop` (a stop string) or `length`.
      reused: number of tokens that were those of drafts, see `generate`.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    finish_reasons: tuple[str, ...]
    reused: int = 0

    @property
    def completions(self) -> list[list[int]]:
        """The tokens of each row without padding."""
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
