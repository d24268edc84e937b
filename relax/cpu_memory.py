"""Keeps freed memory in the process, where XLA's CPU client would hand it back after every step.

XLA allocates all temporaries of a step at once and frees them at its end. glibc returns so large a
block to the kernel, which then hands out and clears each page anew: about a sixth of a training
step's time on virtual machines. The block stays in the heap with the settings below, and the peak
is the same.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_NEVER = -1


def keep_freed_memory() -> bool:
    """Tells glibc to keep what is freed. For scripts, before the first large array.

    Returns:
      Whether the C library took it; elsewhere than on glibc nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {
        _M_MMAP_MAX: 0,  # large blocks come from the heap, ...
        _M_TRIM_THRESHOLD: _NEVER,  # ... whose top is not given back, ...
        _M_TOP_PAD: 64 << 20,
        _M_ARENA_MAX: 1,  # ... and of which there is one for all threads.
    }
    return all([mallopt(name, value) == 1 for name, value in settings.items()])
