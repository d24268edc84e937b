"""The command line: strict about every argument, then dispatched by fire.

Left alone, fire runs the program first and complains about a misspelt flag afterwards, takes
`--packing=false` for the true text "false", and binds stray words to the first parameters. So all
arguments are checked against the configuration class first, and fire gets clean `--name=text` flags
with a parser for each. Nothing here imports jax: a wrong command ends before it costs anything.
"""

import contextlib
import inspect
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from relax.config.foreign import advice, nearest_value, own_value
from relax.config.loader import ConfigLoader
from relax.config.names import ALIASES, normal, ratio_problem, unknown
from relax.config.options import options
from relax.config.settings import ALGORITHMS, Settings
from relax.config.values import is_list, is_number, is_switch, parse_text, type_name
from relax.errors import ConfigError, RelaxError

COMMAND_FLAGS = {"config": str, "print_config": bool, "help": bool}

_FLAG = re.compile(r"--?[^\W\d][\w-]*(=|\Z)|--?\Z")


class CommandLine(NamedTuple):
    """Checked arguments."""

    flags: dict[str, str]  # field -> text that its type accepts
    config: str | None  # path of a file
    print_config: bool
    help: bool


class _Typed(NamedTuple):
    """A flag as it was typed."""

    spelling: str
    name: str  # as typed, with underscores and without dashes in front
    text: str | None  # None for a flag without a value


def run(
    config_class: type[Settings],
    main: Callable[[Any], object],
    argv: Sequence[str] | None = None,
    program: Sequence[str] | None = None,
    ends_process: bool | None = None,
) -> None:
    """Reads the command line and calls `main(config)`: the last line of a script.

    Args:
      config_class: the configuration of the algorithm.
      main: gets the validated configuration. It imports jax itself, inside.
      argv: the arguments; default: those of the process.
      program: the words that start it, for messages; default: python and the script's name.
      ends_process: nothing runs after this, so an interruption may end the process here; None:
        where `argv` is None.

    Raises:
      SystemExit: 2 after `error: ...` lines on stderr when the command line or the configuration is
        wrong; the `exit_code` of a `RelaxError` or an interruption that leaves `main`.
    """
    words = " ".join(program or ("python", Path(sys.argv[0]).name))
    given = sys.argv[1:] if argv is None else [*argv]
    if config_class.positional and given and not given[0].startswith("-"):
        given[0] = f"--{config_class.positional}={given[0]}"
    try:
        line = read_command(config_class, given)
    except ConfigError as error:
        _refuse(error, words)
    if line.help:
        from relax.config.helptext import help_text

        say(help_text(config_class, words))
        return

    def launch(**flags: Any) -> None:
        try:
            config = ConfigLoader(line.config, config_class).merge_with_cli_args(flags)
        except ConfigError as error:
            _refuse(error, words)
        if line.print_config:
            say(config.to_json().rstrip("\n"))
        else:
            main(config)

    try:
        _fire(launch, config_class, line.flags)
    except RelaxError as error:  # one message and an exit code
        for problem in getattr(error, "problems", [error]):
            print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt as stop:
        code = getattr(stop, "exit_code", 130)
        with contextlib.suppress(OSError):  # the signal may mean that the terminal is gone
            print(str(stop) or "interrupted", file=sys.stderr, flush=True)
            sys.stdout.flush()
        if argv is None if ends_process is None else ends_process:
            # Everything is closed. A normal exit would wait for a compiler that is still at work,
            # for minutes, and then crash in it.
            os._exit(code)
        raise SystemExit(code) from None


def _fire(launch: Callable[..., None], config_class: type[Settings], flags: dict[str, str]) -> None:
    """Lets fire parse the checked texts and call `launch` with the values."""
    import fire

    # Keyword-only parameters, so that fire binds nothing by position.
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, keyword, default=None) for name in flags]
    launch.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # fire reads it
    known = options(config_class)
    parsers = {name: partial(parse_text, known[name].type) for name in flags}
    clean = [f"--{name}={text}" for name, text in flags.items()]
    component = fire.decorators.SetParseFns(**parsers)(launch)
    fire.Fire(component, command=clean, serialize=lambda _: None)


