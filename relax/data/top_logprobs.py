"""Stored log-probabilities of a teacher's most likely tokens, for rows of distillation.

A directory holds `top_logprobs.json` and, for each set of rows, a folder with `ids.npy` `[n, k]`
int32 and `logprobs.npy` `[n, k + 1]` float32: one entry for each token of the completions, in the
order of the rows, and last the log-probability of all other tokens together.
"""

import dataclasses
import functools
import json
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relax.config.text import format_bytes
from relax.data.examples import IGNORE, Examples
from relax.errors import ConfigError, DataError
from relax.files import atomic_write

NAMES = ("ids", "logprobs")
FILE = "top_logprobs.json"


@dataclasses.dataclass(frozen=True)
class TopLogprobsFile:
    """The log-probabilities of one set of rows.

    Args:
      examples: the rows, which decide on the number of tokens of each.
      ids, logprobs: see above.
    """

    examples: Examples
    ids: np.ndarray
    logprobs: np.ndarray

    @functools.cached_property
    def ends(self) -> np.ndarray:
        return np.cumsum([0, *completion_lengths(self.examples)])

    def rows(self, chosen: Sequence[int]) -> dict[str, list[np.ndarray]]:
        """The arrays of some rows, under the names that `DistillationTrainer` reads."""
        parts = [slice(*self.ends[i : i + 2]) for i in chosen]
        return {
            "teacher_ids": [np.asarray(self.ids[part]) for part in parts],
            "teacher_logprobs": [np.asarray(self.logprobs[part]) for part in parts],
        }


def completion_lengths(examples: Examples) -> list[int]:
    """Tokens of each example from its first label on."""
    return [len(labels) - int((labels != IGNORE).argmax()) for _, labels in examples]


def needed_bytes(examples: Examples, k: int) -> int:
    """Size of the files of one set."""
    return 4 * (2 * k + 1) * sum(completion_lengths(examples))


def check_room(directory: str | Path, nbytes: int) -> None:
    """Refuses to write more than the disk has.

    Raises:
      ConfigError: there is not enough space.
    """
    at = Path(directory).absolute()
    while not at.exists():
        at = at.parent
    free = shutil.disk_usage(at).free
    if free < nbytes:
        raise ConfigError(
            f"the log-probabilities need {format_bytes(nbytes)}, and '{directory}' has "
            f"{format_bytes(free)} free. Lower loss_top_k, or name another teacher_logprobs."
        )


def write_set(
    directory: str | Path, name: str, examples: Examples, arrays: Sequence[np.ndarray]
) -> dict[str, str]:
    """Writes the two arrays of a set; returns its entry in `top_logprobs.json`."""
    entry = {"rows": digest(examples)}
    for kind, array in zip(NAMES, arrays, strict=True):
        path = Path(directory) / _folder(name) / f"{kind}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, array, allow_pickle=False)
        temporary.replace(path)
        entry[kind] = _crc(array)
    return entry


def write_index(directory: str | Path, facts: dict[str, Any], sets: dict[str, dict]) -> None:
    """Writes `top_logprobs.json`, last, so that a directory without it is incomplete."""
    text = json.dumps(facts | {"sets": sets}, indent=1) + "\n"
    atomic_write(Path(directory) / FILE, text.encode())


def read_set(
    directory: str | Path, name: str, examples: Examples, facts: dict[str, Any]
) -> TopLogprobsFile:
    """Opens the arrays of a set and checks them.

    Args:
      facts: what must be as it was when they were written, such as the temperature.

    Raises:
      DataError: a file is missing or damaged, or was written for other rows or settings.
    """
    try:
        index = json.loads((Path(directory) / FILE).read_text(encoding="utf-8"))
        entry = index["sets"][name]
        ids, logprobs = (
            np.load(Path(directory) / _folder(name) / f"{kind}.npy", "r", allow_pickle=False)
            for kind in NAMES
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"'{directory}' holds no log-probabilities of the {name}: {error}. Write them with "
            "relax distill prepare and the flags of this run."
        ) from None
    for fact, value in facts.items():
        if index.get(fact) != value:
            raise DataError(
                f"the log-probabilities in '{directory}' were written with {fact} "
                f"{index.get(fact)}, and this run has {value}. Write them again."
            )
    if len(ids) != sum(completion_lengths(examples)) or entry["rows"] != digest(examples):
        raise DataError(
            f"the log-probabilities in '{directory}' are those of other {name}. Write them again."
        )
    for kind, array in zip(NAMES, (ids, logprobs), strict=True):
        if _crc(array) != entry[kind]:
            raise DataError(
                f"{kind}.npy of the {name} in '{directory}' is damaged. Write it again."
            )
    return TopLogprobsFile(examples, ids, logprobs)


def digest(examples: Examples) -> str:
    """A checksum of the tokens and labels of all rows."""
    return _crc(examples.input_ids) + _crc(examples.labels)


def _crc(array: np.ndarray) -> str:
    return f"{zlib.crc32(array.tobytes()):08x}"


def _folder(name: str) -> str:
    return name.replace(" ", "_").replace("(", "").replace(")", "")
