"""Prompts of files, as conversations and in the format of a profile."""

import sys
from collections.abc import Sequence

from relax import data
from relax.config.schema import RenderingConfig
from relax.data.profiles import apply_profile, resolve_profile


def as_conversations(rows: Sequence[dict]) -> list[dict]:
    """Rows whose text prompts are messages of a user."""
    return [
        row | {"prompt": [{"role": "user", "content": row["prompt"]}]}
        if isinstance(row.get("prompt"), str)
        else row
        for row in rows
    ]


def profiled(rendering: RenderingConfig, rows: data.Rows):
    """The profile, and the rows in its format."""
    profile, note = resolve_profile(rendering.name, rows.rows)
    if note is not None:
        print(note, file=sys.stderr)
    return profile, apply_profile(profile, rows, "prompts", rendering.system_prompt)
