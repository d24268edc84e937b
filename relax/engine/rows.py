"""Rows of a run: read from files, datasets or Python, and converted by the profile."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from relax import data
from relax.config import TrainerConfig, resolve_steps
from relax.data import Rows, profiles
from relax.data.cache import MIN_BYTES, ExampleCache
from relax.data.mixing import Mixture, parse_sources
from relax.data.order import epoch_order
from relax.data.sources import read_sources as read_sources_of
from relax.errors import ConfigError, ErrorList

AUTO = "auto"


def source_rows(config: TrainerConfig, given=None):
    """Training rows, and evaluation rows: one set, several by name, or None.

    `given` replaces both.
    """
    d = config.data
    if given is None and d.dataset_name is None:
        return data.arithmetic_rows("train"), data.arithmetic_rows("test")
    train_source, eval_source = given or (d.dataset_name, d.eval_dataset_name)
    options, split = d.dataset_kwargs, d.dataset_test_split
    limits, stored_from = limits_of(config), _stored_from(config)
    found, train, sets = ErrorList(), None, {}
    with found.catch():
        train = _training_rows(d, train_source, limits, stored_from)
    if eval_source is not None:
        with found.catch():
            named = named_sets(eval_source, split)
            for name, source in ({"": eval_source} if named is None else named).items():
                with found.catch():
                    sets[name] = data.read_rows(
                        source, split, limits=limits, stored_from=stored_from
                    )
    found.raise_all()
    if sets:
        return train, sets[""] if list(sets) == [""] else sets
    if d.test_size:
        return _split(train, resolve_steps(d.test_size, len(train)), data_seed(config))
    if config.inference.eval_strategy == "no" and not config.inference.eval_on_start:
        return train, None
    has_splits = given is None and train.mixture is None
    is_whole = d.dataset_name is None or not has_splits or Path(d.dataset_name).is_file()
    if is_whole and config.inference.eval_tasks:
        return train, None
    if is_whole:
        raise ConfigError(
            "eval_strategy and eval_on_start need evaluation rows: pass --eval_dataset_name "
            "FILE, or --test_size 0.1 to hold out a tenth of the rows."
        )
    return train, data.read_rows(
        d.dataset_name, split, d.dataset_config, options, limits, stored_from
    )


def _stored_from(config: TrainerConfig) -> int | None:
    """Bytes of files from which on rows stay in their files, and their tokens are kept."""
    flat = config.flat()
    asked = flat.get("dataset_cache_dir")
    if asked is None or flat.get("curriculum") is not None:  # it tells rows apart as objects
        return None
    return MIN_BYTES if asked == AUTO else 0


def example_cache(config: TrainerConfig, console: Console) -> ExampleCache | None:
    """The tokenised rows of this and of earlier runs; None: they are not kept."""
    asked = config.flat().get("dataset_cache_dir")
    if asked is None:
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = home / "relax" / "data" if asked == AUTO else Path(asked)
    return ExampleCache(directory, lambda line: console.print(line, markup=False))


def _training_rows(d, source, limits: data.Limits, stored_from: int | None) -> Rows:
    """The rows of `dataset_name`, or of Python, of one source or several."""
    split, options = d.dataset_train_split, d.dataset_kwargs
    sources = parse_sources(source) if isinstance(source, str) else None
    if sources is None:
        if d.mixing_strategy is not None:
            raise ConfigError(
                f"mixing_strategy {d.mixing_strategy} mixes several sources, and dataset_name is "
                "one: name them as FILE:WEIGHT,FILE:WEIGHT, or leave it out."
            )
        return data.read_rows(source, split, d.dataset_config, options, limits, stored_from)
    if d.dataset_config is not None:
        raise ConfigError(
            f"dataset_config is of a single data set, got {d.dataset_config!r} and several "
            "sources: name the directories of the configurations instead."
        )
    return read_sources_of(sources, d.mixing_strategy, split, options, limits, stored_from)


def named_sets(source, split: str) -> dict | None:
    """Several evaluation sets by name; None if `source` is a single one.

    Args:
      source: `easy=a.jsonl,hard=b.jsonl`, or a mapping of names to rows; a mapping with the key
        `split` is a single dataset of splits.

    Raises:
      ConfigError: a name is repeated or is not a word.

    >>> named_sets("easy=a.jsonl,hard=b.jsonl", "test")
    {'easy': 'a.jsonl', 'hard': 'b.jsonl'}
    """
    if isinstance(source, Mapping):
        return None if split in source else dict(source)
    if not isinstance(source, str) or "=" not in source or Path(source).exists():
        return None
    sets: dict[str, str] = {}
    for part in source.split(","):
        name, equals, path = part.partition("=")
        if not (name.isidentifier() and equals and path) or name in sets:
            raise ConfigError(
                "eval_dataset_name must be a dataset, or several as name=FILE,name=FILE with "
                f"distinct names that are words, got {source!r}."
            )
        sets[name] = path
    return sets


def _split(rows: data.Rows, size: int, seed: int) -> tuple[data.Rows, data.Rows]:
    """Holds out `size` random rows; both parts keep the file's order."""
    if size >= len(rows):
        raise ConfigError(
            f"test_size must leave rows to train on, got {size} of {len(rows)} rows. Lower it."
        )
    held_out = np.sort(epoch_order(len(rows), seed, 0)[:size])
    is_kept = np.ones(len(rows), bool)
    is_kept[held_out] = False
    kept = np.flatnonzero(is_kept)
    if rows.mixture is None:
        return rows.select(kept), rows.select(held_out)
    evaluation = dataclasses.replace(rows, mixture=rows.mixture.once())
    return rows.select(kept), evaluation.select(held_out)


