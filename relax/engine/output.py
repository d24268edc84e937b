"""Messages of a run, and the files that it writes besides checkpoints and metrics."""

import shlex
import warnings
from pathlib import Path

import jax

from relax.config import TrainerConfig
from relax.config.cli import program_words
from relax.config.watch_rules import best_metric, is_greater_better
from relax.errors import ConfigError
from relax.files import atomic_write, json_object, list_steps, write_json
from relax.models.quantization import is_quantized
from relax.monitor.run_files import read_lines


def resume_command(config: TrainerConfig, directory: Path) -> str:
    """The shell command that resumes the run in a directory."""
    words = program_words(type(config))
    return shlex.join([*words, "--config", str(directory / "config.json"), "--resume", "auto"])


def show_how_to_resume(console, steps: list[int], command: str) -> None:
    """Prints the last saved step of a stopped run, and the resume command."""
    saved = f"step {steps[-1]} is saved" if steps else "nothing was saved"
    console.print(f"stopped; {saved}. To {'resume' if steps else 'start over'}:")
    console.print(f"  {command}", markup=False)


def how_to_recover(steps: list[int], command: str, first: str = "make room") -> str:
    """Advice for a run that cannot write: its newest checkpoint and the resume command."""
    kept = f"Checkpoint {steps[-1]} is intact" if steps else "No checkpoint was saved"
    return f"{kept}; {first} and run: {command}"


def show_plan(console, config: TrainerConfig, state, steps: int, plan: str) -> None:
    """Prints the number of trained parameters and updates, and the device.

    Args:
      plan: the composition of an update.
    """
    trained, frozen = (
        sum(leaf.size for leaf in jax.tree.leaves(tree, is_leaf=is_quantized))
        for tree in (state.params, state.frozen)
    )
    of_all = f"{trained:,} of {trained + frozen:,}" if frozen else f"{trained:,}"
    console.print(
        f"training {of_all} parameters for {steps:,} updates of {plan} on "
        f"{jax.devices()[0].device_kind}, {config.model.dtype}"
    )


def show_summary(console, seconds: float, metrics: dict, headline, paths: dict[str, Path]) -> None:
    """Prints the summary of a run: the metrics named in `headline`, and output paths."""
    console.print(f"done in {seconds:.0f} s")
    for name in headline:
        if name in metrics:
            console.print(f"  {name:20} {metrics[name]:.4f}")
    for name, path in paths.items():
        console.print(f"  {name:20} {path}", markup=False)


def last_evaluation(metrics_file: Path) -> dict[str, float]:
    """Metrics of the last evaluation, from the file, since a resumed run may not repeat it."""
    evaluations = [
        found
        for record in read_lines(metrics_file)
        if (found := {n: v for n, v in record.items() if n.startswith("eval_")})
    ]
    return evaluations[-1] if evaluations else {}


def copy_metrics(old_run: Path, directory: Path) -> None:
    """Copies metrics.jsonl of the resumed run into a directory that has none."""
    source, target = old_run / "metrics.jsonl", directory / "metrics.jsonl"
    if source.is_file() and not target.exists():
        atomic_write(target, source.read_bytes())


def best_checkpoint(config: TrainerConfig, directory: Path) -> Path | None:
    """The checkpoint with the best evaluation, else the newest; None if none was saved.

    That is the one that the run kept as its best, else the best of those that were evaluated at
    their step.
    """
    kept = list_steps(directory / "best")
    if kept:
        return directory / "best" / str(kept[-1])
    saved = list_steps(directory / "checkpoints")
    values = config.flat()
    metric = best_metric(values, config.algorithm)
    found = {
        record["step"]: record[metric]
        for record in read_lines(directory / "metrics.jsonl")
        if record.get(metric) is not None and record.get("step") in saved
    }
    if found:
        pick = max if is_greater_better(values, metric) else min
        saved = [pick(found, key=found.__getitem__)]
    return directory / "checkpoints" / str(saved[-1]) if saved else None


def check_same_data(config: TrainerConfig, digest: str, old_run: Path) -> None:
    """Checks that a resumed run trains on the same tokens as before.

    Raises:
      ConfigError: they differ, with both digests; or the digest of before cannot be read.
    """
    file = old_run / "data.json"
    if "dataset_name" in config.output.allow_config_change:
        return
    if not file.exists():
        warn_unchecked(file, "data")
        return
    before = _old_digest(config, file)
    if digest != before:
        raise ConfigError(
            "a resumed run must train on the same data as before, but the tokens of "
            f"'{config.data.dataset_name or 'the demo set'}' have changed "
            f"(digest {before} -> {digest}). Restore the files, or pass "
            "--allow_config_change dataset_name to continue anyway."
        )


def _old_digest(config: TrainerConfig, file: Path) -> str:
    try:
        found = json_object(file.read_bytes())
        if isinstance(digest := found.get("digest"), str):
            return digest
        reason = "it has no digest"
    except OSError as error:
        reason = str(error.strerror or error)
    except ValueError as error:
        reason = str(error)
    directory = Path(config.output.output_dir)
    flag = "--allow_config_change dataset_name"
    resumable = (directory / "config.json").is_file()
    command = f": {resume_command(config, directory)} {flag}" if resumable else f" with {flag}."
    raise ConfigError(
        f"'{file}' cannot be read ({reason}), so it is unknown whether the run resumes on the same "
        f"data. Restore the file, or resume without this check{command}"
    )


def warn_unchecked(file: Path, what: str) -> None:
    """Warns that a file of a resumed run is missing, which says what must not change."""
    warnings.warn(
        f"'{file}' is missing: it is not checked that the run resumes with the same {what}.",
        stacklevel=3,
    )


def write_config(config: TrainerConfig, directory: Path, data) -> None:
    """Writes config.json, which reproduces the run, and data.json, the data report."""
    reports = {name: report.to_dict() for name, report in data.reports.items()}
    write_json(directory / "data.json", {"digest": data.digest, "reports": reports})
    saved = config.replace(resume="never", overwrite_output_dir=False, allow_config_change=[])
    write_json(directory / "config.json", saved.to_dict())
