"""Reads rows from files, directories, hub names and Python objects, with the place of each row."""

import itertools
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from relax.data.arrow import shape_of_features, without_aligned_nulls
from relax.data.digest import files_key
from relax.data.examples import checksum
from relax.data.limits import DEFAULT, Limits, check_files
from relax.data.mixing import Mixture
from relax.data.normalize import normalize
from relax.data.readers import READERS, SUFFIXES, FileRows, read_file
from relax.data.stored import SUFFIXES as STORED
from relax.data.stored import Selected, StoredRows
from relax.data.tasks import is_task, task_rows_and_faults
from relax.errors import ConfigError, DataError

MOST_UNCOUNTED = 1_000_000  # rows of an iterable without a length
_SPLITS = re.compile(r"(train|test|validation|valid|val|eval|dev)([-_.\d].*)?")
_SHARD = re.compile(r"-(\d+)-of-(\d+)$")
# Metadata written by the `datasets` library, without rows.
_CACHE = re.compile(r"cache-.*\.arrow")
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Rows:
    """Rows in their normal form.

    Attributes:
      rows: one dict each.
      origin: `origin(i)` is the place of row i for messages, such as "file:line".
      notes: what was normalised, for the report.
      mixture: how they are mixed, where they are of several sources.
      key: a digest of the files that they are read from; None: they are changed, or of no files.
    """

    rows: Sequence[dict]
    origin: Callable[[int], str]
    notes: tuple[str, ...] = ()
    mixture: Mixture | None = None
    key: str | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def firsts(self) -> list[int]:
        """The first row of each source."""
        sizes = (len(self.rows),) if self.mixture is None else self.mixture.sizes
        return [sum(sizes[:i]) for i in range(len(sizes))]

    def select(self, chosen: Sequence[int] | np.ndarray) -> "Rows":
        """Some of the rows."""
        mixture = None if self.mixture is None else self.mixture.kept(chosen)
        rows = Selected(self.rows, chosen)
        key = self.key and f"{self.key}/{checksum(np.asarray(chosen, np.int64)):08x}"

        def origin(i: int) -> str:
            return self.origin(int(chosen[i]))

        kept = [*rows] if isinstance(self.rows, list) else rows
        return Rows(kept, origin, self.notes, mixture, key)


def read_rows(
    dataset,
    split: str = "train",
    config: str | None = None,
    options: Mapping | None = None,
    limits: Limits = DEFAULT,
    stored_from: int | None = None,
) -> Rows:
    """Reads a data set from any source and normalises its rows.

    Args:
      dataset: a .jsonl, .json, .parquet, .csv, .tsv or .txt file; a directory of them (but for
        .txt), or of `datasets.save_to_disk`; a hub name; the name of a task, `reasoning_gym/...`;
        a list or other iterable of dicts (a `datasets.Dataset` is one); a mapping of split names to
        such iterables.
      split: name of the split. In a directory, the files named after it (train.jsonl, or
        train-00000-of-00002.parquet); if no file is named after a split, all are `train`. A
        single file is any split, but a file named after `train` is no evaluation split.
      config: a subdirectory, which holds a configuration of a hub data set.
      options: options of a task, see `relax.data.tasks.task_rows`.
      limits: limits on rows and files.
      stored_from: bytes of all files from which on their rows stay in them, and are read again for
        every use; of `relax.data.stored.SUFFIXES` only. None: all rows are held in memory.

    Raises:
      DataError: as "file:line: reason" if a row is broken, or nothing can be read.
      ConfigError: options are given, but the data set is no task.
    """
    if is_task(dataset):
        if config is not None:
            raise ConfigError(
                f"{dataset!r} has no configurations, got {config!r}: pass dataset_kwargs instead."
            )
        made, faults = task_rows_and_faults(dataset, split, options)
        read = _python_rows(made, split, limits)
        return Rows(read.rows, read.origin, (*faults, *read.notes))
    if options:
        raise ConfigError(
            f"dataset_kwargs are options of reasoning_gym tasks, got {dict(options)} for a data "
            "set that is none. Leave them out."
        )
    is_named = isinstance(dataset, str | Path)
    if config is not None and not (is_named and not Path(dataset).is_file()):
        raise ConfigError(
            "dataset_config names a subdirectory of a data set, and a file or rows from Python "
            f"have none, got {config!r}. Leave it out."
        )
    if not is_named:
        return _python_rows(dataset, split, limits)
    path = Path(dataset)
    if path.is_file():
        files = [_single_file(path, split)]
    elif path.is_dir():
        files = split_files(path, split, config)
    elif path.exists():
        raise DataError(
            f"{str(path)!r} is a pipe or a device, and rows are read more than once: write them to "
            "a .jsonl file, or train on a relax.data.StreamLoader."
        )
    else:
        files = split_files(_download(str(dataset)), split, config)
    return _file_rows(files, str(dataset), limits, stored_from)


