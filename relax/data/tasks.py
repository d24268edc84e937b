"""Rows of reasoning-gym tasks, generated in code: `reasoning_gym/<task>` (the extra [tasks]).

They are generated in a separate process with a fixed string hash, since six of the tasks depend on
the order of a set. So the same options give the same rows everywhere.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relax.errors import ConfigError, DataError

PREFIX = "reasoning_gym/"

# Options of the rows, in addition to those of the task.
_OWN: dict[str, Any] = {
    "size": 500,
    "test_size": 100,
    "seed": 42,
    "prompt": "{question}",
    "conversational": True,
}
ROUNDS = 4  # maximum number of draws per wanted row
_PROBED = 10  # rows whose scorer is tested with wrong answers
_NUMBER = re.compile(r"-?[0-9]{1,15}(\.[0-9]+)?")
_CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from relax.data import tasks; "


def is_task(dataset) -> bool:
    """Whether a data set is named `reasoning_gym/<task>` and is no file or directory."""
    return isinstance(dataset, str) and dataset.startswith(PREFIX) and not Path(dataset).exists()


def task_rows(name: str, split: str = "train", options: Mapping | None = None) -> list[dict]:
    """Rows of a task: `prompt`, `answer`, and `task`, which the reward `reasoning_gym` reads.

    `answer` is a text, or None if the task has none and its scorer checks a solution by rules.

    The `test` split holds the first distinct questions of the task, and `train` none of them. A
    task with too few distinct questions is refused.

    Args:
      name: name of the task, with or without the prefix `reasoning_gym/`.
      split: "train" or "test".
      options: those of the task (`min_terms`, ...), and `size` (500), `test_size` (100) and `seed`
        (42); `prompt`, a text in which {question} is replaced; `conversational`: prompts are
        conversations (the default) or texts.

    Raises:
      ConfigError: an unknown task or option, or a value that the task does not accept.
      DataError: an unknown split.
    """
    rows, faults = task_rows_and_faults(name, split, options)
    for fault in faults:
        warnings.warn(fault, stacklevel=2)
    return rows


def task_rows_and_faults(
    name: str, split: str = "train", options: Mapping | None = None
) -> tuple[list[dict], tuple[str, ...]]:
    """As `task_rows`, and returns the faults of the task's scorer instead of a warning."""
    options = dict(options or {})
    _check_own(options)
    if split not in ("train", "test"):
        raise DataError(f"reasoning-gym tasks have the splits 'train' and 'test', not {split!r}.")
    request = {"name": name.removeprefix(PREFIX), "split": split, "options": options}
    run = subprocess.run(
        [sys.executable, "-c", _CODE + "tasks.main()", json.dumps(sys.path)],
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": "0"},
    )
    if run.returncode:
        raise DataError(
            f"the rows of {name!r} could not be generated (exit code {run.returncode})."
        )
    answer = json.loads(run.stdout)
    if "error" in answer:
        raise ConfigError(answer["error"])
    return answer["rows"], tuple(answer["faults"])


def _check_own(options: dict) -> None:
    for key, default in _OWN.items():
        value = options.get(key, default)
        least = {"size": 1, "test_size": 1, "seed": 0}.get(key)
        if type(value) is not type(default) or (least is not None and value < least):
            wanted = type(default).__name__ + ("" if least is None else f" of at least {least}")
            raise ConfigError(f"dataset_kwargs: {key} must be {wanted}, got {value!r}.")
    if "{question}" not in options.get("prompt", _OWN["prompt"]):
        raise ConfigError(
            f"dataset_kwargs: prompt must contain {{question}}, got {options['prompt']!r}."
        )


def main() -> None:
    """Entry point of the generating process: reads a request from stdin, writes rows to stdout."""
    out = os.dup(1)
    os.dup2(2, 1)  # tasks print
    request = json.load(sys.stdin)
    try:
        rows = make_rows(**request)
        answer = {"rows": rows, "faults": scorer_faults(request["name"], rows)}
    except ConfigError as error:
        answer = {"error": str(error)}
    with os.fdopen(out, "w") as file:
        json.dump(answer, file)


def make_rows(name: str, split: str, options: dict) -> list[dict]:
    """The rows, generated in this process."""
    own = _OWN | {key: value for key, value in options.items() if key in _OWN}
    of_task = {key: value for key, value in options.items() if key not in _OWN}
    entries, start = _held_out(name, of_task, own)
    if split == "train":
        entries = _others(name, of_task, own, {entry["question"] for entry in entries}, start)
    return [_row(name, entry, of_task, own) for entry in entries]


