"""Several processes that run one program over one mesh: who this one is, and what all agree on.

Every process runs the same Python code on the same values, so that all call the same compiled
programs in the same order. What may differ from process to process (a signal, a file on the disk, a
reward) is settled by `gather`, which all must call. One process alone takes part in nothing here.
"""

import collections
import contextlib
import ctypes
import functools
import json
import os
import re
import sys
import threading
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from relax.errors import ConfigError, RelaxError

LOST = 75  # the exit code when another process is gone: EX_TEMPFAIL, a relaunch may succeed
_STATUS = re.compile(r"[A-Z]+(_[A-Z]+)*: ")  # how errors of jax's runtime begin, of any class
# What they say when a peer is gone, whichever library noticed.
_GONE = (
    "gloo",
    "connection reset",
    "connection closed",
    "unavailable",
    "heartbeat",
    "coordination",
)
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
    where = {} if coordinator == "auto" else {"coordinator_address": coordinator}
    try:
        _say_who_is_gone()
        jax.distributed.initialize(
            **where,
            num_processes=num_processes,
            process_id=process_id,
            heartbeat_timeout_seconds=heartbeat_s,
            initialization_timeout=timeout_s,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        where = f"at {coordinator}" if where else "as the environment tells"
        raise ConfigError(
            f"the processes of the run did not come together {where}: {reason}. Start all of them "
            "with the same coordinator (HOST:PORT) and num_processes, and each its own process_id; "
            "coordinator auto is for SLURM, MPI, GKE and TPU pods."
        ) from error


def _say_who_is_gone() -> None:
    """Lets a missed heartbeat end this process with a sentence.

    The runtime tells of one in a thread of its own. It calls a function of Python's with a status
    that it cannot turn into a Python object, and ends by the C++ exception of that; with no
    function it aborts, and cannot be told from a crash.
    """
    from jax._src.lib import _jax

    make = _jax.get_distributed_runtime_client
    make = getattr(make, "func", make)
    _jax.get_distributed_runtime_client = functools.partial(make, missed_heartbeat_callback=_lost)
    try:
        library = ctypes.CDLL("libstdc++.so.6")
    except OSError:  # another C++ library: the exception ends the process in its own words
        return
    library.__cxa_current_exception_type.restype = ctypes.POINTER(ctypes.c_char_p)
    set_terminate = library._ZSt13set_terminatePFvvE
    set_terminate.restype = _HANDLER

    @_HANDLER
    def handler():
        kind = library.__cxa_current_exception_type()
        if kind and kind[1] == b"St8bad_cast":  # a type_info: its table of functions, its name
            _lost()
        previous()

    previous = set_terminate(handler)
    _kept.append(handler)


_HANDLER = ctypes.CFUNCTYPE(None)
_kept: list[Any] = []  # what C++ points to


def _lost(*_) -> None:
    _leave(
        "error: another process of the run is gone: ending this one; start all of them again", LOST
    )


_leaving = threading.Lock()


def _leave(line: str, code: int) -> None:
    """Ends at once: what runs at a normal exit would wait for the processes that are gone."""
    _leaving.acquire()  # never released: two threads may have noticed, and one speaks
    sys.stdout.flush()
    os.write(2, line.encode() + b"\n")
    os._exit(code)


@contextlib.contextmanager
def abort_on_error() -> Iterator[None]:
    """What fails in one process ends it at once, so that the others end, too, and none waits."""
    try:
        yield
    except BaseException as error:
        if count() == 1:
            raise
        _leave(*_last_words(error))


def _last_words(error: BaseException) -> tuple[str, int]:
    if _is_of_a_peer(error):
        return (
            f"error: another process of the run is gone, so process {index()} of {count()} ends; "
            "start all of them again",
            LOST,
        )
    if isinstance(error, RelaxError):
        return f"error: {error}", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted", getattr(error, "exit_code", 130)
    return "".join(traceback.format_exception(error)), 1


def _is_of_a_peer(error: BaseException | None) -> bool:
    """Whether jax's runtime says that another process is gone; a user's function may say alike."""
    while error is not None:
        said = str(error)
        if _STATUS.match(said) and any(word in said.lower() for word in _GONE):
            return True
        error = error.__cause__ or error.__context__
    return False


def gather(value: Any) -> list[Any]:
    """The values of all processes, in their order; JSON goes through."""
    if count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32([data.size]))).reshape(-1)
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
    told = [None, None]
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
    """Refuses processes that were started with other options or run other code.

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
                "them with the same code and options."
            )


@functools.cache
def code_digest() -> str:
    """A checksum of all of relax's source files."""
    root, crc = Path(__file__).parents[1], 0
    for file in sorted(root.rglob("*.py")):
        crc = zlib.crc32(str(file.relative_to(root)).encode() + file.read_bytes(), crc)
    return f"{crc:08x}"