def _file_rows(files: list[Path], name: str, limits: Limits, stored_from: int | None) -> Rows:
    names = sorted({file.name for file in files if not _SHARD.search(file.stem)})
    notes = (f"the split is read from {', '.join(names)}",) if len(names) > 1 else ()
    sizes = [file.stat().st_size for file in files]
    is_large = stored_from is not None and sum(sizes) >= stored_from
    if is_large and all(file.suffix in STORED for file in files):
        stored = StoredRows(files, limits)  # first, since it refuses files that are changed later
        return Rows(stored, stored.origin, notes, key=files_key(files, limits))
    key = files_key(files, limits) if is_large else None
    check_files(sizes, name, limits)
    joined = _join([(file, read_file(file, limits)) for file in files])
    rows, changes = normalize([*joined.rows], joined.origin, limits)
    return Rows(rows, joined.origin, (*notes, *changes), key=key)


def split_files(directory: Path, split: str, config: str | None = None) -> list[Path]:
    """The data files of one split, sorted by name."""
    if config is not None:
        directory = directory / config
        if not directory.is_dir():
            raise DataError(
                f"there is no configuration {config!r}: {str(directory)!r} is no directory."
            )
    files = [
        path
        for path in sorted(directory.rglob("*"))
        if path.suffix in SUFFIXES
        and path.is_file()
        and path.name not in _METADATA
        and not _CACHE.fullmatch(path.name)
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    ]
    if not files:
        raise DataError(
            f"no .jsonl, .json or .parquet file in {str(directory)!r}, nor one of "
            f"{', '.join(SUFFIXES)}."
        )
    names = {path: _split_name(path, directory) for path in files}
    # As in `datasets`: the part of a shard's name before its number is its split
    # (train_sft-00000-of-00002); other names may have a suffix (train_2024).
    chosen = [path for path in files if names[path] == split] or [
        path
        for path in files
        if not _SHARD.search(path.stem) and re.match(re.escape(split) + r"[-_.\d]", names[path])
    ]
    if not chosen and split == "train" and not any(map(_SPLITS.fullmatch, names.values())):
        chosen = files
    if not chosen:
        found = ", ".join(sorted(set(names.values())))
        raise DataError(
            f"no split {split!r} in {str(directory)!r}: it has {found}. Name one with "
            "dataset_train_split or dataset_test_split."
        )
    folders = sorted({_config_folder(path, directory, split) for path in chosen})
    if len(folders) > 1:
        raise DataError(
            f"split {split!r} is in several folders of {str(directory)!r}: "
            f"choose one with dataset_config: {', '.join(folders)}."
        )
    _check_shards(chosen)
    return chosen


def _check_shards(files: list[Path]) -> None:
    """Refuses a split of which a file is missing, as after a download that has not finished."""
    there: dict[tuple[Path, int], set[int]] = {}
    for path in files:
        if match := _SHARD.search(path.stem):
            whole = path.with_name(path.stem[: match.start()])
            there.setdefault((whole, int(match[2])), set()).add(int(match[1]))
    for (whole, count), numbers in there.items():
        missing = sorted(set(range(count)) - numbers)
        if missing:
            raise DataError(
                f"'{whole}' has {len(numbers)} of {count} files, file {missing[0]:05d} of "
                f"{count:05d} is missing: download it, or name a single file to train on it alone."
            )


