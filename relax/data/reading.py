"""Reading rows: files, directories, hub names and Python objects, with the place of each row."""

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from relax.data.tasks import is_task, task_rows
from relax.errors import ConfigError, DataError

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
_SPLITS = re.compile(r"(train|test|validation|valid|val|eval|dev)([-_.\d].*)?")
_SHARD = re.compile(r"-\d+-of-\d+$")
# Written beside the data by the `datasets` library; they hold no rows.
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Rows:
    """Rows and where each comes from: `origin(i)` is "file:line" for row i, as messages need it."""

    rows: list[dict]
    origin: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.rows)


def read_rows(
    dataset, split: str = "train", config: str | None = None, options: Mapping | None = None
) -> Rows:
    """Reads a data set from wherever it is.

    Args:
      dataset: a .jsonl, .json or .parquet file; a directory of them; a hub name; the name of a
        task, `reasoning_gym/...`; a list or other iterable of dicts (a `datasets.Dataset` is one);
        a mapping of split names to such iterables.
      split: which one. In a directory the files named after it (train.jsonl, or
        train-00000-of-00002.parquet); where no file is named after a split, all are `train`. One
        file is whatever it is asked for as, unless it is named after `train`.
      config: a subdirectory: hub data sets keep each of their configurations in one.
      options: of a task, see `relax.data.tasks.task_rows`.

    Raises:
      DataError: as "file:line: reason" if a row is broken; if there is nothing to read.
      ConfigError: if there are options for something that is no task.
    """
    if is_task(dataset):
        if config is not None:
            raise ConfigError(
                f"{dataset!r} has no configurations, got {config!r}: pass dataset_kwargs instead."
            )
        return _python_rows(task_rows(dataset, split, options), split)
    if options:
        raise ConfigError(
            f"dataset_kwargs are options of reasoning_gym tasks, got {dict(options)} for a data "
            "set that is none. Leave them out."
        )
    if not isinstance(dataset, str | Path):
        return _python_rows(dataset, split)
    path = Path(dataset)
    if path.is_file():
        files = [_single_file(path, split)]
    elif path.is_dir():
        files = split_files(path, split, config)
    else:
        files = split_files(_download(str(dataset)), split, config)
    return _join([(file, *_READERS[file.suffix](file)) for file in files])


def split_files(directory: Path, split: str, config: str | None = None) -> list[Path]:
    """The data files of one split, in the order of their names."""
    if config is not None:
        directory = directory / config
        if not directory.is_dir():
            raise DataError(
                f"there is no configuration {config!r}: {str(directory)!r} is no directory."
            )
    files = [
        path
        for path in sorted(directory.rglob("*"))
        if path.suffix in _SUFFIXES
        and path.is_file()
        and path.name not in _METADATA
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    ]
    if not files:
        raise DataError(f"no .jsonl, .json or .parquet file in {str(directory)!r}.")
    names = {path: _split_name(path, directory) for path in files}
    chosen = [path for path in files if names[path] == split] or [
        path for path in files if re.match(re.escape(split) + r"[-_.\d]", names[path])
    ]
    if not chosen and split == "train" and not any(map(_SPLITS.fullmatch, names.values())):
        chosen = files
    if not chosen:
        found = ", ".join(sorted(set(names.values())))
        raise DataError(f"no split {split!r} in {str(directory)!r}: it has {found}.")
    folders = sorted({_config_folder(path, directory, split) for path in chosen})
    if len(folders) > 1:
        raise DataError(
            f"split {split!r} lies in several folders of {str(directory)!r}: "
            f"choose one with dataset_config: {', '.join(folders)}."
        )
    return chosen


def _split_name(path: Path, directory: Path) -> str:
    """`train-00000-of-00002.parquet` and `train/0000.parquet` are both of split `train`."""
    stem = _SHARD.sub("", path.stem)
    folder = path.parent.name if path.parent != directory else ""
    return folder if _SPLITS.fullmatch(folder) and not _SPLITS.fullmatch(stem) else stem


def _config_folder(path: Path, directory: Path, split: str) -> str:
    parts = path.relative_to(directory).parent.parts
    return "/".join(part for part in parts if part != split) or "."


def _single_file(path: Path, split: str) -> Path:
    if path.suffix not in _SUFFIXES:
        raise DataError(f"cannot read {str(path)!r}: a data file ends in {', '.join(_SUFFIXES)}.")
    # A file is what it is asked for as, but training rows are no rows to evaluate on.
    if split != "train" and re.fullmatch(r"train([-_.\d].*)?", path.stem):
        raise DataError(f"{str(path)!r} holds the split 'train' by its name, not {split!r}.")
    return path


