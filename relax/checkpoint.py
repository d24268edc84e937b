"""Checkpoints: committed by one rename, verified bit by bit when read.

A checkpoint is a directory named after its step:

    <step>/arrays/...         the leaves of the state, as orbax writes them
    <step>/relax_state.json   format, step, progress, fingerprint
    <step>/checksums.json     crc32 of every leaf and of every file, its own included

It is written under a temporary name and renamed when all of it is on the disk, so a directory that
has a step's name is whole. Orbax does not notice a flipped bit in an array; the checksums do.
Nothing in a checkpoint is ever unpickled.
"""

import errno
import importlib.metadata
import json
import math
import os
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from relax import fault
from relax.errors import CheckpointError
from relax.run_dir import STATE_FILE, fsync_path, list_steps

FORMAT = 1

_ARRAYS = "arrays"
_CHECKSUMS = "checksums.json"
_TMP_PREFIX = "tmp-"
# Orbax holds a second copy of the leaves that it is writing; this bounds it.
_IN_FLIGHT_BYTES = 200_000_000
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_FULL_WORDS = ("RESOURCE_EXHAUSTED", "No space left", "File too large", "Disk quota")
_SHOWN = 8


class _Damaged(CheckpointError):
    """The bytes are not the ones that were written: an older checkpoint may still be good."""


class Checkpointer:
    """Saves and restores states in one directory. One writer at a time; readers at any time.

    Args:
      directory: where the checkpoints lie, made at the first save.
      save_total_limit: how many to keep (>= 1); None keeps all.
      warn: told about what was found damaged, removed or different; default `warnings.warn`.

    Example:
      >>> import tempfile
      >>> checkpointer = Checkpointer(tempfile.mkdtemp())
      >>> _ = checkpointer.save(3, {"w": jnp.ones(2)}, {"epoch": 0})
      >>> checkpointer.steps()
      [3]
      >>> state, progress, step = checkpointer.restore({"w": jnp.zeros(2)})
      >>> state["w"].tolist(), progress, step
      ([1.0, 1.0], {'epoch': 0}, 3)
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        save_total_limit: int | None = None,
        warn: Callable[[str], None] | None = None,
    ):
        if save_total_limit is not None and save_total_limit < 1:
            raise CheckpointError(
                f"save_total_limit must be at least 1, got {save_total_limit}. "
                "Leave it out to keep every checkpoint."
            )
        self.directory = Path(directory).absolute()
        self.save_total_limit = save_total_limit
        self._warn = warn or (lambda line: warnings.warn(line, stacklevel=3))

    def steps(self) -> list[int]:
        """The committed steps, ascending, read from the disk each time."""
        return list_steps(self.directory)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies, or would lie."""
        return self.directory / str(step)

    def sweep(self) -> None:
        """Removes what a killed run left half-written. Only for the one writer; `save` does it."""
        for entry in self.directory.glob(_TMP_PREFIX + "*"):
            shutil.rmtree(entry)

    def save(self, step: int, state, progress: dict) -> Path:
        """Writes a checkpoint and returns when it is committed.

        Checkpoints of this step and of later ones, left by a run that this one went back behind,
        are removed just before the new one gets its name.

        Args:
          step: optimizer updates done (>= 0).
          state: any pytree of arrays, numbers and typed keys.
          progress: what JSON can hold (tuples come back as lists, keys as strings).

        Raises:
          CheckpointError: it could not be written. What was saved before is untouched.
        """
        if step < 0:
            raise CheckpointError(f"the step of a checkpoint must be 0 or more, got {step}")
        leaves = named_leaves(state)
        fault.point("before_write")
        temporary = self.directory / f"{_TMP_PREFIX}{step}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.sweep()
            _write(temporary, step, leaves, progress)
            fault.point("before_rename")
            self._remove_from(step)
            os.rename(temporary, self.path(step))
            fsync_path(self.directory)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, CheckpointError) or not isinstance(error, Exception):
                raise
            raise CheckpointError(self._why_not_written(step, state, error)) from error
        fault.point("after_rename")
        self._keep_newest()
        return self.path(step)

    def restore(self, template, step: int | None = None) -> tuple[object, dict, int]:
        """Reads a checkpoint back after verifying every bit of it.

        Args:
          template: a state, or the `jax.ShapeDtypeStruct`s of one: structure, shapes, dtypes and,
            where it holds jax arrays or shardings, where the leaves go.
          step: which one; None takes the newest intact one and warns about each damaged one.

        Returns:
          `(state, progress, step)`.

        Raises:
          CheckpointError: no intact checkpoint; or its leaves are not those of the template.
        """
        if step is not None:
            return restore_checkpoint(self.path(step), template, warn=self._warn)
        found = self.steps()
        for candidate in reversed(found):
            try:
                return restore_checkpoint(self.path(candidate), template, warn=self._warn)
            except _Damaged as damage:
                self._warn(f"{damage} Trying an older one.")
        raise CheckpointError(
            f"no intact checkpoint in '{self.directory}' (looked at: {found or 'none there'}). "
            "Start the run anew."
        )

    def _remove_from(self, step: int) -> None:
        """Removes this step and later ones, the latest first, so that a kill leaves a past."""
        later = [old for old in self.steps() if old >= step]
        for old in reversed(later):
            self._remove(old)
        if later:
            self._warn(f"checkpoint {step} is new: removed {later}, which were of an earlier run")

    def _keep_newest(self) -> None:
        if self.save_total_limit is not None:
            for old in self.steps()[: -self.save_total_limit]:
                self._remove(old)

    def _remove(self, step: int) -> None:
        # Renamed first: a kill in the middle must not leave half a checkpoint under a step's name.
        removed = self.directory / f"{_TMP_PREFIX}{step}-removed"
        os.rename(self.path(step), removed)
        fault.point("mid_retention")
        shutil.rmtree(removed)

    def _why_not_written(self, step: int, state, error: Exception) -> str:
        previous = self.steps()
        kept = f"checkpoint {previous[-1]} is intact" if previous else "there is no earlier one"
        full = getattr(error, "errno", None) in _FULL or any(w in str(error) for w in _FULL_WORDS)
        if not full:
            reason = str(error).strip().split("\n")[0][:300]
            return f"checkpoint {step} could not be written to '{self.directory}': {reason}; {kept}"
        free = shutil.disk_usage(_existing(self.directory)).free
        return (
            f"checkpoint {step} does not fit on the disk: it needs about {_size(tree_bytes(state))}"
            f", '{self.directory}' has {_size(free)} free; {kept}. Free some space, or lower "
            "save_total_limit."
        )


