"""Generates the tables of docs/cli.md: `python -m relax.tools.reference docs/cli.md`."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from relax.config import (
    DistillConfig,
    DPOConfig,
    GRPOConfig,
    OnlineDPOConfig,
    PPOConfig,
    RewardModelConfig,
    SFTConfig,
)
from relax.config.foreign import ADVICE, BY_PREFIX, NEAREST_VALUES, RENAMED, SAME_VALUES
from relax.config.helptext import section_class
from relax.config.names import ALIASES
from relax.config.options import Option, options
from relax.config.settings import Settings
from relax.config.values import type_name, value_text
from relax.tools.evaluate.config import EvalConfig
from relax.tools.export.config import ExportConfig
from relax.tools.merge.config import MergeConfig
from relax.tools.plan.config import PlanConfig
from relax.tools.sample.config import SampleConfig
from relax.tools.serve.config import ServeConfig

ALGORITHMS = (
    SFTConfig,
    DPOConfig,
    RewardModelConfig,
    GRPOConfig,
    PPOConfig,
    DistillConfig,
    OnlineDPOConfig,
)
TOOLS = (SampleConfig, ServeConfig, PlanConfig, EvalConfig, MergeConfig, ExportConfig)
MARK = "<!-- From here on generated: python -m relax.tools.reference docs/cli.md -->\n"
PROGRAMS = {
    "data convert ROWS FILE": "Convert rows of other forms to conversations.",
    "gguf FILE DIR": "Convert a GGUF file to a Hugging Face model directory.",
    "report DIR": "Write the report page of a run, or a page that compares several.",
    "monitor DIR": "Watch a run from another terminal.",
    "lm_eval ...": "Run EleutherAI's lm_eval, which then knows `--model relax`.",
}


class Row(NamedTuple):
    """A flag of one or several commands, with the same type and help in each."""

    name: str
    type: str
    help: str


def updated(page: str) -> str:
    """The page with new tables after its mark; the text before it is written by hand."""
    head, mark, _ = page.partition(MARK)
    return head + mark + tables()


def tables() -> str:
    """Tables of all flags of all commands, and of flags and values of other trainers."""
    lines = ["", "## Commands", "", "| command | |", "|---|---|"]
    lines += [f"| `relax {c.algorithm}` | {c.__doc__} |" for c in (*ALGORITHMS, *TOOLS)]
    lines += [f"| `relax {usage}` | {text} |" for usage, text in PROGRAMS.items()]
    lines += ["", "## Training", "", "Flags without a list of commands are flags of all seven.", ""]
    lines += _sections(ALGORITHMS)
    lines += ["## Defaults of the demo task", "", "| command | defaults |", "|---|---|"]
    for config in ALGORITHMS:
        demo = [f"{name} {_code(value)}" for name, value in config.demo.items()]
        lines.append(f"| {config.algorithm} | {', '.join(demo)} |")
    for tool in TOOLS:
        lines += ["", f"## relax {tool.algorithm}", "", *_sections((tool,))]
    return "\n".join(lines + _foreign() + _foreign_values()).rstrip() + "\n"


def _sections(configs: Iterable[type[Settings]]) -> list[str]:
    """A table of flags for each section; flags that differ between commands have several rows."""
    configs = list(configs)
    found: dict[str, dict[Row, dict[str, Option]]] = {}
    docs: dict[str, str] = {}
    for config in configs:
        for option in options(config).values():
            row = Row(option.name, type_name(option.type), option.help)
            found.setdefault(option.section, {}).setdefault(row, {})[config.algorithm] = option
            docs.setdefault(option.section, section_class(config, option.section).__doc__ or "")
    lines = []
    for name, rows in found.items():
        lines += [f"### {name}", "", docs[name], "", "| flag | default | |", "|---|---|---|"]
        lines += [_row(row, by_command, len(configs)) for row, by_command in rows.items()]
        lines.append("")
    return lines


def _row(row: Row, by_command: Mapping[str, Option], commands: int) -> str:
    defaults: dict[str, list[str]] = {}
    for command, option in by_command.items():
        defaults.setdefault(_code(option.default), []).append(command)
    default = " ".join(
        text if len(defaults) == 1 else f"{text} ({', '.join(names)})"
        for text, names in defaults.items()
    )
    only = f" ({', '.join(by_command)})" if len(by_command) < commands else ""
    also = "".join(f" Also `--{a}`." for a, name in ALIASES.items() if name == row.name)
    kind = row.type.replace("|", "\\|")
    return f"| `--{row.name} {kind}`{only} | {default} | {row.help}{also} |"


def _code(value: object) -> str:
    return f"`{value_text(value)}`"


def _foreign() -> list[str]:
    """The table of flags of other libraries, one row per advice."""
    advice = {name: f"use --{' or --'.join(ours.split())}" for name, ours in RENAMED.items()}
    advice |= ADVICE | {f"{prefix}...": text for prefix, text in BY_PREFIX.items()}
    names: dict[str, list[str]] = {}
    for name, text in sorted(advice.items()):
        names.setdefault(text, []).append(f"`{name}`")
    lines = ["", "## Flags of TRL and transformers", ""]
    lines += [
        "Flags that have another name here, or no counterpart, are refused with this advice.",
        "",
    ]
    lines += ["| flags | advice |", "|---|---|"]
    lines += [f"| {', '.join(flags)} | {text} |" for text, flags in names.items()]
    return lines


def _foreign_values() -> list[str]:
    """The table of values of other libraries, one row per option and value here."""
    lines = ["", "## Values of TRL and transformers", ""]
    lines += [
        "Values that mean the same are accepted; others are refused and the nearest is named."
    ]
    lines += ["", "| values | here |", "|---|---|"]
    for table, word in ((SAME_VALUES, "the same as"), (NEAREST_VALUES, "refused; the nearest is")):
        for option, values in table.items():
            names: dict[str, list[str]] = {}
            for name, ours in values.items():
                names.setdefault(ours, []).append(f"`{name.replace('*', '...')}`")
            lines += [f"| `--{option}` {', '.join(n)} | {word} {o} |" for o, n in names.items()]
    return lines


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(updated(file.read_text(encoding="utf-8")), encoding="utf-8")
