"""Log-likelihoods of given continuations, in batches of similar lengths."""

import copy
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from relax.data.batching import bucket, round_up
from relax.losses.logprobs import token_logits
from relax.models.forward import hidden_states
from relax.models.transformer import Transformer

Pair = tuple[list[int], list[int]]  # tokens of a context and of its continuation

CHUNK = 64  # tokens whose logits exist at once


class Likelihood(NamedTuple):
    """The likelihood of a continuation.

    Attributes:
      logprob: log p(continuation | context), nats.
      is_greedy: whether each of its tokens is the most likely one.
    """

    logprob: float
    is_greedy: bool


class LikelihoodScorer:
    """Computes likelihoods; compiled once per bucket of lengths.

    Args:
      model, params: as `load_pretrained` gives them.
      batch_size: rows that are computed at a time.
    """

    def __init__(self, model: Transformer, params, batch_size: int = 16):
        self.params, self.batch_size = params, batch_size
        self._score = jax.jit(functools.partial(_score, model))

    def with_params(self, params) -> "LikelihoodScorer":
        """The same compiled function with other parameters."""
        other = copy.copy(self)
        other.params = params
        return other

    def __call__(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        """The likelihood of each continuation, in the order of the pairs.

        Pairs with the same tokens before the last, such as choices of one token each, share a row.

        Args:
          pairs: token ids of a context, at least one, and of its continuation.
        """
        found: list[Likelihood] = [Likelihood(0.0, True)] * len(pairs)
        rows: dict[tuple[int, ...], list[int]] = {}
        for i, (context, continuation) in enumerate(pairs):
            if continuation:
                rows.setdefault((*context, *continuation[:-1]), []).append(i)
        # The longest come first, so that a model that does not fit fails at once.
        order = sorted(rows.items(), key=lambda item: -len(item[0]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            places = [i for _, some in chosen for i in some]
            likelihoods = self._batch(
                [ids for ids, _ in chosen], [[pairs[i][1] for i in some] for _, some in chosen]
            )
            for i, likelihood in zip(places, likelihoods, strict=True):
                found[i] = likelihood
        return found

    def _batch(
        self, rows: Sequence[tuple[int, ...]], continuations: Sequence[Sequence[list[int]]]
    ) -> list[Likelihood]:
        """The likelihood of all continuations of each row, which ends before their last token."""
        counts = [len(ids) for some in continuations for ids in some]
        T = bucket(max(map(len, rows)))
        M = round_up(bucket(sum(counts)), CHUNK)
        ids = np.zeros((self.batch_size, T), np.int32)
        lengths = np.zeros(self.batch_size, np.int32)
        places, targets = np.zeros(M, np.int32), np.zeros(M, np.int32)
        at = 0
        for i, (row, some) in enumerate(zip(rows, continuations, strict=True)):
            ids[i, : len(row)], lengths[i] = row, len(row)
            for continuation in some:
                span = slice(at, at := at + len(continuation))
                places[span] = i * T + np.arange(len(row) - len(continuation), len(row))
                targets[span] = continuation
        logprobs, greedy = map(np.asarray, self._score(self.params, ids, lengths, places, targets))
        stops = np.cumsum(counts)[:-1]
        parts = zip(np.split(logprobs[:at], stops), np.split(greedy[:at], stops), strict=True)
        return [Likelihood(float(a.sum(dtype=np.float64)), bool(b.all())) for a, b in parts]


def _score(model: Transformer, params, ids, lengths, places, targets):
    """Log-probability of each target `[M]`, and whether it is the most likely token."""
    segment_ids = (jnp.arange(ids.shape[1])[None, :] < lengths[:, None]).astype(jnp.int32)
    hidden, _ = hidden_states(model, params, {"input_ids": ids, "segment_ids": segment_ids})
    states = hidden.reshape(-1, hidden.shape[-1])[places]
    matrix, softcap = model.output_matrix(params), model.config.final_logit_softcapping

    def of_chunk(chunk):
        states, targets = chunk
        logprobs = jax.nn.log_softmax(token_logits(states, matrix, softcap=softcap))
        chosen = jnp.take_along_axis(logprobs, targets[:, None], axis=1)[:, 0]
        return chosen, logprobs.argmax(axis=1) == targets

    chunks = states.reshape(-1, CHUNK, states.shape[-1]), targets.reshape(-1, CHUNK)
    logprobs, greedy = jax.lax.map(of_chunk, chunks)
    return logprobs.reshape(-1), greedy.reshape(-1)


def windows(ids: list[int], first: int, length: int) -> list[Pair]:
    """A text of any length as contexts of one token and continuations of at most `length`.

    Every token is predicted once; the first from `first`, that of a later window from the token
    before it. The last window reaches back, so that it has as much context as the model takes.

    Args:
      ids: the tokens of the text.
      first: the token before it, BOS or EOS.
      length: most tokens that the model takes.

    >>> windows([1, 2, 3, 4, 5], 0, 3)
    [([0], [1, 2, 3]), ([2, 3], [4, 5])]
    """
    found = [([first], ids[:length])] if ids else []
    for start in range(length, len(ids), length):
        stop = min(start + length, len(ids))
        found.append((ids[stop - length - 1 : start], ids[start:stop]))
    return found
