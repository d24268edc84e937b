"""Named points at which a test can make a run die, sleep or meet a full disk.

`RELAX_FAULT="before_rename:2"` kills the process (SIGKILL) the second time it passes the point
`before_rename`; `"compile:1:sleep"` sleeps there for a minute, `"mid_write:1:enospc"` raises the
error of a full disk. Without the variable a point is one comparison.
"""

import errno
import os
import signal
import time

from relax.errors import ConfigError

ACTIONS = ("kill", "sleep", "enospc")
SLEEP_S = 60.0


def _parse(text: str | None) -> tuple[str, int, str] | None:
    """Splits `point:n[:action]`; n counts from 1.

    >>> _parse("before_rename:2")
    ('before_rename', 2, 'kill')
    """
    if not text:
        return None
    name, *rest = text.split(":")
    nth = rest[0] if rest else "1"
    action = rest[1] if len(rest) > 1 else "kill"
    if len(rest) > 2 or not nth.isdigit() or int(nth) < 1 or action not in ACTIONS:
        raise ConfigError(
            f"RELAX_FAULT must read point:n or point:n:action with n >= 1 and an action of "
            f"{', '.join(ACTIONS)}, got {text!r}. Unset it for a normal run."
        )
    return name, int(nth), action


_wanted = _parse(os.environ.get("RELAX_FAULT"))
_passes = 0


def point(name: str) -> None:
    """Marks a point that `RELAX_FAULT` can name; does nothing in a normal run."""
    global _passes
    if _wanted is None or _wanted[0] != name:
        return
    _passes += 1
    if _passes != _wanted[1]:
        return
    if _wanted[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif _wanted[2] == "sleep":
        time.sleep(SLEEP_S)
    else:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"RELAX_FAULT at {name}")
