"""Settings with which XLA on CPUs trains a sixth faster and with predictable memory.

XLA allocates all temporaries of a step as one block and frees it at the end of the step. glibc
returns such a large block to the kernel, which then maps and clears every page again in each step.
And with asynchronous dispatch the next step may allocate its block before the last one has freed
its own, which doubles the memory.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_NEVER = -1


def prepare_cpu() -> None:
    """Applies the settings, before jax starts its threads. No effect on other devices than CPUs.

    On a CPU a step uses the cores that would dispatch the next one, so waiting costs nothing.
    """
    keep_freed_memory()
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def release_freed_memory() -> None:
    """Returns free memory to the kernel: once small arrays occupy part of a step's block, the
    next block is allocated elsewhere, and the old one would stay unused."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory; returns whether it does, False without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    settings = {
        _M_MMAP_MAX: 0,  # large blocks come from the heap, ...
        _M_TRIM_THRESHOLD: _NEVER,  # ... whose top is not returned to the kernel, ...
        _M_TOP_PAD: 64 << 20,
        _M_ARENA_MAX: 1,  # ... and all threads share one.
    }
    return all([mallopt(name, value) == 1 for name, value in settings.items()])
