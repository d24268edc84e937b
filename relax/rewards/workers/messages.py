"""Messages over a pipe: eight bytes of length, then JSON. Nothing in them can run."""

import json
import os
import struct

_HEADER = struct.Struct(">Q")


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


def write(fd: int, frame: bytes) -> None:
    """Writes all of it."""
    view = memoryview(frame)
    while view:
        view = view[os.write(fd, view) :]


def read(fd: int):
    """The next message, or None at the end.

    Raises:
      EOFError: the end comes within a frame.
    """
    data = bytearray()
    wanted = _HEADER.size
    while len(data) < wanted:
        part = os.read(fd, min(wanted - len(data), 1 << 20))
        if not part:
            if not data:
                return None
            raise EOFError("the pipe ends within a message")
        data += part
        wanted = frame_size(data) or wanted
    return decode(data)
