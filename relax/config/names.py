"""Names of options: aliases, suggestions, and sentences that refuse unknown names."""

import difflib
from collections.abc import Iterable

from relax.config.foreign import advice

# Other accepted names of options, in flags and in files.
ALIASES = {"warmup_ratio": "warmup_steps", "resume_from_checkpoint": "resume"}


def normal(name: str) -> str:
    """The name with underscores: `learning-rate` is `learning_rate`."""
    return name.replace("-", "_")


def suggestion(name: str, known: Iterable[str], prefix: str = "", cutoff: float = 0.7) -> str:
    """Suggests the closest known name; an empty text if there is none.

    >>> suggestion("lerning_rate", ["learning_rate", "seed"], prefix="--")
    ' Did you mean --learning_rate?'
    """
    by_lower = {k.lower(): k for k in known}
    name = normal(name).lower()
    close = [k for k in by_lower if len(name) >= 4 and k.startswith(name)][:1]
    close = close or difflib.get_close_matches(name, by_lower, n=1, cutoff=cutoff)
    return f" Did you mean {prefix}{by_lower[close[0]]}?" if close else ""


def unknown(name: str, known: Iterable[str], prefix: str = "") -> str:
    """A sentence that refuses a name, with advice or a suggestion where there is one.

    >>> unknown("bf16", ["dtype"], prefix="--")
    '--bf16 is not a flag here: use --dtype bfloat16.'
    """
    known, what = list(known), "flag" if prefix else "field"
    if text := advice(name, known):
        return f"{prefix}{name} is not a {what} here: {text if prefix else text.replace('--', '')}."
    shown = prefix + name if name.isidentifier() else repr(name)
    return f"unknown {what} {shown}.{suggestion(name, known, prefix)}"


def ratio_problem(name: str, value: object) -> str | None:
    """Refuses a `warmup_ratio` of 1 or more, which would be read as a number of steps."""
    if name == "warmup_ratio" and isinstance(value, int | float) and not 0 <= value < 1:
        return (
            f"warmup_ratio must be at least 0 and below 1, got {value}. For steps use warmup_steps."
        )
    return None
