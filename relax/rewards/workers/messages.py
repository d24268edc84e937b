"""Messages over a pipe: eight bytes of length, then JSON. Nothing in them can run.

`write` and `read` call `wait` before every system call: it returns when the pipe is ready, or
raises when that takes too long, so that neither blocks on a process that has stopped.
"""

import json
import os
import struct
from collections.abc import Callable

_HEADER = struct.Struct(">Q")
# A pipe that is ready to be written to takes this much at once (PIPE_BUF of POSIX is at least 512,
# of Linux 4096).
_CHUNK = 4096


def encode(message) -> bytes:
    """The frame of a message.

    >>> len(encode({"n": 1}))
    16
    """
    data = json.dumps(message).encode()
    return _HEADER.pack(len(data)) + data


def decode(data: bytes | bytearray):
    """The message of a whole frame, or None where the frame is not complete yet."""
    size = frame_size(data)
    return None if size is None or len(data) < size else json.loads(data[_HEADER.size : size])


def frame_size(data: bytes | bytearray) -> int | None:
    """Bytes of the frame that starts here, or None where its length is not there yet."""
    return None if len(data) < _HEADER.size else _HEADER.size + _HEADER.unpack_from(data)[0]


def write(fd: int, message, wait: Callable[[], object] | None = None) -> None:
    """Writes a message, or one that is encoded already."""
    view = memoryview(message if isinstance(message, bytes) else encode(message))
    while view:
        if wait is not None:
            wait()
        view = view[os.write(fd, view if wait is None else view[:_CHUNK]) :]


def read(fd: int, wait: Callable[[], object] = lambda: None):
    """The next message, or None at the end.

    Raises:
      EOFError: the end comes within a frame.
    """
    data = bytearray()
    wanted = _HEADER.size
    while len(data) < wanted:
        wait()
        part = os.read(fd, min(wanted - len(data), 1 << 20))
        if not part:
            if not data:
                return None
            raise EOFError("the pipe ends within a message")
        data += part
        wanted = frame_size(data) or wanted
    return decode(data)
