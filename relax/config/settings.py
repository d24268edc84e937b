"""The base class of configurations: sections of options, with checks and conversions."""

import copy
import dataclasses
import json
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from relax.config.names import unknown
from relax.config.options import options
from relax.config.rules import NoEffect, Rule, Values, range_problems, type_problems, without_effect
from relax.errors import ConfigError

# Configuration classes by algorithm.
ALGORITHMS: dict[str, type["Settings"]] = {}


@dataclass(slots=True, kw_only=True)
class Settings:
    """Base class of configurations, which consist of sections of options.

    Attributes:
      algorithm: its name in files and on the command line.
      script: the script that runs it, if it is not run_ALGORITHM.py.
      positional: the option that a first word without dashes sets; empty: none.
      examples: flags of typical commands, for `--help`.
      demo: defaults of the demo run, which names neither a model nor a data set.
      shared_rules, rules: find contradictions; `rules` run if `shared_rules` find none.
      no_effect: table of options without effect.
    """

    algorithm: ClassVar[str] = ""
    script: ClassVar[str] = ""
    positional: ClassVar[str] = ""
    examples: ClassVar[tuple[str, ...]] = ()
    demo: ClassVar[dict[str, Any]] = {}
    shared_rules: ClassVar[tuple[Rule, ...]] = ()
    rules: ClassVar[tuple[Rule, ...]] = ()
    no_effect: ClassVar[tuple[NoEffect, ...]] = ()

    def __init_subclass__(cls) -> None:
        if cls.__dict__.get("algorithm"):
            ALGORITHMS[cls.algorithm] = cls

    def flat(self) -> dict[str, Any]:
        """All values by field name, without the sections."""
        known = options(type(self)).values()
        return {o.name: getattr(getattr(self, o.section), o.field) for o in known}

    def to_dict(self) -> dict[str, Any]:
        """All values by section, as saved, with the name of the algorithm first."""
        return {"algorithm": self.algorithm} | dataclasses.asdict(self)

    def to_json(self) -> str:
        """The saved form: JSON that `ConfigLoader` reads back to an equal configuration."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def replace(self, **fields: Any) -> Self:
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
        """Defaults of the demo run for the fields that are not given.

        Empty if a model or a data set is named.
        """
        if fields.get("model_name_or_path") or fields.get("dataset_name"):
            return {}
        changed = {name: value for name, value in cls.demo.items() if name not in fields}
        if "num_train_epochs" in fields:
            changed.pop("max_steps", None)
        return changed

    def values(self) -> Values:
        """All values by field name, which know whether they were given."""
        return Values(options(type(self)), self.flat(), self.demo)

    def problems(self) -> list[str]:
        """All problems of the values, one sentence each.

        If a value has a wrong type, only types are reported, since the rules rely on them.
        """
        known, flat = options(type(self)), self.flat()
        if found := list(type_problems(known, flat)):
            return found
        values = self.values()
        found = list(range_problems(known, flat))
        found += [problem for rule in self.shared_rules for problem in rule(values)]
        if not found:
            found = [problem for rule in self.rules for problem in rule(values)]
        table = without_effect(self.no_effect, values).values()
        return found + [text for text, warns in table if not warns]

    def warnings(self) -> list[str]:
        """Sentences about options without effect that a sweep may hold fixed."""
        table = without_effect(self.no_effect, self.values()).values()
        return [text for text, warns in table if warns]

    def check(self) -> None:
        """Checks types, ranges, contradictions and options without effect.

        Raises:
          ConfigError: names every problem, one a line.
        """
        found = self.problems()
        if found:
            raise ConfigError("\n".join(found))

    def warn(self) -> None:
        """Issues a Python warning for each of `warnings`."""
        for text in self.warnings():
            warnings.warn(text, stacklevel=2)

    def validate(self) -> None:
        """Checks as `check` does, and warns as `warn` does."""
        self.check()
        self.warn()
