"""Prompts for reinforcement learning: rows as tokens that a completion follows."""

import dataclasses
from collections.abc import Iterator, Sequence

from relax.data.curriculum import PassRateCurriculum
from relax.data.formats import TEMPLATE_COLUMNS, Format, FormatOptions, check_row, conversation
from relax.data.limits import DEFAULT, Limits
from relax.data.mixing import Mixture
from relax.data.order import epoch_order
from relax.data.reading import Rows, read_rows
from relax.data.report import percentiles
from relax.data.sources import check_same_formats
from relax.data.templates import ChatRenderer, Job, require_template
from relax.data.tokens import tokenize
from relax.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Tokenised prompts and their rows.

    Attributes:
      prompt_ids: token ids of each prompt.
      rows: dicts with the columns of all rows, for reward functions; None where a row has no value.
      conversational: prompts are lists of messages.
      notes: normalised data, content that the chat template omits, prompts that end with an answer.
      mixture: how they are mixed, where they are of several sources.
    """

    prompt_ids: list[list[int]]
    rows: list[dict]
    conversational: bool
    notes: tuple[str, ...] = ()
    mixture: Mixture | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self.rows[0])

    def report(self) -> str:
        """A summary line, and one line per note."""
        lengths = percentiles([len(ids) for ids in self.prompt_ids])
        kind = "conversations" if self.conversational else "texts"
        line = (
            f"{len(self):,} prompts ({kind}), tokens: min {lengths[0]}, median {lengths[50]}, "
            f"max {lengths[100]}; columns: {', '.join(self.columns)}"
        )
        return "\n".join([line, *(f"note: {note}" for note in self.notes)])


def prepare_prompts(
    rows,
    tokenizer,
    *,
    system_prompt: str | None = None,
    vocab_size: int | None = None,
    max_prompt_length: int | None = None,
    limits: Limits = DEFAULT,
    tools: Sequence[dict] = (),
) -> Prompts:
    """Converts rows with a `prompt`, a string or messages, to tokens.

    Messages are rendered with the chat template, up to the header of the assistant's turn.

    Args:
      rows: a result or an argument of `read_rows`.
      tokenizer: a Hugging Face tokenizer.
      system_prompt: system message of conversations that have none.
      vocab_size: rows of the model's embedding; None: not checked.
      max_prompt_length: longer prompts are refused, never truncated; None: any length.
      limits: on rows and rendering.
      tools: JSON schemas of tools that all prompts are rendered with.

    Raises:
      DataError: a row has no prompt, a format other than the first row's, is too long, or has tools
        of its own besides `tools`.
    """
    rows = rows if isinstance(rows, Rows) else read_rows(rows, limits=limits)
    if not rows.rows:
        raise DataError("the data set has no rows.")
    conversational = isinstance(rows.rows[0].get("prompt"), list)
    extra = TEMPLATE_COLUMNS if conversational else ()
    found = Format("prompts", ("prompt", *extra), conversational)
    check_same_formats(
        rows, lambda row, where: Format("prompts", (), isinstance(row.get("prompt"), list))
    )
    for i, row in enumerate(rows.rows):
        check_row(row, found, rows.origin(i))
    if system_prompt and not conversational:
        raise DataError("system_prompt needs conversations, and the prompts are texts.")
    if conversational:
        require_template(tokenizer, "prompts of messages")

    def with_tools(row: dict, i: int) -> dict:
        if tools and row.get("tools"):
            raise DataError(
                f"{rows.origin(i)}: the row has tools of its own, which no function would answer: "
                "leave out the column, or --tools."
            )
        return row | {"tools": list(tools)} if tools else row

    options = FormatOptions(system_prompt=system_prompt, limits=limits)
    renderer = ChatRenderer(tokenizer, limits)
    if conversational:
        texts = renderer.texts(
            [
                Job(conversation(row, "prompt", options), with_tools(row, i), rows.origin(i), True)
                for i, row in enumerate(rows.rows)
            ]
        )
    else:
        texts = [row["prompt"] for row in rows.rows]
    all_ids = tokenize(tokenizer, texts, special=not conversational)
    for i, ids in enumerate(all_ids):
        _check_ids(ids, rows.origin(i), vocab_size, max_prompt_length)
    # Reward functions get the same columns whatever rows form a batch.
    columns = dict.fromkeys(name for row in rows.rows for name in row)
    full = [dict.fromkeys(columns) | row for row in rows.rows]
    notes = (*rows.notes, *renderer.notes())
    return Prompts(all_ids, full, conversational, notes, rows.mixture)


def _check_ids(ids, where: str, vocab_size: int | None, max_prompt_length: int | None) -> None:
    if not ids:
        raise DataError(f"{where}: the prompt is empty; it needs at least one token.")
    if vocab_size is not None and max(ids) >= vocab_size:
        raise DataError(
            f"{where}: token id {max(ids)} is outside of the model's embedding of {vocab_size} "
            "rows: is the tokenizer this model's?"
        )
    if max_prompt_length is not None and len(ids) > max_prompt_length:
        raise DataError(
            f"{where}: the prompt has {len(ids)} tokens, and with max_completion_length there is "
            f"room for {max_prompt_length} in the model's positions. Lower max_completion_length, "
            "or leave the row out."
        )


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

    def order(self, epoch: int) -> list[int]:
        """The prompts of an epoch in their order."""
        return self._order(epoch, self.shuffle)

    def _order(self, epoch: int, shuffle: bool) -> list[int]:
        if self.prompts.mixture is not None:
            return self.prompts.mixture.order(self.seed, epoch, shuffle).tolist()
        count = len(self.prompts)
        return epoch_order(count, self.seed, epoch).tolist() if shuffle else [*range(count)]

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
            item = self._item(chosen)
            if self.extra_prompts:
                # A separate order, without the prompts of the item.
                others = self._order(len(self.prompts) * (epoch + 1) + position, True)
                taken = set(chosen)
                others = [i for i in others if i not in taken]
                item["extra_prompts"] = self._item(others[: self.extra_prompts])
            yield item

    def _item(self, chosen) -> dict:
        item = {
            "prompt_ids": [self.prompts.prompt_ids[i] for i in chosen],
            "rows": [self.prompts.rows[i] for i in chosen],
        }
        if (mixture := self.prompts.mixture) is not None:
            item["sources"] = [mixture.names[i] for i in mixture.source_of(chosen)]
        return item
