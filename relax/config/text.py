"""Human-readable sizes, durations and numbers; shortened texts and lists."""

import math
import re
from collections.abc import Sequence
from typing import Any

# Control characters except tab and newline, and those that change the writing direction.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def format_bytes(nbytes: float) -> str:
    """A size in decimal units.

    >>> format_bytes(1_536_000_000), format_bytes(12_000_000), format_bytes(2_500)
    ('1.54 GB', '12 MB', '2.5 kB')
    >>> format_bytes(999_999_999), format_bytes(12)
    ('1.00 GB', '0.012 kB')
    """
    if nbytes >= 0.9995e9:
        return f"{nbytes / 1e9:.2f} GB"
    return f"{nbytes / 1e6:.3g} MB" if nbytes >= 0.9995e6 else f"{nbytes / 1e3:.3g} kB"


def format_seconds(seconds: float | None) -> str:
    """A duration in its two largest units.

    >>> [format_seconds(s) for s in (0.0312, 42.4, 3725, 93600, None)]
    ['0.031 s', '42 s', '1 h 2 min', '1 d 2 h', '–']
    """
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def format_number(value: float) -> str:
    """A number with at most four digits.

    >>> [format_number(v) for v in (0, 12345, 0.00002, 0.25, 1.5e7, -3, 999_999)]
    ['0', '12.3k', '2e-05', '0.25', '15M', '-3', '1M']
    """
    if not math.isfinite(value):
        return "–"
    for size, unit, shown_from in ((1e9, "G", 0.9995e9), (1e6, "M", 0.9995e6), (1e3, "k", 9999.5)):
        if abs(value) >= shown_from:
            return f"{value / size:.3g}{unit}"
    return f"{value:.4g}"


def quote(value: Any, limit: int = 80) -> str:
    """The `repr` of a value on one line, truncated to about `limit` characters.

    >>> quote("a" * 50, 10), quote([1, 2]), quote(list(range(100)), 20)
    ("'aaaaaaaaaa'... (50 characters)", '[1, 2]', 'a list of 100 items')
    """
    if isinstance(value, str | bytes):
        # Truncated before repr, which would copy a gigabyte.
        unit = "bytes" if isinstance(value, bytes) else "characters"
        more = f"... ({len(value)} {unit})" if len(value) > limit else ""
        return repr(value[:limit]) + more
    if isinstance(value, list | tuple | dict | set) and len(value) > limit:
        return f"a {type(value).__name__} of {len(value)} items"
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a huge number"  # Python refuses to print integers of thousands of digits
    try:
        text = repr(value)
    except Exception as error:  # a repr of the user's own
        text = f"<{type(value).__name__}, whose repr raises {type(error).__name__}>"
    return text if len(text) <= limit else text[:limit] + "..."


def join_some(names: Sequence[str], most: int = 4, separator: str = ", ") -> str:
    """The first names of a list on one line, and the number of the others.

    >>> join_some(["a", "b", "c", "d", "e", "f"])
    'a, b, c, d and 2 more'
    """
    shown = [name if name.isprintable() and name else repr(name) for name in names[:most]]
    shown = [name if len(name) <= 200 else f"{name[:200]}..." for name in shown]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(shown) + more


def shorten(text: str, limit: int) -> str:
    """A text without control characters; one of more than `limit` characters loses its middle.

    >>> shorten("abcdefghij", 4)
    'ab ... ij'
    """
    text = strip_control(text)
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}"


def strip_control(text: str) -> str:
    """Text without control characters, which a model may have generated.

    >>> strip_control("\\x1b[2Jall\\tis\\nwell\\x07") == "\\ufffd[2Jall\\tis\\nwell\\ufffd"
    True
    """
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def nan_to_null(value: Any) -> Any:
    """Replaces NaN and infinities, which JSON lacks, with None at any depth.

    >>> nan_to_null({"a": [1.0, float("nan")]})
    {'a': [1.0, None]}
    """
    if isinstance(value, dict):
        return {name: nan_to_null(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_null(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