def limits_of(config) -> data.Limits:
    """The limits on rows and chat templates of any configuration that has them."""
    return data.Limits(**dataclasses.asdict(config.limits))


def data_seed(config: TrainerConfig) -> int:
    """The seed for shuffling rows."""
    h = config.hyperparams
    return h.seed if h.data_seed is None else h.data_seed


@dataclasses.dataclass(frozen=True)
class Sources:
    """The rows of a run by set, after its profile.

    Attributes:
      kind: the kind of rows, see `relax.data.profiles.apply_profile`.
      train: training rows.
      evaluation: evaluation rows by the name of the set; "" for a single set.
      profile: the profile that converted the rows.
      system_prompt: the system prompt for rows that got none from the profile.
      stop_sequences: texts that end sampled completions.
      cache: tokenised rows of earlier runs, where they are kept.
    """

    kind: profiles.Kind
    train: Rows
    evaluation: dict[str, Rows]
    profile: profiles.DataProfile
    system_prompt: str | None
    stop_sequences: tuple[str, ...]
    cache: ExampleCache | None = None

    @property
    def sets(self) -> dict[str, Rows]:
        """All sets by title, the training set first."""
        titles = {_title(self.kind, "evaluation", name): name for name in self.evaluation}
        evaluation = {title: self.evaluation[name] for title, name in titles.items()}
        return {self.training: self.train} | evaluation

    @property
    def training(self) -> str:
        """The title of the training set."""
        return _title(self.kind, "training")

    def eval_loaders(self, loaders: dict[str, Any]) -> Any:
        """The `eval_loader` of `Trainer.train`, from loaders by title."""
        found = {name: loaders[_title(self.kind, "evaluation", name)] for name in self.evaluation}
        return found[""] if list(found) == [""] else found or None


_NOUNS = {"completions": "data", "preferences": "pairs", "prompts": "prompts"}


def _title(kind: profiles.Kind, use: str, name: str = "") -> str:
    return f"{use} {_NOUNS[kind]}" + f" ({name})" * bool(name)


def read_sources(
    config: TrainerConfig, kind: profiles.Kind, console: Console, rows=None, demo_rows=None
) -> Sources:
    """Reads the rows of a run and converts them by its profile.

    Args:
      kind: the kind of rows to read.
      console: shows the chosen profile, and warns about completions with a stop sequence.
      rows: training and evaluation rows, instead of the configured datasets.
      demo_rows: converts rows of the demo task to the form that the algorithm reads.

    Raises:
      RelaxError: a file cannot be read, or the profile cannot read a row.
    """
    is_demo, name = config.data.dataset_name is None, config.profile.name
    if is_demo and name != profiles.DEFAULT:
        raise ConfigError(
            f"profile {name} needs a dataset: the demo task is plain sums. Pass --dataset_name."
        )
    train, evaluation = source_rows(config, rows)
    if not isinstance(evaluation, dict):
        evaluation = {} if evaluation is None else {"": evaluation}
    asked, base = config.profile.stop_sequences, config.profile.system_prompt
    if is_demo:
        profile, note = profiles.load_profile(profiles.DEFAULT), None
        change = demo_rows or (lambda rows: rows)
    else:
        profile, note = profiles.resolve_profile(name, train.rows)

        def change(rows):
            return profiles.apply_profile(profile, rows, kind, base)

    stops = tuple(profile.get_stop_sequences() if asked is None else asked)
    train = change(train)
    if note is not None:
        console.print(note, markup=False)
    if not is_demo:
        _report_early_stops(console, train, stops)
    return Sources(
        kind,
        train,
        {name: change(rows) for name, rows in evaluation.items()},
        profile,
        profiles.remaining_system_prompt(profile, base),
        stops,
        example_cache(config, console),
    )


def _report_early_stops(console: Console, rows: Rows, stops: tuple[str, ...]) -> None:
    for stop, count in profiles.early_stops(rows.rows, stops).items():
        console.print(
            f"note: {count} of {len(rows)} completions contain the stop sequence {stop!r} "
            "before their end, where sampling would stop; --stop_sequences sets others",
            style="yellow",
            markup=False,
        )


@dataclasses.dataclass(frozen=True)
class Data:
    """A run's data, ready for training and evaluation.

    Attributes:
      train: the loader of training items.
      eval: the evaluation loader, several by name, or None.
      reports: a report on each set by title; each has `to_dict()`.
      digest: a checksum of the rows of all sets, which must be the same on resume and in all
        processes.
      plan: the composition of an update, for messages.
      show: prints the reports.
      updates_per_item: updates per item of `train`.
      stop_sequences: texts that end sampled completions.
      fill_batch: adds to an item of `train` the fields that callbacks add in a run.
    """

    train: Any
    eval: Any
    reports: dict[str, Any]
    digest: str
    plan: str
    show: Callable[[Console], None]
    updates_per_item: int = 1
    stop_sequences: tuple[str, ...] = ()
    fill_batch: Callable[[Any], Any] = lambda item: item

    @property
    def mixture(self) -> Mixture | None:
        """How rows of several sources are mixed in `train`; None: there is one source."""
        return getattr(self.train, "mixture", None)

    @property
    def source_names(self) -> tuple[str, ...]:
        return () if self.mixture is None else self.mixture.names

    @property
    def updates_per_epoch(self) -> int:
        return self.updates_per_item * len(self.train)


def rows_plan(config: TrainerConfig) -> str:
    """The composition of an update in rows, for messages."""
    h = config.hyperparams
    rows = h.per_device_train_batch_size * h.gradient_accumulation_steps
    return f"{rows} rows ({h.per_device_train_batch_size} x {h.gradient_accumulation_steps})"