def _split_name(path: Path, directory: Path) -> str:
    """The split of a file: `train` for `train-00000-of-00002.parquet` and `train/0000.parquet`."""
    stem = _SHARD.sub("", path.stem)
    folder = path.parent.name if path.parent != directory else ""
    return folder if _SPLITS.fullmatch(folder) and not _SPLITS.fullmatch(stem) else stem


def _config_folder(path: Path, directory: Path, split: str) -> str:
    parts = path.relative_to(directory).parent.parts
    return "/".join(part for part in parts if part != split) or "."


def _single_file(path: Path, split: str) -> Path:
    if path.suffix not in READERS:
        raise DataError(f"cannot read {str(path)!r}: a data file ends in {', '.join(READERS)}.")
    # A file may be any split, but training rows must not be evaluated on.
    if split != "train" and re.fullmatch(r"train([-_.\d].*)?", path.stem):
        raise DataError(f"{str(path)!r} holds the split 'train' by its name, not {split!r}.")
    return path


def _download(name: str) -> Path:
    """The local cache of a hub data set's files; the only function here that uses a network."""
    from huggingface_hub import snapshot_download

    problem = f"{name!r} is neither a file nor a directory"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or Path(name).suffix in READERS:
        raise DataError(f"{problem}: check the path.")
    try:
        patterns = [f"*{suffix}" for suffix in SUFFIXES]
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except (
        Exception
    ) as error:  # errors of the network, of authorisation, of the cache, from many libraries
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(f"{problem}, nor a data set on the hub: {reason}") from error


def _join(files: list[tuple[Path, FileRows]]) -> Rows:
    rows: list[dict] = []
    starts: list[int] = []
    shapes: dict = {}
    for _, found in files:
        starts.append(len(rows))
        rows += found.rows
        shapes |= found.shapes or {}
    if all(found.shapes is not None for _, found in files):
        rows = without_aligned_nulls(rows, shapes)
    places = [(path, found.numbers) for path, found in files]

    def origin(i: int) -> str:
        file = bisect_right(starts, i) - 1
        path, lines = places[file]
        return f"{path}:{lines[i - starts[file]]}"

    return Rows(rows, origin)


def _python_rows(dataset, split: str, limits: Limits) -> Rows:
    if isinstance(dataset, Rows):
        return dataset
    if isinstance(dataset, Mapping):
        if split not in dataset:
            raise DataError(
                f"the data has no split {split!r}, it has {', '.join(map(str, dataset))}."
            )
        dataset = dataset[split]
    if isinstance(dataset, Mapping | bytes) or not isinstance(dataset, Iterable):
        raise DataError(f"rows must be an iterable of dicts, got a {type(dataset).__name__}.")
    rows = list(dataset) if hasattr(dataset, "__len__") else _held(dataset)
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"row {i}: is a {type(row).__name__}, not a dict.")
    if not rows:
        raise DataError("the data set has no rows.")
    rows = [row if isinstance(row, dict) else dict(row) for row in rows]
    features = getattr(dataset, "features", None)
    if features is not None and hasattr(features, "to_dict"):
        # A data set of the `datasets` library, which reads JSON columns itself.
        rows = without_aligned_nulls(rows, shape_of_features(features.to_dict(), json_shape=None))
    normal, notes = normalize(rows, _row_number, limits)
    return Rows(normal, _row_number, notes)


def _held(stream: Iterable) -> list:
    """The rows of an iterable that does not say how many it has."""
    rows = list(itertools.islice(stream, MOST_UNCOUNTED + 1))
    if len(rows) > MOST_UNCOUNTED:
        raise DataError(
            f"rows that come without a length are held in memory, and more than {MOST_UNCOUNTED:,} "
            "came: write them to a .jsonl file, whose rows stay on the disk, or train on a "
            "relax.data.StreamLoader, which takes streams without an end."
        )
    return rows


def _row_number(i: int) -> str:
    return f"row {i}"
