"""Rows of distillation: prompts, completions, and prompts that only the teacher sees."""

import dataclasses
from collections.abc import Sequence

from relax.data.examples import IGNORE, Examples
from relax.data.formats import FormatOptions
from relax.data.limits import DEFAULT, Limits
from relax.data.prepare import prepare
from relax.data.prompt_loader import PromptLoader
from relax.data.prompts import Prompts, prepare_prompts
from relax.data.reading import Rows, read_rows
from relax.data.report import DataReport
from relax.data.top_logprobs import TopLogprobsFile
from relax.errors import DataError

TEACHER_PROMPT = "teacher_prompt"  # column of prompts that only the teacher sees


@dataclasses.dataclass(frozen=True)
class DistillationRows:
    """Tokenised rows.

    Attributes:
      prompts: prompts for the student, and the rows.
      examples: labelled tokens of prompt and completion, one for each prompt; None: not needed.
      report: the report on the examples.
      teacher_prompt_ids: prompts for the teacher; None: the student's.
    """

    prompts: Prompts
    examples: Examples | None = None
    report: DataReport | None = None
    teacher_prompt_ids: Sequence[list[int]] | None = None

    @property
    def labelled(self) -> Examples:
        """The examples, where there must be some."""
        assert self.examples is not None
        return self.examples


def prepare_distillation(
    rows,
    tokenizer,
    *,
    with_prompts: bool,
    with_completions: bool,
    positions: int,
    room: int,
    system_prompt: str | None = None,
    eos_token: str | None = None,
    vocab_size: int | None = None,
    limits: Limits = DEFAULT,
) -> DistillationRows:
    """Converts rows to prompts, labelled completions, or both.

    Args:
      rows: a result or an argument of `read_rows`.
      with_prompts: the student writes completions of the column `prompt`.
      with_completions: rows have completions, in any format of SFT.
      positions: those of the models; longer rows are refused, never truncated.
      room: the most tokens of a completion that the student writes.
      system_prompt, eos_token, vocab_size, limits: as for `prepare` and `prepare_prompts`.

    Raises:
      DataError: a row is invalid or too long, or has no trained token.
    """
    rows = rows if isinstance(rows, Rows) else read_rows(rows, limits=limits)
    examples = report = None
    longest = room if with_prompts else 0
    if with_completions:
        options = FormatOptions(
            system_prompt=system_prompt,
            eos_token=eos_token,
            max_length=None,
            limits=limits,
        )
        examples, report = prepare(rows, tokenizer, options, vocab_size)
        if report.dropped:
            reasons = "; ".join(f"{n} rows have {why}" for why, n in report.dropped.items())
            raise DataError(f"every row needs a token to learn from: {reasons}. Leave them out.")
        for i, (ids, _) in enumerate(examples):
            if len(ids) > positions:
                raise DataError(
                    f"{rows.origin(i)}: the row has {len(ids)} tokens, and student and teachers "
                    f"have {positions} positions. Leave it out."
                )
        starts = [int((labels != IGNORE).argmax()) for _, labels in examples]
        prompts = Prompts(
            [ids[:n].tolist() for (ids, _), n in zip(examples, starts, strict=True)],
            rows.rows,
            False,
            mixture=rows.mixture,
        )
        longest = max(
            longest, max(len(e.input_ids) - n for e, n in zip(examples, starts, strict=True))
        )

    def read(rows: Rows, most: int) -> Prompts:
        return prepare_prompts(
            rows,
            tokenizer,
            system_prompt=system_prompt,
            vocab_size=vocab_size,
            max_prompt_length=most,
            limits=limits,
        )

    if with_prompts:
        prompts = read(rows, positions - room)
    theirs = None
    if any(row.get(TEACHER_PROMPT) is not None for row in rows.rows):
        changed = [row | {"prompt": row.get(TEACHER_PROMPT)} for row in rows.rows]
        theirs = read(dataclasses.replace(rows, rows=changed), positions - longest).prompt_ids
    return DistillationRows(prompts, examples, report, theirs)


class DistillationLoader(PromptLoader):
    """A `PromptLoader` whose items also have what `DistillationTrainer` reads.

    Args:
      rows: result of `prepare_distillation`.
      prompts_per_item, **options: as for `PromptLoader`.
      stored: log-probabilities of the teacher for the rows; None: none.
    """

    def __init__(
        self,
        rows: DistillationRows,
        prompts_per_item: int,
        *,
        stored: TopLogprobsFile | None = None,
        **options,
    ):
        super().__init__(rows.prompts, prompts_per_item, **options)
        self.stored = stored
        self.columns = {"examples": rows.examples, "teacher_prompt_ids": rows.teacher_prompt_ids}

    def _item(self, chosen) -> dict:
        columns = {name: values for name, values in self.columns.items() if values is not None}
        item = super()._item(chosen) | {n: [v[i] for i in chosen] for n, v in columns.items()}
        return item | (self.stored.rows(chosen) if self.stored else {})
