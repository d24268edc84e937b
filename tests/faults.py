"""Named points at which a test makes a run die, sleep or meet a full disk.

`meet("before_rename:2")` patches this process so that it kills itself (SIGKILL) the second time it
passes the point `before_rename`; `"data:1:sleep"` sleeps there for a minute, `"mid_write:1:enospc"`
raises the error of a full disk. The product knows nothing of it: each point is a patched function.
"""

import errno
import functools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SLEEP_S = 60.0


def meet(text: str, patch: pytest.MonkeyPatch | None = None) -> None:
    """Patches what passes the point.

    Args:
      text: `point:n` or `point:n:action`; n counts from 1, an action is kill, sleep or enospc.
      patch: undoes it; without it, for a child, nothing does.
    """
    name, nth, *action = text.split(":")
    passes = iter(range(1, int(nth) + 1))

    def passed() -> None:
        if next(passes, None) == int(nth):
            _ACTIONS[action[0] if action else "kill"](name)

    _POINTS[name](passed, patch or pytest.MonkeyPatch())


def _sleep(name: str) -> None:
    print(f"asleep at {name}", flush=True)
    time.sleep(SLEEP_S)


def _full(name: str):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"a test at {name}")


_ACTIONS = {
    "kill": lambda name: os.kill(os.getpid(), signal.SIGKILL),
    "sleep": _sleep,
    "enospc": _full,
}


def _around(owner, name: str, *, before: bool = False, only: Callable = lambda *a, **k: True):
    """A point before or after the calls of `owner.name` whose arguments `only` accepts."""

    def install(passed: Callable, patch: pytest.MonkeyPatch) -> None:
        holder = owner() if callable(owner) and not isinstance(owner, type) else owner
        original = getattr(holder, name)

        @functools.wraps(original)
        def patched(*args, **kwargs):
            counts = only(*args, **kwargs)
            if counts and before:
                passed()
            result = original(*args, **kwargs)
            if counts and not before:
                passed()
            return result

        patch.setattr(holder, name, patched)

    return install


def _after_items(passed: Callable, patch: pytest.MonkeyPatch, *, evaluated: bool = False) -> None:
    """After an item of the training data is trained on, evaluated and saved where that is due; or
    after an item of an evaluation."""
    from relax.trainers import trainer

    original = trainer.items_of

    def items_of(loader, *place, **evaluation):
        for item in original(loader, *place, **evaluation):
            yield item
            if evaluated == bool(evaluation):
                passed()

    patch.setattr(trainer, "items_of", items_of)


def _checkpointer():
    from relax.checkpoint.checkpointer import Checkpointer

    return Checkpointer


def _checkpoints():
    from relax.checkpoint import checkpointer

    return checkpointer


def _model_source():
    from relax.engine.model_source import ModelSource

    return ModelSource


def _trainer():
    from relax.trainers import Trainer

    return Trainer


def _rl_trainer():
    from relax.trainers import RLTrainer

    return RLTrainer


def _dpo_trainer():
    from relax.trainers import DPOTrainer

    return DPOTrainer


def _writes(name: str) -> Callable:
    return lambda path, *_: path.name == name and path.parent.name.startswith("tmp-")


def _renames_to(end: str) -> Callable:
    return lambda old, new, **_: os.fspath(new).endswith(end)


_POINTS = {
    "data": _around(_model_source, "tokenizer", before=True),
    "reference": _around(_dpo_trainer, "answer_logprobs"),
    "rollout": _around(_rl_trainer, "score", before=True),  # completions are not yet scored
    "reward": _around(_rl_trainer, "score"),
    "step": _after_items,
    "evaluation": functools.partial(_after_items, evaluated=True),
    "before_write": _around(_checkpoints, "snapshot", before=True),
    "mid_write": _around(Path, "write_bytes", before=True, only=_writes("relax_state.json")),
    "before_checksums": _around(Path, "write_bytes", before=True, only=_writes("checksums.json")),
    "before_rename": _around(_checkpointer, "_remove_later", before=True),
    "mid_replace": _around(os, "rename", only=_renames_to("-replaced")),
    "after_rename": _around(_checkpointer, "_keep_newest", before=True),
    "mid_retention": _around(os, "rename", only=_renames_to("-removed")),
    "trained": _around(_trainer, "train"),
    "export": _around(os, "rename", before=True, only=_renames_to("/final")),
}
