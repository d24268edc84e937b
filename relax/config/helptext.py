"""The text of `--help`: every flag by section, with its type, default and one line."""

import os
import shutil
import sys
import textwrap
from typing import Any

from relax.config.names import ALIASES
from relax.config.options import options
from relax.config.schema import Settings
from relax.config.values import type_name

_NOTES = (
    "--flag VALUE and --flag=VALUE are equal, and so are - and _ in a name. A true|false flag "
    "alone is true, --no_flag is false. Lists have commas: a,b (or are JSON). none leaves a value "
    "unset. A ratio stands for that part of all updates. Defaults stand in brackets."
)
_COMMAND = {
    "--config FILE": "JSON or YAML file of fields, by section or flat; flags override it.",
    "--print_config": "Print the resolved configuration as JSON and start nothing.",
    "--help, -h": "Print this.",
}


def help_text(
    config_class: type[Settings],
    script: str,
    width: int | None = None,
    colour: bool | None = None,
) -> str:
    """The help of a script.

    Args:
      config_class: whose fields are shown.
      script: name of the script.
      width: columns, held within 80 and 120; default: the terminal's.
      colour: whether to use ANSI styles; default: on a terminal that has not refused them.
    """
    width = shutil.get_terminal_size((100, 24)).columns if width is None else width
    width = min(max(width, 80), 120)
    colour = _colour() if colour is None else colour
    lines = [f"usage: python {script} [--flag VALUE ...]", "", config_class.__doc__ or "", ""]
    lines += [*textwrap.wrap(_NOTES, width), ""]
    lines.append(_bold("command line", colour))
    for left, text in _COMMAND.items():
        lines += _entry(left, text, width)
    previous = ""
    for option in options(config_class).values():
        if option.section != previous:
            lines += ["", _bold(option.section, colour)]
            previous = option.section
        text = f"{option.help} [{_default(option.default)}]"
        aliases = [f"--{alias}" for alias, name in ALIASES.items() if name == option.name]
        if aliases:
            text += f" Also {', '.join(aliases)}."
        lines += _entry(f"--{option.name} {type_name(option.type)}", text, width)
    return "\n".join(lines)


def _entry(left: str, text: str, width: int) -> list[str]:
    """One flag: name and type on the left, text on the right; a long left side has its own line."""
    left = "  " + left
    indent = 42 if width >= 100 else 34
    right = textwrap.wrap(text, width - indent)
    first = [] if len(left) + 2 <= indent else _between_choices(left, width)
    head = "" if first else left
    return first + [f"{head:{indent}}{right[0]}"] + [" " * indent + line for line in right[1:]]


def _between_choices(text: str, width: int) -> list[str]:
    """Breaks a|b|c where it is too long for a line."""
    lines = textwrap.wrap(text.replace("|", "| "), width, subsequent_indent=" " * 6)
    return [line.replace("| ", "|") for line in lines]


def _default(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(value) if isinstance(value, list) else str(value)


def _bold(text: str, colour: bool) -> str:
    return f"\x1b[1m{text}\x1b[0m" if colour else text


def _colour() -> bool:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") in (None, "dumb")
    return sys.stdout.isatty() and not plain
