"""Things that are named in a configuration: `package.module.Name` and `path/to/file.py:Name`."""

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path

from relax.config.names import suggestion
from relax.errors import ConfigError


def load_object(spec: str, what: str):
    """Imports what is named; a file is imported once.

    Args:
      spec: a dotted path, or a Python file, a colon and a name in it.
      what: it is to be, for messages: "reward", "profile".

    Raises:
      ConfigError: there is no such thing, or importing it fails.

    >>> load_object("json.dumps", "function")([1])
    '[1]'
    """
    path, colon, name = spec.rpartition(":")
    if colon:
        return _attribute(_load_file(path, spec, what), name, spec, what)
    module, _, name = spec.rpartition(".")
    return _attribute(_load_module(module, spec, what), name, spec, what)


def _load_module(name: str, spec: str, what: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = getattr(error, "name", None) or ""
        if missing and (name == missing or name.startswith(missing + ".")):
            raise ConfigError(
                f"{what} {spec!r}: there is no module {missing!r}. Is it installed, and is this "
                "the directory to start from?"
            ) from error
        raise ConfigError(f"{what} {spec!r}: {name!r} cannot be imported: {error}") from error


def _load_file(path: str, spec: str, what: str):
    file = Path(path)
    if file.suffix != ".py" or not file.is_file():
        raise ConfigError(
            f"{what} {spec!r}: {path!r} is not a Python file. Write path/to/file.py:name."
        )
    # Two files of one name must not become one module.
    name = f"relax_{hashlib.sha1(str(file.resolve()).encode()).hexdigest()[:12]}_{file.stem}"
    if name not in sys.modules:
        module_spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[name] = module
        try:
            module_spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[name]
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError(f"{what} {spec!r}: {path!r} cannot be loaded: {reason}") from error
    return sys.modules[name]


def _attribute(module, name: str, spec: str, what: str):
    if not hasattr(module, name):
        names = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise ConfigError(
            f"{what} {spec!r}: there is no {name!r} in it.{suggestion(name, names)} "
            f"It has {', '.join(names) or 'no function and no class'}."
        )
    return getattr(module, name)