def restore_checkpoint(
    path: str | Path, template, *, warn: Callable[[str], None] = warnings.warn
) -> tuple[object, dict, int]:
    """Reads the checkpoint at `path`; see `Checkpointer.restore`."""
    path = Path(path).absolute()
    if not path.is_dir():
        there = list_steps(path.parent)
        raise CheckpointError(f"there is no checkpoint '{path}'. Saved steps: {there or 'none'}.")
    sums, info = _read_manifests(path)
    want = named_leaves(template)
    bad_files = [name for name, crc in sums["files"].items() if _file_crc(path / name) != crc]
    if not bad_files:
        _check_structure(path, want, sums["leaves"])
    arrays, bad_leaves = _read_arrays(path, sums["leaves"], bool(bad_files))
    if bad_files or bad_leaves:
        what = [f"leaf {name}" for name in bad_leaves] + [f"file {name}" for name in bad_files]
        raise _Damaged(f"checkpoint '{path}' is damaged: {_list(what)}.")
    changed = fingerprint_diff(info["fingerprint"], fingerprint())
    if changed:
        warn(f"bit-identity with the run that saved step {info['step']} is not promised: {changed}")
    # Each leaf leaves the dict as it is placed: two copies of the whole state never exist at once.
    placed = [_place(arrays.pop(name), leaf) for name, leaf in want.items()]
    state = jax.tree.unflatten(jax.tree.structure(template), placed)
    return state, info["progress"], info["step"]


def read_info(path: str | Path) -> dict:
    """The verified relax_state.json of a checkpoint: format, step, progress, fingerprint."""
    return _read_manifests(Path(path))[1]


# Names and bytes of leaves.


