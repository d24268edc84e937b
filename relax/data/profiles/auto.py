"""Chooses a profile by the rows of a data set."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from relax.data.profiles.base import DataProfile, messages_of
from relax.data.profiles.emoji_think import MARKER
from relax.data.profiles.registry import AUTO, load_profile

LOOKED_AT = 1000  # rows
_STEP = re.compile(r"^Step 1:", re.MULTILINE)


def resolve_profile(name: str, rows: Sequence[Mapping[str, Any]]) -> tuple[DataProfile, str | None]:
    """The profile of a name; for `auto` also a note on the choice and its reason.

    Raises:
      ConfigError: there is no such profile.
    """
    if name != AUTO:
        return load_profile(name), None
    name, reason = choose_profile(rows)
    return load_profile(name), f"profile auto takes {name}: {reason}"


def choose_profile(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The name of the profile that fits more than half of the rows, and the reason.

    Args:
      rows: rows of any format; the first 1,000 are examined.

    >>> choose_profile([{"prompt": "2+2=", "completion": "Step 1: Add.\\n\\nAnswer: 4"}])
    ('regime3', "1 of 1 rows have answers in steps ('Step 1:') or a column 'steps'")
    """
    rows = list(rows[:LOOKED_AT])
    texts = [_answers(row) for row in rows]

    def share(signs) -> int:
        return sum(map(bool, signs))

    found = {
        "tool_use": (
            share(map(_has_tools, rows)),
            "have tools, or call them",
        ),
        "emoji_think": (
            share(any(t.startswith(MARKER[0]) for t in row) for row in texts),
            f"have answers that begin with {MARKER[0]}",
        ),
        "regime3": (
            share(
                row.get("steps") or any(map(_STEP.search, t))
                for row, t in zip(rows, texts, strict=True)
            ),
            "have answers in steps ('Step 1:') or a column 'steps'",
        ),
        "chain_of_thought": (
            share(
                row.get("reasoning") or any("<think>" in text for text in t)
                for row, t in zip(rows, texts, strict=True)
            ),
            "have answers with <think> or a column 'reasoning'",
        ),
    }
    taken = {name: sign for name, sign in found.items() if 2 * sign[0] > len(rows)}
    if "emoji_think" in taken:  # whose completions end at <think>
        taken.pop("chain_of_thought", None)
    if not taken:
        return "chat", f"of {len(rows)} rows too few show what another profile is for"
    reasons = [f"{count} of {len(rows)} rows {what}" for count, what in taken.values()]
    return "+".join(taken), " and ".join(reasons)


def _answers(row: Mapping[str, Any]) -> list[str]:
    """The assistant's texts in a row of any format; none if it is no conversation."""
    answers = [row[name] for name in ("chosen", "rejected") if row.get(name) is not None]
    messages = [m for answer in answers if isinstance(answer, list) for m in answer]
    if not answers:
        try:
            messages = messages_of(row)
        except (ValueError, KeyError, TypeError):
            messages = []
    # Rows are checked later, so an item may be no message.
    found = [m for m in messages if isinstance(m, Mapping)]
    said = [m.get("content") for m in found if m.get("role") == "assistant"]
    return [text for text in (*answers, *said) if isinstance(text, str)]


def _has_tools(row: Mapping[str, Any]) -> bool:
    columns = ("messages", "prompt", "completion", "chosen")
    lists = [row[name] for name in columns if isinstance(row.get(name), list)]
    messages = [m for messages in lists for m in messages if isinstance(m, Mapping)]
    called = any(m.get("tool_calls") or m.get("role") == "tool" for m in messages)
    return called or bool(row.get("tools"))
