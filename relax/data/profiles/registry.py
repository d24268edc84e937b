"""Profiles by name."""

import warnings
from pathlib import Path

from relax.config.imports import load_object
from relax.config.names import suggestion
from relax.data.profiles.base import DataProfile
from relax.data.profiles.chain_of_thought import ChainOfThoughtProfile
from relax.data.profiles.chat import ChatProfile
from relax.data.profiles.combined import CombinedProfile
from relax.data.profiles.emoji_think import EmojiThinkProfile
from relax.data.profiles.regime3 import Regime3Profile
from relax.data.profiles.tool_use import ToolUseProfile
from relax.errors import ConfigError

DEFAULT = "chat"
AUTO = "auto"  # see `relax.data.profiles.auto`

PROFILES: dict[str, type[DataProfile]] = {
    "chat": ChatProfile,
    "emoji_think": EmojiThinkProfile,
    "regime3": Regime3Profile,
    "chain_of_thought": ChainOfThoughtProfile,
    "tool_use": ToolUseProfile,
}


def register_profile(name: str, profile_class: type[DataProfile]) -> None:
    """Registers a profile under a name, for this process.

    Raises:
      ConfigError: the class is no subclass of `DataProfile`, or the name is no word.
    """
    if not (isinstance(profile_class, type) and issubclass(profile_class, DataProfile)):
        raise ConfigError(f"a profile must be a subclass of DataProfile, got {profile_class!r}.")
    if not name.isidentifier() or name == AUTO:
        raise ConfigError(f"the name of a profile must be a word other than auto, got {name!r}.")
    PROFILES[name] = profile_class


def get_profile(name: str) -> DataProfile:
    """The profile of a name, of `a+b`, or of `path/to/file.py:Class`.

    An unknown name gives the default profile and a warning; `load_profile` and configurations
    refuse it.

    >>> get_profile("regime3").get_stop_sequences()
    ['</reasoning>', '\\n\\n']
    """
    try:
        return load_profile(name)
    except ConfigError as error:
        warnings.warn(f"{error} Taking {DEFAULT!r}.", stacklevel=2)
        return PROFILES[DEFAULT]()


def load_profile(name: str) -> DataProfile:
    """As `get_profile`.

    Raises:
      ConfigError: there is no such profile.
    """
    problem = profile_problem(name)
    if problem is not None or name == AUTO:
        raise ConfigError(problem or "auto needs rows to look at: see choose_profile.")
    parts = {part: _load(part) for part in _parts(name)}
    return CombinedProfile(parts) if len(parts) > 1 else parts[name]


def profile_problem(name: str) -> str | None:
    """The problem of a profile's name, or None; loads no file."""
    if name == AUTO:
        return None
    parts = _parts(name)
    for part in parts:
        if part not in PROFILES and ":" not in part and "." not in part:
            known = [*PROFILES, AUTO]
            return (
                f"unknown profile {part!r}.{suggestion(part, known)} There are "
                f"{', '.join(known)}, a+b of them, and path/to/file.py:Class."
            )
    if len(set(parts)) < len(parts):
        return f"profile must name each part once, got {name!r}."
    return None


def _parts(name: str) -> list[str]:
    whole = Path(name.rpartition(":")[0]).is_file()  # its path may hold a +
    return [name] if whole else name.split("+")


def _load(part: str) -> DataProfile:
    found = PROFILES[part] if part in PROFILES else load_object(part, "profile")
    if not (isinstance(found, type) and issubclass(found, DataProfile)):
        raise ConfigError(f"profile {part!r} must be a subclass of DataProfile, it is {found!r}.")
    try:
        return found()
    except TypeError as error:  # an abstract method is left, or arguments are needed
        raise ConfigError(f"profile {part!r} cannot be made: {error}") from error
