"""Several processes that run one program over one mesh: who this one is, and what all agree on.

Every process runs the same Python code on the same values, so that all call the same compiled
programs in the same order. What may differ from process to process (a signal, a file on the disk, a
reward) is settled by `gather`, which all must call. One process alone takes part in nothing here.
"""

import collections
import contextlib
import functools
import json
import os
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from relax.errors import ConfigError, RelaxError

_SAY_EVERY_S = 30.0
_PATIENCE_S = 24 * 3600  # with a process that lives: of one that does not, the heartbeat tells
_asked: collections.Counter[str] = collections.Counter()


def count() -> int:
    """How many processes there are."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
    """Which of them this is."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the one that writes logs, configuration and exports."""
    return index() == 0


def start(
    coordinator: str,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_s: int = 100,
    timeout_s: int = 300,
) -> None:
    """Joins the other processes; before anything of jax is computed. Those that have stay joined.

    Args:
      coordinator: HOST:PORT of process 0, or `auto`: all of it from the environment of SLURM, MPI,
        GKE or a TPU pod, as `jax.distributed.initialize` finds it.
      num_processes, process_id: how many there are, and which this is.
      heartbeat_s: after so many seconds without a sign of one, the others end.
      timeout_s: how long to wait for all to come.

    Raises:
      ConfigError: they did not come together.
    """
    if jax.distributed.is_initialized():
        return
    address = None if coordinator == "auto" else coordinator
    where = f"at {address}" if address else "as the environment tells"
    who = "this process" if process_id is None else f"process {process_id}"
    who += "" if num_processes is None else f" of {num_processes}"
    # That service takes SIGTERM for itself; `Interrupt` saves the run on it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with _saying_that_it_waits(f"{who} waits for the others {where}, up to {timeout_s} s"):
            jax.distributed.initialize(
                coordinator_address=address,
                num_processes=num_processes,
                process_id=process_id,
                heartbeat_timeout_seconds=heartbeat_s,
                initialization_timeout=timeout_s,
            )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(
            f"the processes of the run did not come together {where}: {reason}. Start all of them "
            "with the same coordinator (HOST:PORT) and num_processes, and each its own process_id; "
            "coordinator auto is for SLURM, MPI, GKE and TPU pods."
        ) from error


@contextlib.contextmanager
def _saying_that_it_waits(line: str) -> Iterator[None]:
    """Says at once, and every half minute, that this process waits for the others."""
    over = threading.Event()
    start_s = time.monotonic()

    def speak():
        print(line, file=sys.stderr, flush=True)
        while not over.wait(_SAY_EVERY_S):
            waited_s = time.monotonic() - start_s
            print(f"{line}: {waited_s:.0f} s so far", file=sys.stderr, flush=True)

    speaker = threading.Thread(target=speak, name="waiting", daemon=True)
    speaker.start()
    try:
        yield
    finally:
        over.set()
        speaker.join()


@contextlib.contextmanager
def abort_on_error() -> Iterator[None]:
    """Ends this process at once when it fails, so that the others end, too, and none waits.

    The exit code is that of the error, and never 0.
    """
    try:
        yield
    except BaseException as error:
        if count() == 1:
            raise
        line, code = _last_words(error)
        sys.stdout.flush()
        os.write(2, line.encode() + b"\n")
        # A normal exit would wait for the other processes, which may be gone.
        os._exit(code)


def _last_words(error: BaseException) -> tuple[str, int]:
    """The text to end with, and the exit code."""
    if isinstance(error, RelaxError):
        return f"error: {error}", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted", getattr(error, "exit_code", 130)
    text = "".join(traceback.format_exception(error))
    if isinstance(error, jax.errors.JaxRuntimeError):
        # Nothing in the error tells whether a peer or this process is at fault.
        text += (
            f"error: process {index()} of {count()} failed in jax's runtime, as it does when "
            "another process of the run has ended: see what the others say, then start all of "
            "them again with --resume auto"
        )
    return text, 1


def gather(value: Any) -> list[Any]:
    """The values of all processes, in their order; JSON goes through."""
    if count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array([data.size], np.int32))).reshape(
        -1
    )
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(count(), -1)
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, sizes, strict=True)]


def gather_array(values: np.ndarray) -> list[np.ndarray]:
    """As `gather`, of one array of each process, of any shapes; bit for bit."""
    parts = gather([str(values.dtype), list(values.shape), values.tobytes().hex()])
    return [np.frombuffer(bytes.fromhex(h), dtype).reshape(shape) for dtype, shape, h in parts]


def barrier(name: str) -> None:
    """Waits until all are here. It is no program on the devices, so another thread may wait, too.

    Args:
      name: one that is waited for by one thread at a time.
    """
    if count() > 1:
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=unique_name(name), timeout_ms=1000 * _PATIENCE_S)


def unique_name(name: str) -> str:
    """The name, and how often it was asked for: alike in all processes that ask in one order."""
    _asked[name] += 1
    return f"{name} {_asked[name]}"


def broadcast_from_main(f: Callable[[], Any]) -> Any:
    """What `f` gives in process 0, everywhere; JSON.

    Raises:
      RelaxError: that `f` raised, in every process.
    """
    if count() == 1:
        return f()
    told: list[Any] = [None, None]
    error = None
    if is_main():
        try:
            told = [f(), None]
        except RelaxError as raised:
            error, told = raised, [None, [type(raised).__name__, str(raised)]]
    value, failed = gather(told)[0]
    if error is not None:
        raise error
    if failed:
        raise RelaxError(f"process 0 ended: {failed[1]}")
    return value


def check_same(values: dict[str, Any]) -> None:
    """Refuses processes that were started with other options or files, or run other code.

    Args:
      values: of this process, by name.

    Raises:
      ConfigError: what differs, and in which process.
    """
    mine = values | {"the code of relax": code_digest(), "jax": jax.__version__}
    told = gather({name: json.dumps(value, sort_keys=True) for name, value in mine.items()})
    for number, other in enumerate(told[1:], 1):
        names = [n for n in told[0] | other if told[0].get(n) != other.get(n)]
        if names:
            name = names[0]
            raise ConfigError(
                f"all processes must run the same, and {name} is {told[0].get(name, 'absent')} in "
                f"process 0 and {other.get(name, 'absent')} in process {number}. Start all of "
                "them with the same code, options and files."
            )


@functools.cache
def code_digest() -> str:
    """A checksum of all of relax's source files."""
    root, crc = Path(__file__).parents[1], 0
    for file in sorted(root.rglob("*.py")):
        crc = zlib.crc32(str(file.relative_to(root)).encode() + file.read_bytes(), crc)
    return f"{crc:08x}"
