"""The model card of a run: README.md of its model directory, as the Hugging Face hub shows it.

It names no directory of the machine: of a path only its last part is written.
"""

import importlib.metadata
import platform
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

import relax
from relax.config.options import options
from relax.config.settings import ALGORITHMS
from relax.config.text import format_number
from relax.config.values import value_text
from relax.files import CARD, CARD_MARK, CURVES, atomic_write
from relax.monitor.curves import picture
from relax.monitor.run_files import Run
from relax.monitor.sections import charts_of
from relax.monitor.status import without_secrets

PICTURES = 6  # charts in the picture
CARD_BYTES = 1_000_000  # most bytes of a base model's card that are read
PACKAGES = ("jax", "flax", "optax", "transformers", "tokenizers", "numpy")
LICENCE = ("license", "license_name", "license_link")
# Flags that say where a run wrote, not what it trained.
PLACES: tuple[str, ...] = (
    "output_dir",
    "overwrite_output_dir",
    "resume",
    "allow_config_change",
    "run_name",
)
PLACES += ("compilation_cache_dir", "report_to", "callbacks", "coordinator", "process_id")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PATH = re.compile(r"(?<![\w:/.~-])(?:~?/|[A-Za-z]:\\)[^,;'\"\n]*")


def write_card(
    directory: str | Path, run: Run, metrics: Mapping[str, float], base: str | Path | None = None
) -> Path:
    """Writes README.md and the picture of its curves into a model directory.

    Args:
      directory: a model's or an adapter's directory.
      run: the run that made it.
      metrics: results of the model in it, by name.
      base: the directory of the model that was trained, whose card may name a licence.

    Returns:
      The path of README.md.
    """
    directory = Path(directory)
    curves = picture(charts_of(run)[:PICTURES])
    if curves:
        atomic_write(directory / CURVES, curves.encode(), sync=False)
    fields = metadata(
        run, licence_of(base), is_adapter=(directory / "adapter_config.json").exists()
    )
    text = f"---\n{_yaml(fields)}---\n\n{CARD_MARK}\n\n{body(run, metrics, fields, bool(curves))}"
    atomic_write(directory / CARD, text.encode(), sync=False)
    return directory / CARD


def metadata(run: Run, licence: Mapping[str, Any], *, is_adapter: bool = False) -> dict[str, Any]:
    """The fields that the hub reads: base model, data sets, licence, library, task, tags.

    Base model and data sets are named only if they come from the hub.
    """
    base = _model(run)
    found: dict[str, Any] = {}
    if base is not None and _is_hub_name(base):
        found |= {"base_model": base}
        found |= {"base_model_relation": "adapter" if is_adapter else "finetune"}
    sets = [
        name for name in _sets(run) if _is_hub_name(name) and not name.startswith("reasoning_gym")
    ]
    if sets:
        found["datasets"] = sets
    classifies = run.algorithm == "reward"
    return found | {
        **licence,
        "library_name": "peft" if is_adapter else "transformers",
        "model_name": run.name,
        "pipeline_tag": "text-classification" if classifies else "text-generation",
        "tags": ["relax", "jax", *([run.algorithm] if run.algorithm else [])],
    }


def body(run: Run, metrics: Mapping[str, float], fields: Mapping[str, Any], curves: bool) -> str:
    """The card below its metadata, in Markdown."""
    base, sets = _model(run), _sets(run)
    start = "a small model that was not trained before" if base is None else f"`{plain(base)}`"
    data = " and ".join(f"`{plain(name)}`" for name in sets) or "the demo task"
    step, tokens = run.status.get("step"), run.last("num_tokens")
    facts = {
        "algorithm": run.algorithm.upper(),
        "updates": f"{step:,}" if isinstance(step, int) else None,
        "tokens": None if tokens is None else f"{tokens:,.0f}",
        "precision": run.config.get("model", {}).get("dtype"),
        "licence of the base model": fields.get("license", "its card names none: look it up"),
    }
    if base is None:
        del facts["licence of the base model"]
    parts = [
        f"# {run.name}",
        f"This is {start}, trained with {run.algorithm.upper()} on {data} by ReLax "
        f"{relax.__version__}.",
        table(("", ""), [(name, value) for name, value in facts.items() if value]),
    ]
    if curves:
        parts.append(f"![Curves of the training]({CURVES})")
    parts += ["## Evaluation", _evaluation(metrics)]
    parts += ["## Flags", f"Flags that are not the default:\n\n```sh\n{command(run)}\n```"]
    parts += ["## Versions", table(("package", "version"), versions().items())]
    return "\n\n".join(parts) + "\n"


def _evaluation(metrics: Mapping[str, float]) -> str:
    rows = [(f"`{name}`", format_number(value)) for name, value in sorted(metrics.items())]
    return table(("metric", "value"), rows) if rows else "The run was not evaluated."


def table(head: tuple[str, str], rows: Iterable[tuple[str, Any]]) -> str:
    """A table in Markdown of two columns."""
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    lines += [f"| {a} | {str(b).replace('|', chr(92) + '|')} |" for a, b in rows]
    return "\n".join(lines)


def command(run: Run) -> str:
    """The command of the run, with the flags that are not the default."""
    config_class = ALGORITHMS.get(run.algorithm)
    words = []
    for name, option in options(config_class).items() if config_class else ():
        value = run.config.get(option.section, {}).get(option.field, option.default)
        if value == option.default or name in PLACES:
            continue
        words.append(f"--{name} {shlex.quote(plain(value_text(value)))}")
    return " \\\n    ".join([f"relax {run.algorithm}", *words])


def plain(text: str) -> str:
    """A text without passwords, access tokens, and the directories of absolute paths.

    >>> plain("/home/me/my rows.jsonl"), plain('{"file": "/home/me/x.py:f"}')
    ('my rows.jsonl', '{"file": "x.py:f"}')
    """
    return _PATH.sub(_last_part, without_secrets(text))


def _last_part(path: re.Match) -> str:
    kind = PureWindowsPath if "\\" in path[0] else PurePosixPath
    return kind(path[0]).name


def licence_of(base: str | Path | None) -> dict[str, Any]:
    """The licence in the card of a model directory; {} if there is none."""
    path = None if base is None else Path(base) / CARD
    if path is None or not path.is_file() or path.stat().st_size > CARD_BYTES:
        return {}
    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", path.read_text("utf-8", "replace"), re.S)
    try:
        fields = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    if not isinstance(fields, dict):
        return {}
    return {name: fields[name] for name in LICENCE if isinstance(fields.get(name), str)}


def versions() -> dict[str, str]:
    """Versions of Python, of ReLax and of the packages that a model depends on."""
    found = {"python": platform.python_version(), "relax-trainers": relax.__version__}
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}


def _yaml(fields: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True)
    return text


def _model(run: Run) -> str | None:
    return run.config.get("model", {}).get("model_name_or_path")


def _sets(run: Run) -> list[str]:
    """The names of the training sets, without weights."""
    name = run.config.get("data", {}).get("dataset_name")
    parts = name.split(",") if isinstance(name, str) else []
    return [re.sub(r":\d*\.?\d+$", "", part) for part in parts]


def _is_hub_name(name: str) -> bool:
    return bool(_HUB_NAME.fullmatch(name)) and not Path(name).exists()
