"""The command line: strict about every argument, then dispatched by fire.

Left alone, fire runs the program first and complains about a misspelt flag afterwards, takes
`--packing=false` for the true text "false", and binds stray words to the first parameters. So all
arguments are checked against the configuration class first, and fire gets clean `--name=text` flags
with a parser for each. Nothing here imports jax: a wrong command ends before it costs anything.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

from relax.config.argv import Command, read_command
from relax.config.loader import ConfigLoader
from relax.config.options import options
from relax.config.schema import Settings
from relax.config.values import parse_text
from relax.errors import ConfigError, RelaxError


def run(
    config_class: type[Settings],
    main: Callable[[Any], object],
    argv: Sequence[str] | None = None,
) -> None:
    """Reads the command line and calls `main(config)`: the last line of a script.

    Args:
      config_class: the configuration of the algorithm.
      main: gets the validated configuration. It imports jax itself, inside.
      argv: the arguments; default: those of the process.

    Raises:
      SystemExit: 2 after `error: ...` lines on stderr when the command line or the configuration is
        wrong; the `exit_code` of a `RelaxError` or an interruption that leaves `main`. An
        interruption ends the process itself where `argv` is None.
    """
    try:
        command = read_command(config_class, sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        _refuse(error)
    if command.help:
        from relax.config.helptext import help_text

        print(help_text(config_class, _script()))
    else:
        dispatch(config_class, command, partial(_call, main, ends_process=argv is None))


def dispatch(config_class: type[Settings], command: Command, main: Callable[[Any], object]) -> None:
    """Lets fire call `main` with the configuration of a checked command line."""
    import inspect

    import fire

    known = options(config_class)

    def launch(**flags: Any) -> None:
        try:
            config = ConfigLoader(command.config, config_class).merge_with_cli_args(flags)
        except ConfigError as error:
            _refuse(error)
        if command.print_config:
            print(config.to_json(), end="")
        else:
            main(config)

    # What fire sees: keyword-only parameters, so that nothing can be bound by position.
    launch.__signature__ = inspect.Signature(
        [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in command.flags]
    )
    parsers = {name: partial(parse_text, known[name].type) for name in command.flags}
    clean = [f"--{name}={text}" for name, text in command.flags.items()]
    fire.Fire(
        fire.decorators.SetParseFns(**parsers)(launch), command=clean, serialize=lambda _: None
    )


def _call(main: Callable[[Any], object], config: Settings, *, ends_process: bool = False) -> None:
    """Calls `main`; an error that ReLax raises on purpose becomes one message and an exit code.

    Args:
      ends_process: nothing runs after this, so an interruption may end the process here.
    """
    try:
        main(config)
    except RelaxError as error:
        for problem in getattr(error, "problems", [error]):
            print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt as stop:
        code = getattr(stop, "exit_code", 130)
        with contextlib.suppress(OSError):  # the signal may tell that the terminal is gone
            print(str(stop) or "interrupted", file=sys.stderr, flush=True)
            sys.stdout.flush()
        if ends_process:
            # Everything is closed. A normal exit would wait for a compiler that is still at work,
            # for minutes, and then crash in it.
            os._exit(code)
        raise SystemExit(code) from None


def _refuse(error: ConfigError) -> NoReturn:
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    print(f"see --help: python {_script()} --help", file=sys.stderr)
    raise SystemExit(2)


def _script() -> str:
    directory, name = os.path.split(sys.argv[0])
    if name == "__main__.py":  # of a package of relax
        return f"-m relax.{os.path.basename(directory)}"
    return name
