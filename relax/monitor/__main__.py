"""`relax monitor DIR`: watches a run from another terminal, or compares runs."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from relax.errors import RelaxError
from relax.monitor import write_comparison, write_report
from relax.monitor.view import watch


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; exit code 1 if the run failed or was killed, 2 for bad usage."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    try:
        if options.compare:
            if len(options.compare) < 2 or options.output_dir is not None:
                _parser().error("--compare takes two or more runs and no positional argument")
            page = write_comparison(options.compare, options.output or "comparison.html")
            console.print(f"the comparison is in '{page}'", markup=False)
            return 0
        if options.output_dir is None:
            _parser().error("give the output_dir of a run, or several with --compare")
        if options.output is not None:
            page = write_report(options.output_dir, options.output)
            console.print(f"the report is in '{page}'", markup=False)
            return 0
        if options.once and not Path(options.output_dir).is_dir():
            _parser().error(f"there is no directory '{options.output_dir}'")
        phase = watch(options.output_dir, console, once=options.once, interval_s=options.interval)
        return 1 if phase in ("failed", "killed") else 0
    except RelaxError as error:
        console.print(str(error), style="red", markup=False)
        return error.exit_code
    except KeyboardInterrupt:
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="relax monitor", description="Watch a run in another process."
    )
    parser.add_argument("output_dir", nargs="?", help="directory of the run")
    parser.add_argument("--once", action="store_true", help="show the current state and exit")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between refreshes")
    parser.add_argument(
        "--compare", nargs="+", metavar="DIR", help="write a page that compares several runs"
    )
    parser.add_argument("-o", "--output", help="write the report to this file and exit")
    return parser


if __name__ == "__main__":
    sys.exit(main())