def _download(name: str) -> Path:
    """A hub data set's files in the local cache; the one place here that may use a network."""
    from huggingface_hub import snapshot_download

    problem = f"{name!r} is neither a file nor a directory"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or Path(name).suffix in _SUFFIXES:
        raise DataError(f"{problem}: check the path.")
    try:
        patterns = [f"*{suffix}" for suffix in _SUFFIXES]
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # network, authorisation, cache: many libraries' errors
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(f"{problem}, nor a data set that the hub gives: {reason}") from error


def _join(files: list[tuple[Path, list[dict], list[int]]]) -> Rows:
    rows: list[dict] = []
    starts: list[int] = []
    for _, file_rows, _ in files:
        starts.append(len(rows))
        rows += file_rows
    places = [(path, lines) for path, _, lines in files]

    def origin(i: int) -> str:
        file = bisect_right(starts, i) - 1
        path, lines = places[file]
        return f"{path}:{lines[i - starts[file]]}"

    return Rows(rows, origin)


def _python_rows(dataset, split: str) -> Rows:
    if isinstance(dataset, Rows):
        return dataset
    if isinstance(dataset, Mapping):
        if split not in dataset:
            raise DataError(
                f"the data has no split {split!r}, it has {', '.join(map(str, dataset))}."
            )
        dataset = dataset[split]
    if isinstance(dataset, Mapping | bytes) or not isinstance(dataset, Iterable):
        raise DataError(f"rows must come as an iterable of dicts, got a {type(dataset).__name__}.")
    rows = list(dataset)
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"row {i}: is a {type(row).__name__}, not a dict.")
    if not rows:
        raise DataError("the data set has no rows.")
    return Rows(rows, lambda i: f"row {i}")


def _read_jsonl(path: Path) -> tuple[list[dict], list[int]]:
    rows, numbers = [], []
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            text = _decode(raw, f"{path}:{number}", first=number == 1)
            if text.strip():
                rows.append(_object(_parse_line(text, f"{path}:{number}"), f"{path}:{number}"))
                numbers.append(number)
    if not rows:
        raise DataError(f"{path}: the file holds no rows.")
    return rows, numbers


def _decode(raw: bytes, where: str, first: bool) -> str:
    try:
        text = raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8: byte {error.start + 1} is 0x{raw[error.start]:02x}. "
            "Save the file as UTF-8."
        ) from error
    if "\0" in text:
        raise DataError(
            f"{where}: byte {raw.index(0) + 1} is NUL: the file is damaged, as after a crash "
            "while it was written."
        )
    return text


def _parse_line(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if not text.endswith("\n"):
            raise DataError(
                f"{where}: broken JSON in the last line, which has no line end: the file looks "
                f"cut off ({_json_reason(error)})."
            ) from error
        raise DataError(f"{where}: broken JSON: {_json_reason(error)}.") from error


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _object(value, where: str) -> dict:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a row must be a JSON object, this is a {type(value).__name__}.")
    return value


def _read_json(path: Path) -> tuple[list[dict], list[int]]:
    """A list of objects; a file that begins with an object is read as JSON lines."""
    text = "".join(
        _decode(raw, f"{path}:{number}", first=number == 1)
        for number, raw in enumerate(path.read_bytes().splitlines(keepends=True), 1)
    )
    position = _skip_space(text, 0)
    if not text.startswith("[", position):
        return _read_jsonl(path)
    rows, numbers = [], []
    decoder = json.JSONDecoder()
    line, counted = 1, 0  # the line number at position `counted`
    position = _skip_space(text, position + 1)
    while not text.startswith("]", position):
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = getattr(error, "lineno", line)
            raise DataError(f"{path}:{at}: broken JSON: {_json_reason(error)}.") from error
        rows.append(_object(value, f"{path}:{line}"))
        numbers.append(line)
        position = _skip_space(text, position)
        if text.startswith(",", position):
            position = _skip_space(text, position + 1)
        elif not text.startswith("]", position):
            at = text.count("\n", 0, position) + 1
            raise DataError(f"{path}:{at}: broken JSON: the list of rows is not closed by ']'.")
    if text[position + 1 :].strip():
        at = text.count("\n", 0, position) + 1
        raise DataError(f"{path}:{at}: broken JSON: text follows the end of the list.")
    if not rows:
        raise DataError(f"{path}: the file holds no rows.")
    return rows, numbers


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _read_parquet(path: Path) -> tuple[list[dict], list[int]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path}: parquet files need pyarrow: pip install 'relax-trainers[parquet]'."
        ) from error
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{path}: not a readable parquet file: {reason}") from error
    if not rows:
        raise DataError(f"{path}: the file holds no rows.")
    return rows, list(range(1, len(rows) + 1))


_READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
