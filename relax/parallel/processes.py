"""Multi-process runs: joining, process index, and agreement on values.

Every process runs the same Python code on the same values, so that all call the same compiled
programs in the same order. Values that may differ between processes (a signal, a file on disk, a
reward) are exchanged by `gather`, which all must call. A single process does nothing here.
"""

import collections
import contextlib
import functools
import json
import os
import socket
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
_LEAVE_S = 30.0
_PATIENCE_S = 24 * 3600  # for a live process; the heartbeat detects a dead one
_asked: collections.Counter[str] = collections.Counter()


def count() -> int:
    """Number of processes."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
    """Index of this process."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def is_main() -> bool:
    """Whether this process writes logs, configuration and exports."""
    return index() == 0


def start(
    coordinator: str,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_s: int = 100,
    timeout_s: int = 300,
) -> None:
    """Joins the other processes, before any computation of jax. Repeated calls do nothing.

    Args:
      coordinator: HOST:PORT of process 0, or `auto`: everything from the environment of SLURM, MPI,
        GKE or a TPU pod, as in `jax.distributed.initialize`.
      num_processes, process_id: number of processes, and index of this one.
      heartbeat_s: seconds without a heartbeat of one process after which the others end.
      timeout_s: seconds to wait for all processes.

    Raises:
      ConfigError: not all processes joined in time, or another run has the port.
    """
    if jax.distributed.is_initialized():
        return
    address = None if coordinator == "auto" else coordinator
    if address and process_id == 0 and _answers(address):
        raise ConfigError(
            f"process 0 listens at coordinator {address}, and another program, maybe another run, "
            "answers there already: give each run a port of its own."
        )
    where = f"at {address}" if address else "given by the environment"
    who = "this process" if process_id is None else f"process {process_id}"
    who += "" if num_processes is None else f" of {num_processes}"
    # That service would handle SIGTERM, on which `Interrupt` must save the run.
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
            f"the processes of the run could not connect {where}: {reason}. Start all of them "
            "with the same coordinator (HOST:PORT) and num_processes, and each its own process_id; "
            "coordinator auto is for SLURM, MPI, GKE and TPU pods."
        ) from error


def _answers(address: str) -> bool:
    """Whether a program listens at HOST:PORT; a second one could listen there too, unnoticed."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            return True
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _saying_that_it_waits(line: str) -> Iterator[None]:
    """Reports at once and every half minute that this process waits for the others."""
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
    """Ends this process at once when it fails, so that the others end too instead of waiting.

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
        if getattr(error, "in_all", False):
            _leave_together()
        # A normal exit would wait for the other processes, which may be gone.
        os._exit(code)


def _leave_together() -> None:
    """Waits, for a time, until all processes have come to their end.

    Process 0 serves the others: if it ended first, they would fail while they end.
    """

    def leave():
        with contextlib.suppress(RuntimeError):  # another process has died meanwhile
            jax.distributed.shutdown()

    leaving = threading.Thread(target=leave, name="leaving", daemon=True)
    leaving.start()
    leaving.join(_LEAVE_S)


def _last_words(error: BaseException) -> tuple[str, int]:
    """The text to end with, and the exit code."""
    if isinstance(error, RelaxError):
        return f"error: {error}", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted", getattr(error, "exit_code", 130)
    text = "".join(traceback.format_exception(error))
    # Gloo, which carries arrays between processes on CPUs, may arrive as a ValueError.
    if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
        # The error does not show whether a peer or this process is at fault.
        text += (
            f"error: process {index()} of {count()} failed in jax's runtime, which happens when "
            "another process of the run has ended: check the output of the others, then start "
            "all of them again with --resume auto"
        )
    return text, 1


def gather(value: Any) -> list[Any]:
    """Gathers a JSON value of every process, in order of their indices."""
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
    """Gathers one array of every process, of any shapes, bit for bit."""
    parts = gather([str(values.dtype), list(values.shape), values.tobytes().hex()])
    return [np.frombuffer(bytes.fromhex(h), dtype).reshape(shape) for dtype, shape, h in parts]


def barrier(name: str) -> None:
    """Waits for all processes. Runs nothing on the devices, so any thread may call it.

    Args:
      name: a name that only one thread waits for at a time.
    """
    if count() > 1:
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=unique_name(name), timeout_ms=1000 * _PATIENCE_S)


def unique_name(name: str) -> str:
    """The name with a counter, equal in all processes that call this in the same order."""
    _asked[name] += 1
    return f"{name} {_asked[name]}"


def broadcast_from_main(f: Callable[[], Any]) -> Any:
    """Returns the JSON result of `f` in process 0, in all processes.

    Raises:
      RelaxError: that `f` raised, in every process.
    """
    if count() == 1:
        return f()
    gathered: list[Any] = [None, None]
    error = None
    if is_main():
        try:
            gathered = [f(), None]
        except RelaxError as raised:
            error, gathered = raised, [None, [type(raised).__name__, str(raised)]]
    value, failed = gather(gathered)[0]
    if error is not None:
        raise error
    if failed:
        raise RelaxError(f"process 0 ended: {failed[1]}")
    return value


def check_same(values: dict[str, Any]) -> None:
    """Checks that all processes have the same options, files and code.

    Args:
      values: this process's values by name.

    Raises:
      ConfigError: one differs; names it and the process.
    """
    mine = values | {"the code of relax": code_digest(), "jax": jax.__version__}
    parts = gather({name: json.dumps(value, sort_keys=True) for name, value in mine.items()})
    for number, other in enumerate(parts[1:], 1):
        names = [n for n in parts[0] | other if parts[0].get(n) != other.get(n)]
        if names:
            name = names[0]
            raise ConfigError(
                f"all processes must run the same, but {name} is {parts[0].get(name, 'absent')} in "
                f"process 0 and {other.get(name, 'absent')} in process {number}. Start all of "
                "them with the same code, options and files."
            )


@functools.cache
def code_digest() -> str:
    """A checksum of all source files of relax."""
    root, crc = Path(__file__).parents[1], 0
    for file in sorted(root.rglob("*.py")):
        crc = zlib.crc32(str(file.relative_to(root)).encode() + file.read_bytes(), crc)
    return f"{crc:08x}"
