"""The configuration of `relax export`."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from relax.config.options import option, section
from relax.config.rules import NoEffect, Rule, Values, needs
from relax.config.settings import Settings


@dataclass(slots=True, kw_only=True)
class ExportSection:
    """The model, and where it goes."""

    model_name_or_path: str | None = option(
        None, "Model directory or hub name, or an adapter directory, which is merged."
    )
    to: Literal["gguf", "hub"] = option(
        "gguf", "A GGUF file, or a repository of the Hugging Face hub."
    )
    type: Literal["f16", "bf16", "q8_0", "q4_0"] = option(
        "f16", "Type of the matrices; vectors are float32."
    )
    output_file: str | None = option(
        None, "The new file, which replaces one; none = DIR-TYPE.gguf beside the directory."
    )
    repo: str | None = option(None, "Repository on the hub: OWNER/NAME, or NAME of your own.")
    private: bool = option(True, "Whether a new repository is private.")
    base_model: str | None = option(
        None, "Hub name of an adapter's base, if it was trained from a directory."
    )
    dry_run: bool = option(False, "Say what would be uploaded, and upload nothing.")


def _problems(v: Values) -> Iterator[str]:
    if v["model_name_or_path"] is None:
        yield "model_name_or_path must name a model, got none"
    repo = v["repo"]
    if v["to"] == "hub" and repo is None:
        yield "repo must name a repository on the hub, such as OWNER/NAME, got none"
    if repo is not None and not re.fullmatch(r"([\w.-]+/)?[\w.-]+", repo):
        yield f"repo must be OWNER/NAME of letters, digits, '-', '_' and '.', got {repo!r}"


@dataclass(slots=True, kw_only=True)
class ExportConfig(Settings):
    """Write a GGUF file of a model for llama.cpp, or upload it to the hub."""

    algorithm: ClassVar[str] = "export"
    positional: ClassVar[str] = "model_name_or_path"
    examples: ClassVar[tuple[str, ...]] = (
        "DIR --to gguf --type q8_0",
        "DIR --to hub --repo OWNER/NAME --dry_run",
    )
    shared_rules: ClassVar[tuple[Rule, ...]] = (_problems,)
    no_effect: ClassVar[tuple[NoEffect, ...]] = (
        needs("type output_file", "to", "gguf"),
        needs("repo private base_model dry_run", "to", "hub"),
    )

    export: ExportSection = section(ExportSection)
