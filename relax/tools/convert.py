"""`relax data convert ROWS FILE`: write rows of any known form as conversations."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from relax.data.conversion import as_messages
from relax.data.mixing import parse_sources
from relax.data.reading import Rows, read_rows
from relax.data.sources import read_sources
from relax.errors import ConfigError, DataError, RelaxError
from relax.files import atomic_write
from relax.rewards.protocol import is_plain


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the file; returns 0, or 2 if rows cannot be read or are of no known form."""
    options = _parser().parse_args(arguments)
    output = Path(options.file)
    try:
        if output.suffix != ".jsonl" or output.exists():
            raise ConfigError(f"{str(output)!r} must be a new .jsonl file: name another one.")
        rows = _read(options.rows, options.split)
        made, counts = as_messages(rows)
        lines = (_line(row, rows.origin(i)) for i, row in enumerate(made))
        atomic_write(output, "".join(lines).encode())
    except RelaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: the file cannot be written: {error}", file=sys.stderr)
        return 2
    forms = ", ".join(f"{count:,} {form}" for form, count in counts.items())
    for note in rows.notes:
        print(note)
    print(f"{len(made):,} rows with messages are in '{output}' ({forms})")
    return 0


def _read(name: str, split: str) -> Rows:
    """The rows of a source, or of several, one after the other."""
    sources = parse_sources(name)
    if sources is None:
        return read_rows(name, split)
    if any(source.weight is not None for source in sources):
        raise ConfigError(f"rows are written once each, got weights in {name!r}: leave them out.")
    return read_sources(sources, None, split)


def _line(row: dict, where: str) -> str:
    for name, value in row.items():
        if not is_plain(value):
            raise DataError(
                f"{where}: column {name!r} holds a {type(value).__name__}, which JSON does not "
                "have: write it as a text, or leave the column out."
            )
    return json.dumps(row, ensure_ascii=False) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="relax data",
        description="Work on data files. convert: write rows of ShareGPT, Alpaca, prompt and "
        "response, or ChatML texts as conversations.",
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=["convert"])
    parser.add_argument("rows", metavar="ROWS", help="file, directory or hub name, as dataset_name")
    parser.add_argument("file", metavar="FILE", help="the .jsonl file to write")
    parser.add_argument("--split", default="train", help="split to read (default: train)")
    return parser
