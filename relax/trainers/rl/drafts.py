"""The last completions of every prompt, as drafts of the next ones.

A prompt that comes again, in a later epoch, is sampled with the random keys of its last group, and
the last completions are drafts (`relax.sampling.drafts`): what the policy would still write with
these keys takes one packed forward pass instead of a step per token. A prompt that comes for the
first time gets fresh keys.
"""

import base64
import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from relax import parallel
from relax.errors import ConfigError
from relax.parallel import processes
from relax.sampling import SampleOutput, SamplingConfig, generate
from relax.sampling.stops import Decode
from relax.trainers.callback import Callback, Event


class _Group(NamedTuple):
    """The random key of a prompt's group, and its completions."""

    key: np.ndarray  # its data, uint32
    completions: list[np.ndarray]  # int32


class Drafts(Callback):
    """Samples completions with drafts, and keeps them as the next ones.

    What is kept changes with the first update that is made of an item, so that an item whose
    rollout was interrupted is drawn again. Equal prompts of one item have their own groups, by the
    order in which they come.
    """

    def __init__(self):
        self._groups: dict[tuple[str, int], _Group] = {}  # by prompt, and place among equal ones
        self._clear()

    @classmethod
    def make(cls, partner, async_rollouts: int) -> "Drafts":
        """Makes them for a trainer with this partner and these rollouts ahead, if any.

        Raises:
          ConfigError: completions have several turns or are drawn ahead, or there are several
            processes or devices.
        """
        layout = parallel.layout()
        devices = 1 if layout is None else layout.mesh.size
        if partner is not None:
            raise ConfigError(
                "rollout_reuse is for completions of one turn: drop it, or the tools, environment "
                "or agent."
            )
        if async_rollouts:
            raise ConfigError(
                "rollout_reuse takes the completions of finished updates, and async_rollouts draws "
                f"ahead of them: drop one, got async_rollouts {async_rollouts}."
            )
        if processes.count() > 1 or devices > 1:
            raise ConfigError(
                "rollout_reuse needs one process with one device, got "
                f"{processes.count()} processes and {devices} devices: drop it."
            )
        return cls()

    def _clear(self) -> None:
        self._pending: dict[tuple[str, int], _Group] = {}
        self._reused = self._tokens = 0

    def sample(
        self,
        model,
        params,
        prompts: Sequence[Sequence[int]],
        key: jax.Array,
        config: SamplingConfig,
        *,
        decode: Decode | None,
    ) -> SampleOutput:
        """As `generate`, with the keys and the drafts of prompts that came before."""
        names, config = self._names(prompts), dataclasses.replace(config, coupled=True)
        kept = [self._groups.get(name) for name in names]
        keys = [
            jax.random.fold_in(key, i)
            if group is None
            else jax.random.wrap_key_data(jnp.asarray(group.key))
            for i, group in enumerate(kept)
        ]
        drafts = [_draft(group, j) for group in kept for j in range(config.n)]
        out = generate(
            model,
            params,
            prompts,
            _row_keys(jnp.stack(keys), n=config.n),
            config,
            decode=decode,
            drafts=drafts,
        )
        self._reused += out.reused
        self._tokens += int(out.lengths.sum())
        completions = [np.array(ids, np.int32) for ids in out.completions]
        for i, (name, one) in enumerate(zip(names, keys, strict=True)):
            own = completions[i * config.n : (i + 1) * config.n]
            self._pending[name] = _Group(np.asarray(jax.random.key_data(one)), own)
        return out

    def _names(self, prompts: Sequence[Sequence[int]]) -> list[tuple[str, int]]:
        """The name of each prompt, which no other one of the item has."""
        names: list[tuple[str, int]] = []
        for prompt in prompts:
            ids = np.asarray(prompt, np.int32).tobytes()
            digest, place = hashlib.blake2b(ids, digest_size=16).hexdigest(), 0
            while (digest, place) in self._pending or (digest, place) in names:
                place += 1
            names.append((digest, place))
        return names

    def metrics(self) -> dict[str, float]:
        """The share of the present item's tokens that were taken from drafts."""
        return {"sampling/reused_tokens": self._reused / max(self._tokens, 1)}

    def on_train_begin(self, event: Event) -> None:
        self._clear()

    def on_batch_end(self, event: Event) -> None:
        self._groups |= self._pending
        self._clear()

    def state_dict(self) -> dict:
        return {
            "groups": [
                [*name, group.key.tolist(), [_to_text(ids) for ids in group.completions]]
                for name, group in self._groups.items()
            ]
        }

    def load_state_dict(self, state: dict) -> None:
        self._groups = {
            (digest, place): _Group(np.array(key, np.uint32), [_to_ids(text) for text in texts])
            for digest, place, key, texts in state["groups"]
        }


@functools.partial(jax.jit, static_argnames="n")
def _row_keys(keys: jax.Array, *, n: int) -> jax.Array:
    """`[P * n]`: fold_in(key, j) for place j of each group."""
    of_group = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(of_group, (0, None))(keys, jnp.arange(n)).reshape(-1)


def _draft(group: _Group | None, place: int) -> Sequence[int] | np.ndarray:
    return () if group is None or place >= len(group.completions) else group.completions[place]


def _to_text(ids: np.ndarray) -> str:
    return base64.b64encode(ids.astype("<i4").tobytes()).decode()


def _to_ids(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<i4").astype(np.int32)
