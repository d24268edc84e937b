"""The text of `--help`: every flag by section, with its type, one line of help and its default."""

import os
import shutil
import sys
import textwrap

from relax.config.names import ALIASES
from relax.config.options import options
from relax.config.schema import Settings
from relax.config.values import type_name, value_text

_NOTES = (
    "Write --flag VALUE or --flag=VALUE, with - or _ in names. A true|false flag alone means true, "
    "--no_flag means false. Lists are a,b or JSON; none unsets a value. Defaults are in brackets."
)
_COMMAND = {
    "--config FILE": "JSON or YAML file of options, by section or flat; flags override it.",
    "--print_config": "Print the resolved configuration as JSON, and end.",
    "--help, -h": "Print this help, and end.",
}


def help_text(
    config_class: type[Settings], program: str, width: int | None = None, colour: bool | None = None
) -> str:
    """The text that `--help` prints.

    Args:
      config_class: the configuration to show.
      program: the command that starts it.
      width: columns, from 80 to 120; default: the terminal's.
      colour: whether to use ANSI styles; default: on a terminal, unless NO_COLOR is set.
    """
    width = shutil.get_terminal_size((100, 24)).columns if width is None else width
    width = min(max(width, 80), 120)
    colour = _colour() if colour is None else colour
    word = "MODEL " * bool(config_class.positional)
    usage = f"usage: {program} {word}[--flag VALUE ...]"
    lines = [usage, "", config_class.__doc__ or "", ""]
    lines += [*textwrap.wrap(_NOTES, width), ""]
    if config_class.examples:
        lines.append(_bold("examples", colour))
        for example in config_class.examples:
            lines += _command(f"{program} {example}", width)
        lines.append("")
    lines.append(_bold("command line", colour))
    for left, text in _COMMAND.items():
        lines += _entry(left, text, width)
    previous = ""
    for option in options(config_class).values():
        if option.section != previous:
            previous = option.section
            doc = section_class(config_class, previous).__doc__ or ""
            lines += ["", f"{_bold(previous, colour)}: {doc}"]
        text = f"{option.help} [{value_text(option.default)}]"
        aliases = [f"--{alias}" for alias, name in ALIASES.items() if name == option.name]
        if aliases:
            text += f" Also {', '.join(aliases)}."
        lines += _entry(f"--{option.name} {type_name(option.type)}", text, width)
    return "\n".join(lines)


def section_class(config_class: type[Settings], name: str) -> type:
    """The class of a section."""
    return type(getattr(config_class(), name))


def _command(text: str, width: int) -> list[str]:
    """A shell command, broken between its flags."""
    text = text.replace(" --", "\0--").replace(" ", "\1").replace("\0", " ")
    lines = textwrap.wrap(
        text, width - 2, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False
    )
    return [line.replace("\1", " ") + " \\" * (line is not lines[-1]) for line in lines]


def _entry(left: str, text: str, width: int) -> list[str]:
    """One flag: name and type on the left, text on the right; a long left side has its own line."""
    left = "  " + left
    indent = 42 if width >= 100 else 34
    right = textwrap.wrap(text, width - indent)
    first = [] if len(left) + 2 <= indent else _between_choices(left, width)
    head = "" if first else left
    return first + [f"{head:{indent}}{right[0]}"] + [" " * indent + line for line in right[1:]]


def _between_choices(text: str, width: int) -> list[str]:
    """Breaks a|b|c if it is too long for a line."""
    lines = textwrap.wrap(text.replace("|", "| "), width, subsequent_indent=" " * 6)
    return [line.replace("| ", "|") for line in lines]


def _bold(text: str, colour: bool) -> str:
    return f"\x1b[1m{text}\x1b[0m" if colour else text


def _colour() -> bool:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") in (None, "dumb")
    return sys.stdout.isatty() and not plain
