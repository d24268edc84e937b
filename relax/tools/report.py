"""`relax report DIR`: write the report page of a run, or one page that compares several."""

import argparse
import sys
from collections.abc import Sequence

from relax.errors import RelaxError
from relax.monitor import write_comparison, write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page; returns 0, or 2 if a directory has no run."""
    options = _parser().parse_args(arguments)
    try:
        if len(options.directories) == 1:
            page = write_report(options.directories[0], options.output)
        else:
            page = write_comparison(options.directories, options.output or "comparison.html")
    except RelaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: the page cannot be written: {error}", file=sys.stderr)
        return 2
    print(f"the report is in '{page}'")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="relax report",
        description="Write the report page of a run, or one page that compares several runs.",
        allow_abbrev=False,
    )
    parser.add_argument("directories", nargs="+", metavar="DIR", help="output_dir of a run")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="path of the page; default: DIR/report.html, or comparison.html for several runs",
    )
    return parser
