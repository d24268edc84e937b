"""Classes by name: `path/to/file.py:Class` and `package.module.Class`."""

import difflib
import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path

from relax.errors import ConfigError


def load_class(spec: str, what: str) -> type:
    """Finds a class.

    Args:
      spec: where it is.
      what: the option that names it, for messages.

    Raises:
      ConfigError: there is no such file, module or class.
    """
    separator = ":" if ".py:" in spec else "."
    where, _, name = spec.rpartition(separator)
    module = _from_file(where, spec, what) if separator == ":" else _import(where, spec, what)
    found = getattr(module, name, None)
    if not isinstance(found, type):
        classes = [n for n, value in vars(module).items() if isinstance(value, type)]
        close_names = difflib.get_close_matches(name, classes, 1)
        raise ConfigError(
            f"{what} {spec!r}: '{where}' has no class {name!r}."
            + "".join(f" Did you mean {close!r}?" for close in close_names)
        )
    return found


def make(spec: str, what: str):
    """An object of the class that `spec` names, which takes no arguments.

    Raises:
      ConfigError: it cannot be found or made.
    """
    found = load_class(spec, what)
    try:
        return found()
    except Exception as error:
        raise ConfigError(
            f"{what} {spec!r} must be made without arguments, and this raised "
            f"{type(error).__name__}: {error}."
        ) from error


def _import(where: str, spec: str, what: str):
    try:
        return importlib.import_module(where)
    except Exception as error:
        raise _broken(spec, what, error) from error


def _from_file(where: str, spec: str, what: str):
    path = Path(where).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"{what} {spec!r}: there is no file '{where}'.")
    name = f"relax_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _broken(spec, what, error) from error
    return module


def _broken(spec: str, what: str, error: Exception) -> ConfigError:
    return ConfigError(f"{what} {spec!r} cannot be imported: {type(error).__name__}: {error}.")
