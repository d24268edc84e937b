"""What an agent's calls sampled, as the branches of a tree.

A call whose prompt begins with all tokens of an earlier call continues it: both are one branch.
A call that does not, because the agent or the chat template rewrote something, is a branch of its
own. Every sampled token is trained in one place: in the first branch that holds it.
"""

import zlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from relax.sampling import Request
from relax.serving.protocol import SamplingFields
from relax.serving.replies import Reply


class Call(NamedTuple):
    """An answered request of an agent."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    reason: str

    @property
    def ids(self) -> tuple[int, ...]:
        return self.prompt + self.tokens


class Branch(NamedTuple):
    """Tokens from the first to a last sampled one.

    Attributes:
      ids: all token ids.
      sampled: for each, whether it is trained here.
      logprobs: for each, the sampler's log-probability; 0 where it is not trained here.
    """

    ids: tuple[int, ...]
    sampled: np.ndarray
    logprobs: np.ndarray


def branches(calls: Sequence[Call]) -> list[Branch]:
    """The branches of an episode, in an order that does not depend on that of the calls.

    >>> first = Call((1, 2), (3,), (-0.5,), "eos")
    >>> second = Call((1, 2, 3, 4), (5,), (-0.2,), "eos")
    >>> [(b.ids, b.sampled.tolist()) for b in branches([second, first])]
    [((1, 2, 3, 4, 5), [False, False, True, False, True])]
    """
    ordered = sorted(calls, key=lambda call: (len(call.prompt), call.prompt, call.tokens))
    chains: list[list[Call]] = []  # each call with those that it continues
    leaves: list[list[Call]] = []
    for call in ordered:
        before = [c for c in chains if c[-1].ids == call.prompt[: len(c[-1].ids)]]
        parent = max(before, key=lambda chain: len(chain[-1].ids), default=[])
        chain = [*parent, call]
        chains.append(chain)
        leaves = [leaf for leaf in leaves if leaf is not parent] + [chain]
    trained: set[int] = set()
    made = []
    for chain in leaves:
        ids = chain[-1].ids
        sampled, logprobs = np.zeros(len(ids), bool), np.zeros(len(ids), np.float32)
        for call in chain:
            if id(call) not in trained:
                trained.add(id(call))
                first = len(call.prompt)
                sampled[first : first + len(call.tokens)] = True
                logprobs[first : first + len(call.tokens)] = call.logprobs
        made.append(Branch(ids, sampled, logprobs))
    return made


def common_prefix(made: Sequence[Branch]) -> int:
    """Number of first tokens that all branches share, before any sampled one.

    >>> common_prefix(branches([Call((1, 2), (3,), (0.0,), "eos"), Call((1, 4), (3,), (0.0,), "")]))
    1
    """
    if not made:
        return 0
    shortest = min(int(branch.sampled.argmax()) for branch in made if branch.sampled.any())
    first = made[0].ids[:shortest]
    for branch in made[1:]:
        same = (a == b for a, b in zip(first, branch.ids, strict=False))
        count = next((i for i, equal in enumerate(same) if not equal), len(first))
        first = first[:count]
    return len(first)


class EpisodeSession:
    """Samples an agent's calls as the run samples, and records them.

    A call's key follows from its episode's key, its prompt and its limits, and from how many equal
    calls came before; so it does not depend on the clock.

    Args:
      key: the episode's random key.
      temperature, top_p: of the run; those of requests have no effect and are counted.
      max_new_tokens: most tokens of a call.
    """

    def __init__(self, key: jax.Array, temperature: float, top_p: float, max_new_tokens: int):
        self.key, self.temperature, self.top_p = key, temperature, top_p
        self.max_new_tokens = max_new_tokens
        self.calls: list[Call] = []
        self.overridden = 0
        self.is_open = True
        self._seen: Counter[int] = Counter()

    def requests(self, prompt: list[int], fields: SamplingFields, most: int) -> list[Request]:
        asked = (fields.temperature, fields.top_p, fields.seed)
        self.overridden += asked not in ((1.0, 1.0, None), (self.temperature, self.top_p, None))
        most = min(most, self.max_new_tokens)
        content = (np.array(prompt, np.int32).tobytes(), repr((most, fields.n, fields.stop)))
        digest = zlib.crc32(content[1].encode(), zlib.crc32(content[0]))
        repeat = self._seen[digest]
        self._seen[digest] += 1
        key = jax.random.fold_in(jax.random.fold_in(self.key, np.uint32(digest)), repeat)
        return [
            Request(
                prompt,
                jax.random.fold_in(key, i),
                most,
                self.temperature,
                self.top_p,
                fields.stop,
                bool(fields.alternatives),
                name=f"{digest:08x}-{repeat}-{i}",
            )
            for i in range(fields.n)
        ]

    def call_id(self, reply_id: str, request: Request) -> str:
        return request.name  # templates may write it, so it must not be random

    def record(self, requests: Sequence[Request], replies: Sequence[Reply]) -> None:
        if not self.is_open:
            return
        for request, reply in zip(requests, replies, strict=True):
            logprobs = reply.values["sampled_logprobs"]
            prompt = tuple(int(i) for i in request.prompt)
            self.calls.append(Call(prompt, tuple(reply.tokens), tuple(logprobs), reply.reason))
