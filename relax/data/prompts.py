"""Prompts for reinforcement learning: rows as tokens that a completion follows."""

import dataclasses
from collections.abc import Iterator

from relax.data.formats import TEMPLATE_COLUMNS, Format, FormatOptions, check_row, conversation
from relax.data.limits import DEFAULT, Limits
from relax.data.loader import epoch_order
from relax.data.reading import Rows, read_rows
from relax.data.report import percentiles
from relax.data.templates import ChatRenderer, Job, require_template
from relax.data.tokens import tokenize
from relax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Tokenised prompts and their rows.

    Attributes:
      prompt_ids: token ids of each prompt.
      rows: dicts with the columns of all rows, for reward functions; None where a row has no value.
      conversational: prompts are lists of messages.
      notes: normalised data, and content that the chat template omits.
    """

    prompt_ids: list[list[int]]
    rows: list[dict]
    conversational: bool
    notes: tuple[str, ...] = ()

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

    Raises:
      DataError: a row has no prompt, a format other than the first row's, or is too long.
    """
    rows = rows if isinstance(rows, Rows) else read_rows(rows, limits=limits)
    if not rows.rows:
        raise DataError("the data set has no rows.")
    conversational = isinstance(rows.rows[0].get("prompt"), list)
    extra = TEMPLATE_COLUMNS if conversational else ()
    found = Format("prompts", ("prompt", *extra), conversational)
    for i, row in enumerate(rows.rows):
        check_row(row, found, rows.origin(i))
    if system_prompt and not conversational:
        raise DataError("system_prompt needs conversations, and the prompts are texts.")
    if conversational:
        require_template(tokenizer, "prompts of messages")
    options = FormatOptions(system_prompt=system_prompt, limits=limits)
    renderer = ChatRenderer(tokenizer, limits)
    if conversational:
        texts = renderer.texts(
            [
                Job(conversation(row, "prompt", options), row, rows.origin(i), True)
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
    notes = (*rows.notes, *renderer.notes(), *_ended_prompts(rows.rows if conversational else []))
    return Prompts(all_ids, full, conversational, notes)


def _ended_prompts(rows: list[dict]) -> list[str]:
    count = sum(row["prompt"][-1].get("role") == "assistant" for row in rows)
    what = "end with a message of the assistant, which is complete: a completion begins a new one"
    return [f"the prompts of {count:,} rows {what}"] if count else []


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

    An item is a dict: `prompt_ids`, a list of token lists, and `rows`, their dicts. The last
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
    ):
        if not 0 < prompts_per_item <= len(prompts) and not keep_last:
            raise DataError(
                f"a rollout needs {prompts_per_item} prompts and the data set has {len(prompts)}. "
                "Lower per_device_train_batch_size, or raise num_generations."
            )
        self.prompts, self.prompts_per_item = prompts, prompts_per_item
        self.seed, self.shuffle, self.keep_last = seed, shuffle, keep_last
        self.extra_prompts = extra_prompts

    def __len__(self) -> int:
        full, rest = divmod(len(self.prompts), self.prompts_per_item)
        return full + bool(rest and self.keep_last)

    @property
    def num_left_out(self) -> int:
        return 0 if self.keep_last else len(self.prompts) % self.prompts_per_item

    def __iter__(self) -> Iterator[dict]:
        return self.batches(0)

    def batches(self, epoch: int, start: int = 0) -> Iterator[dict]:
        """The items of an epoch from position `start`."""
        count, n = len(self.prompts), self.prompts_per_item
        order = epoch_order(count, self.seed, epoch).tolist() if self.shuffle else range(count)
        for position in range(start, len(self)):
            chosen = order[position * n : (position + 1) * n]
            item = self._item(chosen)
            if self.extra_prompts:
                # A separate order, without the prompts of the item.
                others = epoch_order(count, self.seed, count * (epoch + 1) + position).tolist()
                taken = set(chosen)
                others = [i for i in others if i not in taken]
                item["extra_prompts"] = self._item(others[: self.extra_prompts])
            yield item

    def _item(self, chosen) -> dict:
        return {
            "prompt_ids": [self.prompts.prompt_ids[i] for i in chosen],
            "rows": [self.prompts.rows[i] for i in chosen],
        }
