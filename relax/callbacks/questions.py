"""Held-out prompts with the answers that are expected, as an evaluation loader has them."""

from typing import NamedTuple

import numpy as np

from relax.data.examples import IGNORE
from relax.data.loader import DataLoader
from relax.data.preference_loader import PreferenceLoader
from relax.data.prompts import PromptLoader

ANSWER_COLUMNS = ("answer", "solution", "ground_truth", "target", "completion")


class Question(NamedTuple):
    """A prompt in tokens and as text, and the answer that is expected, None where none is known."""

    prompt_ids: list[int]
    prompt: str
    expected: str | None


def questions_of(loader, tokenizer, count: int) -> list[Question]:
    """Up to `count` questions of an evaluation loader, spread evenly over its rows.

    Of a row of labelled tokens the prompt is what stands before the first trained one; where all
    are trained, what stands before the last turn of the assistant, or the first half of a text. Of
    preferences the chosen answer is expected; of prompts the column `answer` or one of its kin.

    Args:
      loader: of `relax.data`; of any other kind there are no questions.
      tokenizer: what its rows were tokenised with.
    """
    if isinstance(loader, DataLoader):
        turn = _turn(tokenizer)
        rows = [loader.examples[i] for i in _spread(len(loader.examples), count)]
        parts = [_cut(np.asarray(row.input_ids), np.asarray(row.labels), turn) for row in rows]
    elif isinstance(loader, PreferenceLoader):
        items = loader.preferences.items
        rows = [items[i] for i in _spread(len(items), count)]
        parts = [(row.prompt, row.chosen if row.is_desirable else None) for row in rows]
    elif isinstance(loader, PromptLoader):
        return [_of_prompt(loader.prompts, i) for i in _spread(len(loader.prompts), count)]
    else:
        return []
    return [
        Question(
            [int(i) for i in prompt],
            _text(tokenizer, prompt),
            None if answer is None else _text(tokenizer, answer).strip(),
        )
        for prompt, answer in parts
        if len(prompt)
    ]


def is_right(completion: str, expected: str | None) -> bool | None:
    """Whether a completion is what is expected, but for space around it; None: nothing is.

    An answer with a marked result (`#### 72`) is right where the completion marks the same one.

    >>> is_right(" 4\\n", "4"), is_right("2+2 #### 4", "so #### 4"), is_right("5", None)
    (True, True, None)
    """
    if expected is None:
        return None
    if "####" in expected:
        return _marked(completion) == _marked(expected)
    return completion.strip() == expected.strip()


def _marked(text: str) -> str | None:
    before, mark, after = text.rpartition("####")
    return after.strip().replace(",", "") if mark else None


def _spread(total: int, count: int) -> list[int]:
    """`count` indices over a range, the first one first.

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
    found = [row[name] for name in ANSWER_COLUMNS if row.get(name) is not None]
    expected = found[0] if found else None
    if isinstance(expected, list) and expected and isinstance(expected[-1], dict):
        expected = expected[-1].get("content")
    return Question(
        list(prompts.prompt_ids[i]), prompt, None if expected is None else str(expected)
    )


def _cut(ids: np.ndarray, labels: np.ndarray, turn: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """A row as prompt and expected answer."""
    trained = labels != IGNORE
    first = int(trained.argmax())
    if trained.any() and first > 0:
        untrained_after = np.flatnonzero(~trained[first:])
        end = first + int(untrained_after[0]) if untrained_after.size else len(ids)
        return ids[:first], ids[first:end]
    n = len(turn)
    starts = [i for i in range(len(ids) - n) if n and ids[i : i + n].tolist() == turn]
    first = starts[-1] + n if starts else len(ids) // 2
    return ids[:first], ids[first:]


def _turn(tokenizer) -> list[int]:
    """The tokens that begin the assistant's turn in the chat template; [] without one."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    messages = [{"role": "user", "content": "a"}]
    try:
        short, long = (
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add)
            for add in (False, True)
        )
    except Exception:  # a template may refuse such a conversation, and raises what it likes
        return []
    if not long.startswith(short):
        return []
    return tokenizer(long.removeprefix(short), add_special_tokens=False)["input_ids"]


def _text(tokenizer, ids) -> str:
    return tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
