"""Tools and environments whose description raises; hints are texts here, read late."""

from __future__ import annotations

import sys


def unknown_type(a: NoSuchType) -> int:  # noqa: F821
    """Does nothing.

    Args:
      a: a value
    """
    return 0


class Exits:
    """An environment that exits when it is made."""

    def __init__(self):
        sys.exit(3)

    def reset(self, row):
        return None


class RaisingProperty:
    """An environment of methods with a property that is not ready."""

    @property
    def state(self):
        raise RuntimeError("not ready")

    def reset(self, **row):
        return None

    def look(self) -> str:
        """Looks around."""
        return ""
