"""What the model answers to held-out prompts, beside what is expected, at every evaluation."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from relax.callbacks.questions import Question, is_right
from relax.config.text import shorten
from relax.files import atomic_write
from relax.sampling import SamplingConfig, generate
from relax.sampling.config import max_positions
from relax.trainers.callback import Callback, Event

_SHORT = 300  # characters of a cell


class Previews(Callback):
    """Answers questions greedily at every evaluation, and keeps the answers in files.

    `step_<update>.jsonl` has a line per question: `step`, `prompt`, `expected`, `completion`,
    `right` (null where nothing is expected), `finish` and `tokens`.

    Args:
      questions: what is asked; one that leaves no room for an answer is left out, and that is said.
      directory: of the files.
      tokenizer: to tell what the tokens of an answer say.
      sampling: how answers are drawn.
      console: where they are shown; None: nowhere.
      listener: is given the lines of each file.

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
                f"{left_out} previews are left out: they fill the {room} tokens {why}"
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
        """One record per question, of the weights as they are."""
        model, state = event.trainer.model, event.state
        room, _ = max_positions(model.config)
        prompts = [q.prompt_ids for q in self.questions]
        out = generate(
            model,
            event.trainer.model_params(state.eval_params, state.frozen),
            prompts,
            jax.random.key(0),  # greedy answers draw nothing
            self.sampling,
            decode=self._decode,
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


def table(records: list[dict], title: str) -> Table:
    """Prompt, expected and given answer, and whether they agree."""
    out = Table(title=title, expand=False)
    for name, width in (("Prompt", 40), ("Expected", 30), ("Answer", 60)):
        out.add_column(name, max_width=width, overflow="fold")
    out.add_column("")
    marks = {True: Text("right", "green"), False: Text("wrong", "red"), None: Text("")}
    for record in records:
        cells = (record["prompt"], record["expected"] or "", record["completion"])
        # Texts are the model's and the user's: never markup.
        out.add_row(*(Text(shorten(cell, _SHORT)) for cell in cells), marks[record["right"]])
    return out