def named_leaves(tree) -> dict:
    """The leaves of a pytree under names such as `params/layer_0/kernel`."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in paths}
    if len(leaves) != len(paths):
        raise CheckpointError(
            "the leaves of a state must have distinct names when joined by '/', "
            f"got {len(paths)} leaves under {len(leaves)} names. Take the '/' out of the keys."
        )
    return leaves


def tree_bytes(tree) -> int:
    """How many bytes the leaves of a pytree (or of its ShapeDtypeStructs) take."""
    specs = map(_spec, named_leaves(tree).values())
    return sum(math.prod(s["shape"]) * jnp.dtype(s["dtype"]).itemsize for s in specs)


def _spec(leaf) -> dict:
    """What a leaf is stored as: shape, dtype and, for a typed key, its implementation."""
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        # The dtype reads key<fry>; the name of its implementation is what wrap_key_data takes.
        return _spec(data) | {"key": str(jax.random.key_impl(jnp.empty((), leaf.dtype)))}
    return {"shape": list(leaf.shape), "dtype": str(np.dtype(leaf.dtype))}


def _stored(leaf):
    """The array that stands for a leaf on the disk."""
    if isinstance(leaf, jax.Array):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf
    return np.asarray(leaf)


def _place(array: np.ndarray, like):
    """Turns a stored array into what the template has: device, sharding, key, kind of number."""
    if isinstance(like, (bool, int, float, complex)):
        return type(like)(array.item())
    if isinstance(like, (np.ndarray, np.generic)):
        return array
    if "key" in (spec := _spec(like)):
        key = jax.random.wrap_key_data(jnp.asarray(array), impl=spec["key"])
        sharding = getattr(like, "sharding", None)
        return key if sharding is None else jax.device_put(key, sharding)
    return jax.device_put(array, getattr(like, "sharding", None))


def _leaf_crc(array) -> int:
    if isinstance(array, jax.Array) and any(d.platform != "cpu" for d in array.devices()):
        # A jax array keeps the host copy that it was read through: read through a passing one.
        array = jnp.copy(array)
    return zlib.crc32(np.asarray(array, order="C").reshape(-1).view(np.uint8))


def _file_crc(path: Path) -> int | None:
    """crc32 of a file's bytes, None if it cannot be read."""
    crc = 0
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                crc = zlib.crc32(block, crc)
    except OSError:
        return None
    return crc


# Writing.


def _write(directory: Path, step: int, leaves: dict, progress: dict) -> None:
    """Writes a whole checkpoint into a new directory and gets it onto the disk."""
    info = {"format": FORMAT, "step": int(step), "progress": progress, "fingerprint": fingerprint()}
    try:
        info_bytes = json.dumps(info, indent=1).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the progress of a run must be JSON: {error}") from error
    directory.mkdir()
    stored = {name: _stored(leaf) for name, leaf in leaves.items()}
    sums = {n: _spec(leaf) | {"crc32": _leaf_crc(stored[n])} for n, leaf in leaves.items()}
    # Orbax refuses arrays without elements; their shape, in the checksums, is all there is to them.
    full = {name: array for name, array in stored.items() if array.size}
    in_flight = max([_IN_FLIGHT_BYTES, *(array.nbytes for array in full.values())])
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=in_flight / 1e9 + 0.001)
    with ocp.Checkpointer(handler) as orbax:
        orbax.save(directory / _ARRAYS, full)
    fault.point("mid_write")
    (directory / STATE_FILE).write_bytes(info_bytes)
    fault.point("before_checksums")
    names = sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
    files = {name: _file_crc(directory / name) for name in names}
    (directory / _CHECKSUMS).write_bytes(_seal({"leaves": sums, "files": files}))
    for path in [*directory.rglob("*"), directory]:
        fsync_path(path)


def _seal(sums: dict) -> bytes:
    """JSON whose first field is the crc32 of all the bytes after it."""
    rest = json.dumps(sums)[1:].encode()
    return b'{"crc32": "%08x", ' % zlib.crc32(rest) + rest


# Reading.