def say(text: str) -> None:
    """Prints text to a reader that may close the pipe early, as `head` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # avoids a second one when Python flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(error: ConfigError, program: str) -> NoReturn:
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    print(f"see --help: {program} --help", file=sys.stderr)
    raise SystemExit(2)


def program_words(config_class: type[Settings]) -> list[str]:
    """The command that starts the running program again, without flags.

    It is the algorithm's script if that is running, and the command `relax` otherwise.
    """
    running = Path(sys.argv[0])
    script = config_class.script or f"run_{config_class.algorithm}.py"
    on_path = shutil.which(running.name)
    if running.stem == "relax" and on_path and Path(on_path).resolve() == running.resolve():
        return ["relax", config_class.algorithm]
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    if running.name == script:
        return [python, sys.argv[0]]
    return [python, "-m", "relax", config_class.algorithm]


def read_command(config_class: type[Settings], argv: Sequence[str]) -> CommandLine:
    """Checks all arguments against the fields of a configuration.

    Raises:
      ConfigError: names every problem, one a line.
    """
    if "--help" in argv or "-h" in argv:  # whatever else is wrong
        return CommandLine({}, None, False, True)
    types: dict[str, Any] = {name: option.type for name, option in options(config_class).items()}
    types |= COMMAND_FLAGS
    typed, problems = _split(argv, types)
    texts: dict[str, str] = {}
    spellings: dict[str, str] = {}
    for flag in typed:
        field, negated = _resolve(flag.name, types)
        if field is None:
            problems.append(_unknown(flag.name, types))
            continue
        if field in spellings:
            same = flag.spelling == spellings[field]
            both = "twice" if same else f"twice, as {spellings[field]} and as {flag.spelling}"
            problems.append(f"--{field} is given {both}. Give it once.")
            continue
        spellings[field] = flag.spelling
        try:
            texts[field] = _text(flag, field, negated, types[field])
        except ValueError as error:
            problems.append(f"{flag.spelling} {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    print_config, help_ = (
        parse_text(bool, texts.pop(name, "false")) for name in ("print_config", "help")
    )
    return CommandLine(texts, texts.pop("config", None), print_config, help_)


def _split(argv: Sequence[str], types: dict[str, Any]) -> tuple[list[_Typed], list[str]]:
    """Pairs flags with their values; anything else is a problem."""
    typed: list[_Typed] = []
    problems: list[str] = []
    position = 0
    while position < len(argv):
        token = argv[position]
        position += 1
        if not (token.startswith("--") or _is_flag(token)) or token in ("-", "--"):
            problems.append(_stray(token, typed, types))
            continue
        spelling, equals, text = token.partition("=")
        value = text if equals else None
        if not equals and position < len(argv) and not _is_flag(argv[position]):
            value = argv[position]
            position += 1
        if token.startswith("--"):
            typed.append(_Typed(spelling, normal(spelling[2:]), value))
        else:
            problems.append(_short(spelling, types))
    return typed, problems


def _is_flag(token: str) -> bool:
    """Whether an argument looks like a flag; `-1`, `-inf` and "- a text" are values."""
    return bool(_FLAG.match(token)) and not is_number(token)


def _resolve(name: str, types: dict[str, Any]) -> tuple[str | None, bool]:
    """The field that a name refers to (None: no field), and whether the name negates it."""
    name = ALIASES.get(name, name)
    if name in types:
        return name, False
    for prefix in ("no_", "no"):
        if name.startswith(prefix) and name.removeprefix(prefix) in types:
            return name.removeprefix(prefix), True
    return None, False


def _text(flag: _Typed, field: str, negated: bool, annotation: Any) -> str:
    """The text of a flag's value, checked against its type.

    Raises:
      ValueError: the problem, as a sentence without the flag that begins it.
    """
    if negated:
        if not is_switch(annotation):
            raise ValueError(f"negates an option that is not true or false: write --{field}=VALUE")
        if flag.text is not None:
            raise ValueError(f"takes no value, got {flag.text!r}: write --{field}={flag.text}")
        return "false"
    if flag.text is None:
        if not is_switch(annotation):
            raise ValueError(
                f"needs a value: --{field}={type_name(annotation)} "
                "(the = is needed where a value looks like a flag)"
            )
        return "true"
    text = str(own_value(field, flag.text))
    try:
        value = parse_text(annotation, text)
    except ValueError as error:
        raise ValueError(f"{error}{nearest_value(field, text)}") from None
    if problem := ratio_problem(flag.name, value):
        raise ValueError(problem.removeprefix(f"{flag.name} "))
    return text


def _unknown(name: str, types: dict[str, Any]) -> str:
    others = [word for word, other in ALGORITHMS.items() if name in options(other)]
    if others and advice(name, types) is None:
        return f"--{name} is a flag of {', '.join(others)} only."
    negations = [f"no_{name}" for name, annotation in types.items() if is_switch(annotation)]
    return unknown(name, [*types, *ALIASES, *negations], prefix="--")


def _short(spelling: str, types: dict[str, Any]) -> str:
    name = normal(spelling[1:])
    if len(name) == 1:
        return f"one-letter flags do not exist, got {spelling}. Write the name out."
    if _resolve(name, types)[0]:
        return f"a flag starts with two dashes, got {spelling}. Did you mean --{name}?"
    return _unknown(name, types)


def _stray(token: str, before: list[_Typed], types: dict[str, Any]) -> str:
    """Refuses an argument that is neither a flag nor the value of one."""
    text = f"unexpected argument {token!r}: every argument is a --flag or the value of one."
    name, equals, value = token.lstrip("-\u2013\u2014").partition("=")  # also pasted long dashes
    if _resolve(normal(name), types)[0]:
        return f"{text} Did you mean --{name}{equals}{value}?"
    last = before[-1] if before else None
    field = _resolve(last.name, types)[0] if last else None
    if last is None or last.text is None or field is None:
        return text
    if is_list(types[field]):
        return f"{text} Lists have commas: {last.spelling} {last.text},{token}"
    return f"{text} A value with spaces is put in quotes."
