"""Imports of objects by name: `package.module.Name` or `path/to/file.py:Name`."""

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from relax.config.names import suggestion
from relax.errors import ConfigError


def load_object(spec: str, what: str, kind: type = object) -> Any:
    """Imports the object that a text names; a file is imported once.

    Args:
      spec: a dotted path, or a Python file, a colon and a name in it.
      what: the role of the object, for messages: "reward", "profile", "callbacks".
      kind: the type that the object must have, such as `type` for a class.

    Raises:
      ConfigError: there is no such file, module or name, it is of another kind, or importing it
        raises an exception.

    >>> load_object("json.dumps", "function")([1])
    '[1]'
    """
    path, colon, name = spec.rpartition(":")
    if colon:
        module = _load_file(path, spec, what)
    else:
        path, _, name = spec.rpartition(".")
        if not path or spec.endswith(".py"):
            raise ConfigError(
                f"{what} {spec!r} must name an object of a file or a module: write file.py:NAME "
                "or package.module.NAME."
            )
        module = _load_module(path, spec, what)
    found = getattr(module, name, None)
    if found is None or not isinstance(found, kind):
        wanted = "class" if kind is type else "object"
        names = [
            key
            for key, value in vars(module).items()
            if callable(value) and isinstance(value, kind) and not key.startswith("_")
        ]
        raise ConfigError(
            f"{what} {spec!r}: '{path}' has no {wanted} {name!r}.{suggestion(name, names)} "
            f"It has {', '.join(names) or 'no function and no class'}."
        )
    return found


def make_object(spec: str, what: str) -> Any:
    """An instance of the class that `spec` names, constructed without arguments.

    Raises:
      ConfigError: see `load_object`; or the constructor raises an exception.
    """
    found = load_object(spec, what, type)
    try:
        return found()
    except Exception as error:
        raise ConfigError(
            f"{what} {spec!r} cannot be constructed without arguments: "
            f"{type(error).__name__}: {error}."
        ) from error


def _load_module(name: str, spec: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        missing = error.name if isinstance(error, ImportError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            raise ConfigError(
                f"{what} {spec!r}: there is no module {missing!r}. Is it installed, and is this "
                "the right working directory?"
            ) from error
        raise _broken(name, spec, what, error) from error


def _load_file(path: str, spec: str, what: str) -> ModuleType:
    file = Path(path).expanduser().resolve()
    if file.suffix != ".py" or not file.is_file():
        raise ConfigError(
            f"{what} {spec!r}: there is no Python file '{path}'. Write path/to/file.py:name."
        )
    # Two files of one name must not become one module.
    name = f"relax_{hashlib.sha1(str(file).encode()).hexdigest()[:12]}_{file.stem}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, file)
    assert found is not None and found.loader is not None  # a .py file always has one
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # where dataclasses look it up
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _broken(path, spec, what, error) from error
    return module


def _broken(where: str, spec: str, what: str, error: BaseException) -> ConfigError:
    return ConfigError(
        f"{what} {spec!r}: '{where}' cannot be imported: {type(error).__name__}: {error}"
    )
