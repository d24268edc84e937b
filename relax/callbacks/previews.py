"""Previews: the model's completions of held-out prompts at every evaluation."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from relax.config.text import shorten
from relax.data.examples import IGNORE
from relax.data.loader import DataLoader
from relax.data.preference_loader import PreferenceLoader
from relax.data.prompt_loader import PromptLoader
from relax.files import atomic_write
from relax.sampling import SamplingConfig, generate, stop_decoder
from relax.sampling.config import max_positions
from relax.trainers.callback import Callback, Event

_SHORT = 300  # maximum characters per cell
ANSWER_COLUMNS = ("answer", "solution", "ground_truth", "target", "completion")


class Question(NamedTuple):
    """A prompt as tokens and as text, and the expected completion if known, else None."""

    prompt_ids: list[int]
    prompt: str
    expected: str | None


class Previews(Callback):
    """Completes held-out prompts greedily at every evaluation, and writes the completions to files.

    `step_<update>.jsonl` has a line per prompt: `step`, `prompt`, `expected`, `completion`, `right`
    (null if no completion is expected), `finish` and `tokens`.

    Args:
      questions: the prompts; prompts that leave no room for a completion are dropped with a notice.
      directory: directory of the files.
      tokenizer: decodes completions.
      sampling: EOS tokens, stop strings and length; the temperature is set to 0.
      console: shows a table; None: no table.
      listener: called with the lines of each file.

    Attributes:
      last: the lines of the last file.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        directory: str | Path,
        tokenizer,
        sampling: SamplingConfig,
        console: Console | None = None,
        listener: Callable[[list[dict]], None] | None = None,
    ):
        self.listener = listener
        self.questions, self.directory = list(questions), Path(directory)
        self.tokenizer, self.console = tokenizer, console
        self.sampling = dataclasses.replace(
            sampling, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, n=1
        )
        self.last: list[dict] = []

    def on_train_begin(self, event: Event) -> None:
        room, why = max_positions(event.trainer.model.config)
        fitting = [q for q in self.questions if len(q.prompt_ids) < room]
        if len(fitting) < len(self.questions) and self.console is not None:
            left_out = len(self.questions) - len(fitting)
            self.console.print(
                f"{left_out} previews are dropped: their prompts fill the {room} tokens {why}"
            )
        self.questions = fitting

    def on_validation_end(self, event: Event) -> None:
        if event.epoch is None or not self.questions:
            return
        self.last = self.answers(event)
        self._keep(event.step)
        if self.listener is not None:
            self.listener(self.last)
        if self.console is not None:
            self.console.print(table(self.last, f"held-out prompts after step {event.step}"))

    def answers(self, event: Event) -> list[dict]:
        """Completes every prompt with the current weights; returns a record for each."""
        model, state = event.trainer.model, event.state
        room, _ = max_positions(model.config)
        prompts = [q.prompt_ids for q in self.questions]
        out = generate(
            model,
            event.trainer.model_params(state.eval_params, state.frozen),
            prompts,
            jax.random.key(0),  # unused in greedy decoding
            self.sampling,
            decode=stop_decoder(self.tokenizer),
            limits=[min(self.sampling.max_new_tokens, room - len(ids)) for ids in prompts],
        )
        records = []
        for question, ids, finish in zip(
            self.questions, out.completions, out.finish_reasons, strict=True
        ):
            text = self._decode(ids)
            records.append(
                {
                    "step": event.step,
                    "prompt": question.prompt,
                    "expected": question.expected,
                    "completion": text,
                    "right": is_right(text, question.expected),
                    "finish": finish,
                    "tokens": len(ids),
                }
            )
        return records

    def _keep(self, step: int) -> None:
        path = self.directory / f"step_{step:06d}.jsonl"
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in self.last)
        atomic_write(path, lines.encode(errors="replace"), sync=False)

    def _decode(self, ids) -> str:
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def questions_of(loader, tokenizer, count: int) -> list[Question]:
    """Takes up to `count` prompts from an evaluation loader, spread evenly over its rows.

    The expected completion is the first run of trained tokens in labelled rows, the chosen
    completion in pairs, and the column `answer` (or `solution`, `ground_truth`, `target`,
    `completion`) in rows of prompts. Rows whose first token is trained have no prompt and are
    skipped.

    Args:
      loader: a loader of `relax.data`; any other gives no prompts.
      tokenizer: the tokenizer of its rows.
    """
    parts: list[tuple[np.ndarray, np.ndarray | None]]
    if isinstance(loader, DataLoader):
        rows = [loader.examples[i] for i in _spread(len(loader.examples), count)]
        parts = [_split(np.asarray(row.input_ids), np.asarray(row.labels)) for row in rows]
    elif isinstance(loader, PreferenceLoader):
        items = loader.preferences.items
        rows = [items[i] for i in _spread(len(items), count)]
        parts = [(row.prompt, row.chosen if row.is_desirable else None) for row in rows]
    elif isinstance(loader, PromptLoader):
        return [_of_prompt(loader.prompts, i) for i in _spread(len(loader.prompts), count)]
    else:
        return []

    def text(ids) -> str:
        return tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    return [
        Question(
            [int(i) for i in prompt],
            text(prompt),
            None if answer is None else text(answer).strip(),
        )
        for prompt, answer in parts
        if len(prompt)
    ]


