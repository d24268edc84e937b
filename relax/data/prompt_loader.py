"""Items of prompts, in an order that depends on (seed, epoch, position) alone."""

from collections.abc import Iterator

import numpy as np

from relax.data.curriculum import PassRateCurriculum
from relax.data.mixing import Mixture
from relax.data.order import epoch_order
from relax.data.prompts import Prompts
from relax.errors import ConfigError, DataError


class PromptLoader:
    """Items of a fixed number of prompts, ordered by (seed, epoch, position).

    An item is a dict: `prompt_ids`, a list of token lists, and `rows`, their dicts; of prompts of
    several sources also the names of their `sources`. The last
    prompts of an epoch that do not fill an item are dropped from that epoch and counted in
    `num_left_out`; the next epoch has another order.

    Args:
      prompts: result of `prepare_prompts`.
      prompts_per_item: at most `len(prompts)`.
      seed: seed of the order, >= 0.
      shuffle: a new order each epoch; False keeps the given one.
      keep_last: the remaining prompts form a last, shorter item (for evaluation).
      extra_prompts: additional prompts per item, drawn from all, under the key `extra_prompts`;
        they may replace groups without a gradient.
      curriculum: chooses the prompts of every item when it is drawn, from all of them; its state,
        next to (seed, epoch, position), decides on the order. None: the order of the epoch.
    """

    def __init__(
        self,
        prompts: Prompts,
        prompts_per_item: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        keep_last: bool = False,
        extra_prompts: int = 0,
        curriculum: PassRateCurriculum | None = None,
    ):
        if curriculum is not None and not (prompts.mixture is None or prompts.mixture.is_concat):
            raise ConfigError(
                "a curriculum chooses among the prompts of all sources, and weights would choose "
                "too: leave out the weights and mixing_strategy, or the curriculum."
            )
        self.curriculum = curriculum
        self.prompts, self.prompts_per_item = prompts, prompts_per_item
        self.seed, self.shuffle, self.keep_last = seed, shuffle, keep_last
        self.extra_prompts = extra_prompts
        if not 0 < prompts_per_item <= self.prompts_per_epoch and not keep_last:
            raise DataError(
                f"a rollout needs {prompts_per_item} prompts and the data set has "
                f"{self.prompts_per_epoch}. Lower per_device_train_batch_size, or raise "
                "num_generations."
            )

    @property
    def mixture(self) -> Mixture | None:
        return self.prompts.mixture

    @property
    def prompts_per_epoch(self) -> int:
        return len(self.prompts) if self.mixture is None else len(self.mixture)

    def order(self, epoch: int) -> np.ndarray:
        """The prompts of an epoch in their order."""
        return self._order(epoch, self.shuffle)

    def _order(self, epoch: int, shuffle: bool) -> np.ndarray:
        if self.prompts.mixture is not None:
            return self.prompts.mixture.order(self.seed, epoch, shuffle)
        count = len(self.prompts)
        return epoch_order(count, self.seed, epoch) if shuffle else np.arange(count)

    def __len__(self) -> int:
        full, rest = divmod(self.prompts_per_epoch, self.prompts_per_item)
        return full + bool(rest and self.keep_last)

    @property
    def num_left_out(self) -> int:
        return 0 if self.keep_last else self.prompts_per_epoch % self.prompts_per_item

    def __iter__(self) -> Iterator[dict]:
        return self.batches(0)

    def batches(self, epoch: int, start: int = 0) -> Iterator[dict]:
        """The items of an epoch from position `start`."""
        n, order = self.prompts_per_item, self.order(epoch)
        for position in range(start, len(self)):
            if self.curriculum is not None:
                due = self.curriculum.order(self.seed, epoch, self.shuffle)
                due = due[: n + self.extra_prompts].tolist()
                yield self._item(due[:n]) | (
                    {"extra_prompts": self._item(due[n:])} if self.extra_prompts else {}
                )
                continue
            chosen = order[position * n : (position + 1) * n]
            item = self._item(chosen.tolist())
            if self.extra_prompts:
                # A separate order, without the prompts of the item.
                others = self._order(len(self.prompts) * (epoch + 1) + position, True)
                others = others[~np.isin(others, chosen)]
                item["extra_prompts"] = self._item(others[: self.extra_prompts].tolist())
            yield item

    def _item(self, chosen) -> dict:
        item = {
            "prompt_ids": [self.prompts.prompt_ids[i] for i in chosen],
            "rows": [self.prompts.rows[i] for i in chosen],
        }
        if (mixture := self.prompts.mixture) is not None:
            item["sources"] = [mixture.names[i] for i in mixture.source_of(chosen)]
        return item
