"""Messages over a pipe: eight bytes of length, then JSON, which cannot run code.

`write` and `read` call `wait` before every system call: it returns when the pipe is ready, or
raises when that takes too long, so that neither blocks on a process that has stopped.
"""

import json
import os
import struct
from collections.abc import Callable

_HEADER = struct.Struct(">Q")
# A pipe that is ready for writing accepts this much at once (PIPE_BUF of POSIX is at least 512,
# of Linux 4096).
_CHUNK = 4096


def encode(message) -> bytes:
    """The frame of a message.

    >>> len(encode({"n": 1}))
    16
    """
    return frame(json.dumps(message).encode())


def frame(data: bytes) -> bytes:
    """JSON with its length in front."""
    return _HEADER.pack(len(data)) + data


def decode(data: bytes | bytearray):
    """The message of a frame, or None while the frame is incomplete."""
    size = frame_size(data)
    return None if size is None or len(data) < size else json.loads(data[_HEADER.size : size])


def frame_size(data: bytes | bytearray) -> int | None:
    """Bytes of the frame that starts here, or None while its length is incomplete."""
    return None if len(data) < _HEADER.size else _HEADER.size + _HEADER.unpack_from(data)[0]


def write(fd: int, message, wait: Callable[[], object] | None = None) -> None:
    """Writes a message, or an encoded one."""
    view = memoryview(message if isinstance(message, bytes) else encode(message))
    while view:
        if wait is not None:
            wait()
        view = view[os.write(fd, view if wait is None else view[:_CHUNK]) :]


def read(fd: int, wait: Callable[[], object] = lambda: None):
    """The next message, or None at the end.

    Raises:
      EOFError: the pipe ends within a frame.
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