def is_right(completion: str, expected: str | None) -> bool | None:
    """Whether a completion is the expected one up to surrounding space; None without one.

    If the expected one marks its result (`#### 72`), the completion must mark the same result.

    >>> is_right(" 4\\n", "4"), is_right("2+2 #### 4", "so #### 4"), is_right("5", None)
    (True, True, None)
    """
    if expected is None:
        return None
    if "####" in expected:
        return _marked(completion) == _marked(expected)
    return completion.strip() == expected.strip()


def _marked(text: str) -> str | None:
    _, mark, after = text.rpartition("####")
    return after.strip().replace(",", "") if mark else None


def _spread(total: int, count: int) -> list[int]:
    """Spreads `count` indices over a range, starting with the first one.

    >>> _spread(10, 3), _spread(2, 5)
    ([0, 3, 6], [0, 1])
    """
    count = min(count, total)
    return [i * total // count for i in range(count)]


def _of_prompt(prompts, i: int) -> Question:
    row = prompts.rows[i]
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        prompt = "\n".join(str(message.get("content", "")) for message in prompt)
    expected = next((row[name] for name in ANSWER_COLUMNS if row.get(name) is not None), None)
    if isinstance(expected, list) and expected and isinstance(expected[-1], dict):
        expected = expected[-1].get("content")
    return Question(
        list(prompts.prompt_ids[i]), prompt, None if expected is None else str(expected)
    )


def _split(ids: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits a row into its prompt and its first run of trained tokens."""
    trained = labels != IGNORE
    first = int(trained.argmax())
    untrained_after = np.flatnonzero(~trained[first:])
    end = first + int(untrained_after[0]) if untrained_after.size else len(ids)
    return ids[:first], ids[first:end]


def table(records: list[dict], title: str) -> Table:
    """A table of prompts, expected completions, completions, and whether they are right."""
    out = Table(title=title, expand=False)
    for name, width in (("Prompt", 40), ("Expected", 30), ("Completion", 60)):
        out.add_column(name, max_width=width, overflow="fold")
    out.add_column("")
    marks = {True: Text("right", "green"), False: Text("wrong", "red"), None: Text("")}
    for record in records:
        cells = (record["prompt"], record["expected"] or "", record["completion"])
        # The model's and the user's texts must not be read as markup.
        out.add_row(*(Text(shorten(cell, _SHORT)) for cell in cells), marks[record["right"]])
    return out
