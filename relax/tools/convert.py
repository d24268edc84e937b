"""`relax data convert ROWS FILE`: write rows of any known form as conversations."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from relax.data.conversion import as_messages
from relax.data.reading import read_rows
from relax.errors import ConfigError, RelaxError
from relax.files import atomic_write


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the file; returns 0, or 2 if rows cannot be read or are of no known form."""
    options = _parser().parse_args(arguments)
    output = Path(options.file)
    try:
        if output.suffix != ".jsonl" or output.exists():
            raise ConfigError(f"{str(output)!r} must be a new .jsonl file: name another one.")
        rows = read_rows(options.rows, options.split)
        made, counts = as_messages(rows)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
        atomic_write(output, text.encode())
    except RelaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (OSError, TypeError) as error:
        print(f"error: the file cannot be written: {error}", file=sys.stderr)
        return 2
    forms = ", ".join(f"{count:,} {form}" for form, count in counts.items())
    for note in rows.notes:
        print(note)
    print(f"{len(made):,} rows with messages are in '{output}' ({forms})")
    return 0


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
