"""Reference log-probabilities, computed once per dataset and cached in files."""

import io
import time
import zlib
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from relax.checkpoint.storage import leaf_crc, named_leaves
from relax.data.preference_loader import PreferenceLoader
from relax.errors import CheckpointError
from relax.files import atomic_write
from relax.trainers.callback import Callback, Event
from relax.trainers.state import reference_params

SAVE_EVERY_S = 20.0


class ReferenceLogprobs(Callback):
    """Sets the `ref_logprobs` of loaders before the first update, from a file if there is one.

    A file holds `[N, 2]` float32 and is named after checksums of the tokens, the reference's
    weights and the model's configuration. Values that are not computed yet are NaN; after a kill
    only these are computed. The reference is the initial policy, or the base model of adapters.

    Args:
      loaders: the loaders by display name.
      directory: directory of the files.
      console: shows the progress.
    """

    def __init__(self, loaders: dict[str, PreferenceLoader], directory: Path, console: Console):
        self.loaders, self.directory, self.console = loaders, Path(directory), console
        self.weights: str | None = None  # checksum of the reference at the first start

    def state_dict(self) -> dict:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict) -> None:
        self.weights = state["weights"]

    def on_train_begin(self, event: Event) -> None:
        frozen = event.state.frozen
        at_start = event.step == 0 or "base" in frozen and event.trainer.model.lora is not None
        params = None
        if at_start:
            has_base = event.trainer.model.lora is not None
            params = reference_params(frozen if has_base else frozen | {"ref": event.state.params})
            self.weights = _digest(params, event.trainer.model)
        for name, loader in self.loaders.items():
            file = self.directory / f"{loader.preferences.digest:08x}-{self.weights}.npy"
            loader.ref_logprobs = self._complete(event.trainer, params, name, loader, file)

    def _complete(self, trainer, params, name, loader, file: Path) -> np.ndarray:
        found = _read(file, len(loader.preferences))
        missing = int(np.isnan(found).any(axis=1).sum())
        if not missing:
            self.console.print(f"reference log-probabilities of {name}: read from {file}")
            return found
        if params is None:
            raise CheckpointError(
                f"a resumed run needs the reference's log-probabilities in '{file}', but {missing} "
                f"of {len(found)} are missing. Restore the file, or start the run over."
            )
        self.console.print(f"reference log-probabilities of {name}: computing {missing:,} pairs")
        saved_s = time.monotonic()
        for batch in loader.batches(0):
            index = batch["index"].reshape(-1)
            real = index >= 0
            if np.isnan(found[index[real]]).any():
                found[index[real]] = trainer.answer_logprobs(params, batch)[real]
                if time.monotonic() - saved_s > SAVE_EVERY_S:
                    _write(file, found)
                    saved_s = time.monotonic()
        _write(file, found)
        return found


def _digest(params, model) -> str:
    """A checksum of all weights and of the model's configuration."""
    crc = zlib.crc32(repr((model.config, str(model.dtype))).encode())
    for name, leaf in sorted(named_leaves(params).items()):
        crc = zlib.crc32(f"{name}:{leaf_crc(leaf)}".encode(), crc)
    return f"{crc:08x}"


def _read(file: Path, count: int) -> np.ndarray:
    """The values of a file; all NaN if it is missing or has another shape."""
    empty = np.full((count, 2), np.nan, np.float32)
    try:
        found = np.load(file, allow_pickle=False)
    except (OSError, ValueError):
        return empty
    return found if found.shape == empty.shape and found.dtype == empty.dtype else empty


def _write(file: Path, values: np.ndarray) -> None:
    if jax.process_index():
        return  # all processes have the same values and read the same file
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=False)
    atomic_write(file, stream.getvalue(), sync=False)