def scorer_faults(name: str, rows: list[dict]) -> list[str]:
    """Kinds of wrong answers to which the task's scorer gives full marks.

    The scorer is given, for the first rows, an answer without content, the negative of each number
    and 0 for each fraction. A kind counts if it gets full marks in every row.
    """
    from relax.rewards.tasks import gym_version, reasoning_gym

    rows = rows[:_PROBED]
    answered = [row for row in rows if row["answer"] is not None]
    numbers = [r for r in answered if _NUMBER.fullmatch(r["answer"]) and float(r["answer"])]
    negated = [str(-float(row["answer"])).removesuffix(".0") for row in numbers]
    fractions = [row for row in numbers if abs(float(row["answer"])) < 1]
    probes = {
        "any answer, as 'I do not know'": (rows, ["I do not know"] * len(rows)),
        "the negative of a number for the number": (numbers, negated),
        "0 for any number below 1": (fractions, ["0"] * len(fractions)),
    }
    faults = []
    for what, (asked, answers) in probes.items():
        scores = reasoning_gym(answers, task=[row["task"] for row in asked])
        if len(asked) > 1 and all(score == 1.0 for score in scores):
            faults.append(
                f"the scorer of reasoning_gym/{name} (reasoning-gym {gym_version()}) takes {what} "
                "as right: use another task, or a reward function of your own."
            )
            break
    return faults


def _held_out(name: str, of_task: dict, own: dict) -> tuple[list[dict], int]:
    """The first `test_size` distinct questions of a task, and the next seed.

    They are drawn first, so that they follow the task's distribution: the questions left over by
    training rows would be those with the most variants, which are the hardest.
    """
    wanted, start = own["test_size"], own["seed"]
    found: dict[str, dict] = {}
    for _ in range(ROUNDS):
        for entry in _entries(name, of_task | {"size": wanted, "seed": start}):
            found.setdefault(entry["question"], entry)
        start += wanted  # item i of a task is drawn with seed + i
        if len(found) >= wanted:
            return list(found.values())[:wanted], start
    raise ConfigError(
        f"reasoning_gym/{name}: {ROUNDS * wanted} draws give {len(found)} distinct questions, "
        f"test_size={wanted} are asked for: lower test_size, or widen the task's options."
    )


def _others(name: str, of_task: dict, own: dict, held_out: set[str], start: int) -> list[dict]:
    """`size` draws of questions that are not held out."""
    wanted, found = own["size"], []
    for _ in range(ROUNDS):
        entries = _entries(name, of_task | {"size": wanted, "seed": start})
        found += [entry for entry in entries if entry["question"] not in held_out]
        start += wanted
        if len(found) >= wanted:
            return found[:wanted]
    raise ConfigError(
        f"reasoning_gym/{name}: of {ROUNDS * wanted} draws only {len(found)} are not among the "
        f"{len(held_out)} that are held out, size={wanted} are asked for: lower test_size or "
        "size, or widen the task's options."
    )


def _entries(name: str, options: dict) -> list[dict]:
    from relax.config.names import suggestion
    from relax.rewards.tasks import gym

    factory = gym()
    known = [task for task in factory.DATASETS if task != "composite"]
    if name not in known:
        raise ConfigError(
            f"unknown reasoning-gym task {name!r}.{suggestion(name, known)} There are "
            f"{', '.join(sorted(known))}."
        )
    fields = {f.name: f for f in dataclasses.fields(factory.DATASETS[name][1])}
    for key in options:
        if key not in fields:
            names = ", ".join(sorted({*fields, *_OWN}))
            raise ConfigError(
                f"reasoning_gym/{name} has no option {key!r}.{suggestion(key, fields)} "
                f"It has {names}."
            )
    try:
        made = factory.create_dataset(name, **options)
        return [made[i] for i in range(options["size"])]
    except (
        Exception
    ) as error:  # failed assertions of the task about its options, and errors that follow
        reason = str(error) or type(error).__name__
        raise ConfigError(
            f"reasoning_gym/{name} cannot be made with {options}: {reason}."
        ) from error


def _row(name: str, entry: dict, of_task: dict, own: dict) -> dict:
    from relax.rewards.tasks import pack

    text = own["prompt"].replace("{question}", entry["question"])
    options = of_task | {"size": own["size"], "seed": own["seed"]}
    return {
        "prompt": [{"role": "user", "content": text}] if own["conversational"] else text,
        # Tasks that check solutions by rules have no answer.
        "answer": None if entry["answer"] is None else str(entry["answer"]),
        "task": {"name": name, "options": pack(options), "entry": pack(entry)},
    }