def _read_manifests(path: Path) -> tuple[dict, dict]:
    """Verifies and reads checksums.json and relax_state.json."""
    try:
        raw = (path / _CHECKSUMS).read_bytes()
        sums = json.loads(raw)
        del sums["crc32"]
        if _seal(sums) != raw:
            raise ValueError("not the bytes that were written")
        info_bytes = (path / STATE_FILE).read_bytes()
    except FileNotFoundError as error:
        raise _Damaged(
            f"checkpoint '{path}' is damaged: file {Path(error.filename).name} is missing."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _Damaged(f"checkpoint '{path}' is damaged: file {_CHECKSUMS}.") from error
    if zlib.crc32(info_bytes) != sums["files"][STATE_FILE]:
        raise _Damaged(f"checkpoint '{path}' is damaged: file {STATE_FILE}.")
    info = json.loads(info_bytes)
    if info["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint '{path}' has format {info['format']}, this version of ReLax reads "
            f"{FORMAT}. Resume it with the version that wrote it."
        )
    return sums, info


def _read_arrays(path: Path, specs: dict, damaged: bool) -> tuple[dict, list[str]]:
    """Reads all leaves as numpy arrays; names those that are not what was written.

    With `damaged` a file is known to be bad: reading only serves to name the leaves that it hit.
    """
    full = {name: spec for name, spec in specs.items() if math.prod(spec["shape"])}
    arrays = {
        n: np.empty(s["shape"], jnp.dtype(s["dtype"])) for n, s in specs.items() if n not in full
    }
    how = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in full}
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
            arrays |= orbax.restore(path / _ARRAYS, restore_args=how)
    except Exception as error:  # damaged metadata may raise anything
        if damaged:
            return {}, [name for name in specs if name in str(error)]
        raise CheckpointError(f"checkpoint '{path}' cannot be read: {error}") from error
    bad = [
        name
        for name, spec in specs.items()
        if name not in arrays
        or list(arrays[name].shape) != spec["shape"]
        or str(arrays[name].dtype) != spec["dtype"]
        or _leaf_crc(arrays[name]) != spec["crc32"]
    ]
    return arrays, bad


def _check_structure(path: Path, want: dict, have: dict) -> None:
    """Refuses a template whose leaves are not those of the checkpoint."""
    problems = [f"missing in the checkpoint: {name}" for name in want if name not in have]
    problems += [f"not in this state: {name}" for name in have if name not in want]
    for name in want.keys() & have.keys():
        here, there = _describe(_spec(want[name])), _describe(have[name])
        if here != there:
            problems.append(f"{name} is {there} in the checkpoint, {here} in this state")
    if problems:
        raise CheckpointError(
            f"checkpoint '{path}' must hold the leaves of this state, and differs: "
            f"{_list(sorted(problems))}. Is it of the same model and optimizer?"
        )


def _describe(spec: dict) -> str:
    kind = f"key of {spec['key']}, " if "key" in spec else ""
    return f"{kind}{spec['dtype']}{spec['shape']}"


# Space and circumstances.


def check_space(directory: str | Path, nbytes: int, copies: int) -> None:
    """Refuses, before anything is compiled, a run whose checkpoints will not fit.

    Args:
      directory: where they will lie; it need not exist yet.
      nbytes: size of one, as `tree_bytes` gives it.
      copies: how many will exist at once: save_total_limit + 1.
    """
    free = shutil.disk_usage(_existing(Path(directory).absolute())).free
    if free < nbytes * copies:
        raise CheckpointError(
            f"{copies} checkpoints of {_size(nbytes)} need {_size(nbytes * copies)}, and "
            f"'{directory}' has {_size(free)} free. Free some space, lower save_total_limit, or "
            "choose another output_dir."
        )


def fingerprint() -> dict:
    """What decides, besides the configuration, which bits a run computes."""
    versions = {
        name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")
    }
    devices = jax.devices()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return versions | {
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "cpu_threads": cores,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def fingerprint_diff(old: dict, new: dict) -> str:
    """The fields that differ, as one line; empty if none do.

    >>> fingerprint_diff({"jax": "0.10.2", "cpu_threads": 2}, {"jax": "0.12.0", "cpu_threads": 2})
    'jax 0.10.2 -> 0.12.0'
    """
    names = [name for name in old | new if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {old.get(name)} -> {new.get(name)}" for name in names)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _size(nbytes: int) -> str:
    """
    >>> _size(1_500_000_000), _size(2_000)
    ('1.50 GB', '0.002 MB')
    """
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.3g} MB"


def _list(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
