"""The base of every configuration: sections of options, and what can be done with them."""

import copy
import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar

from relax.config import rules
from relax.config.names import unknown
from relax.config.options import options
from relax.errors import ConfigError

# Configurations by the name of their algorithm.
ALGORITHMS: dict[str, type["Settings"]] = {}


@dataclass(slots=True, kw_only=True)
class Settings:
    """Sections of options, and what can be done with them: the base of every configuration."""

    algorithm: ClassVar[str] = ""
    script: ClassVar[str] = ""  # where it is not run_ALGORITHM.py
    embedded: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        if cls.__dict__.get("algorithm"):
            ALGORITHMS[cls.algorithm] = cls

    def flat(self) -> dict[str, Any]:
        """All values by field name, without the sections."""
        known = options(type(self)).values()
        return {o.name: getattr(getattr(self, o.section), o.field) for o in known}

    def to_dict(self) -> dict[str, Any]:
        """All values by section, as they are saved, with the name of the algorithm first."""
        return {"algorithm": self.algorithm} | dataclasses.asdict(self)

    def to_json(self) -> str:
        """The saved form: JSON that `ConfigLoader` reads back to an equal configuration."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def replace(self, **fields: Any) -> "Settings":
        """A copy with some fields changed, by their flat names.

        Raises:
          ConfigError: a name is not a field.
        """
        known = options(type(self))
        problems = [unknown(name, known) for name in fields if name not in known]
        if problems:
            raise ConfigError("\n".join(problems))
        new = copy.deepcopy(self)
        for name, value in fields.items():
            setattr(getattr(new, known[name].section), known[name].field, value)
        return new

    @classmethod
    def defaults_for(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """The defaults that change because of what is given: those of the embedded run.

        They hold where neither a model nor a data set is named, for fields that are not given.
        """
        if fields.get("model_name_or_path") or fields.get("dataset_name"):
            return {}
        changed = {name: value for name, value in cls.embedded.items() if name not in fields}
        if "num_train_epochs" in fields:
            changed.pop("max_steps", None)
        return changed

    def problems(self) -> list[str]:
        """What is wrong with the values, one sentence each. A subclass adds its own rules."""
        return rules.value_problems(options(type(self)), self.flat())

    def validate(self) -> None:
        """Checks types, ranges, contradictions and options without effect.

        Raises:
          ConfigError: names every problem, one a line.
        """
        found = self.problems()
        if found:
            raise ConfigError("\n".join(found))
