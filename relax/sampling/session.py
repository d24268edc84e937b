"""Sequences that share the slots of one cache and can be continued without being computed again.

    session = Session(model, params, config, decode=decode)
    row = session.open(prompt_ids, key)
    while row.reason is None:
        session.advance()                # decodes all rows side by side
    print(row.tokens)
    session.extend(row, ids, key)        # such as the result of a tool; then it goes on
    session.close(row)                   # frees its slot

A row samples with its own keys and sees its own columns only, so what is sampled does not depend on
the rows beside it, up to the rounding of sums in programs of other shapes. For the same bytes, call
`advance` and `extend` in an order that does not depend on the clock.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from relax.errors import ConfigError
from relax.models.transformer import Transformer
from relax.sampling.batch import Batch
from relax.sampling.config import SamplingConfig, check_request, checked_prompts
from relax.sampling.generate import weights_for
from relax.sampling.rows import Row
from relax.sampling.stops import Decode


class Session:
    """Slots for rows that come and go.

    Args:
      model, params: as for `generate`.
      config: sampling options of all rows; `n` is not read.
      slots: rows in the cache at the same time, those that wait to be extended included; others
        wait for a slot. None: `config.slots`.
      decode: turns ids into text for stop strings.

    Attributes:
      counts: tokens so far: `prefilled` of prompts, `appended` by `extend`, `sampled`.
    """

    def __init__(
        self,
        model: Transformer,
        params,
        config: SamplingConfig,
        *,
        slots: int | None = None,
        decode: Decode | None = None,
    ):
        self.model, self.config, self.decodes = model, config, decode is not None
        # On the host, where they are stacked without a call of the device for each.
        self._keys: dict[int, np.ndarray] = {-1: _data(jax.random.key(0))}
        self._next = 0
        self._prompts: dict[bytes, int] = {}
        # Slots are not given up: rows may come at any time.
        self._batch = Batch(
            model,
            weights_for(model, params),
            config,
            self._keys_of,
            [],
            decode,
            slots=slots or config.slots,
            shrinks=False,
        )
        self.counts = self._batch.counts

    @property
    def free_slots(self) -> int:
        """Slots that neither a row nor a waiting one will take; negative if rows wait."""
        return self._batch.slots.count(None) - len(self._batch.waiting)

    def under_way(self) -> bool:
        """Whether `advance` has anything to do: a row is decoded, or waits and a slot is free."""
        return self._batch.can_advance()

    def open(self, ids: Sequence[int], key: jax.Array, *, limit: int | None = None) -> Row:
        """Begins a row with a prompt; equal prompts that wait together are computed once.

        Args:
          ids: the prompt, at least one token.
          key: its token t is sampled with fold_in(key, t).
          limit: maximum tokens to sample; None: `config.max_new_tokens`.

        Raises:
          ConfigError: the prompt is empty, has a token that the model lacks, or does not fit.
        """
        prompt = self._checked(np.zeros(0, np.int32), ids, limit)
        index = self._prompts.setdefault(prompt.tobytes(), len(self._prompts))
        row = Row(self._named(key), index, prompt, limit or self.config.max_new_tokens, kept=True)
        self._batch.add([row])
        return row

    def extend(
        self, row: Row, ids: Sequence[int], key: jax.Array, *, limit: int | None = None
    ) -> None:
        """Appends tokens to a row that has ended, and samples on from its cache.

        `row.prompt` is then all tokens so far, and `row.tokens` begins anew.

        Args:
          ids: tokens to append, possibly none.
          key, limit: of the new turn, as for `open`.

        Raises:
          ConfigError: the row has not ended, or `open` would raise it.
        """
        if row.reason is None or row not in self._batch.slots:
            raise ConfigError(
                "a row must have ended before it is extended, and not be closed: call advance "
                "until its reason is not None."
            )
        self._checked([*row.prompt, *row.tokens], ids, limit)
        del self._keys[row.number]
        limit = limit or self.config.max_new_tokens
        self._batch.extend(row, np.asarray(ids, np.int32).reshape(-1), self._named(key), limit)

    def close(self, row: Row) -> None:
        """Frees the slot of a row, whatever it is doing; may be called again."""
        self._batch.release(row)
        self._keys.pop(row.number, None)

    def advance(self) -> list[tuple[Row, list[int]]]:
        """Decodes up to `config.segment` tokens of every row.

        Returns:
          The rows that were decoded, with their new tokens. Those whose `reason` is not None have
          ended; they keep their slots until they are extended or closed.
        """
        self._batch.fill()
        self._prompts = {} if not self._batch.waiting else self._prompts
        return self._batch.advance() if self._batch.can_advance() else []

    def _checked(self, before, ids: Sequence[int], limit: int | None) -> np.ndarray:
        whole = checked_prompts([[*before, *ids]], self.model.config)
        limits = np.array([limit or self.config.max_new_tokens])
        check_request(self.config, self.model.config, whole, limits, decodes=self.decodes)
        return whole[0]

    def _named(self, key: jax.Array) -> int:
        self._next += 1
        self._keys[self._next] = _data(key)
        return self._next

    def _keys_of(self, numbers: list[int]) -> jax.Array:
        keys = np.stack([self._keys.get(number, self._keys[-1]) for number in numbers])
        return jax.random.wrap_key_data(jnp.asarray(keys))


def _data(key: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(key))
