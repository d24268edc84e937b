"""Comparison of a resumed run's configuration with the original one."""

import json
from collections.abc import Iterable, Mapping

from relax.config.names import suggestion
from relax.errors import ConfigError

# Fields that affect where and when files are written, not what is computed.
FREE_FIELDS = frozenset(
    "output_dir resume overwrite_output_dir allow_config_change config print_config "
    "compilation_cache_dir dataset_cache_dir grace_s print_examples dry_run "
    "num_samples max_new_tokens report_to run_name profile_steps max_nonfinite_steps "
    "mesh rollout_devices sharding_rules coordinator num_processes process_id heartbeat_s".split()
)
FREE_PREFIX = "save_"


def check_same_config(old: Mapping, new: Mapping, allow: Iterable[str] = ()) -> list[str]:
    """Checks that a resumed run's configuration computes the same as the original one.

    Args:
      old, new: flat dicts of fields; `old` is read from config.json.
      allow: fields that may differ, besides `FREE_FIELDS` and those starting with `save_`.

    Returns:
      The allowed differences as `name: old -> new`, for the log.

    Raises:
      ConfigError: a field differs that must not, or `allow` has an unknown name.

    Example:
      >>> check_same_config({"seed": 1, "save_steps": 5}, {"seed": 2, "save_steps": 9}, ["seed"])
      ['seed: 1 -> 2']
    """
    names = sorted(set(old) | set(new))
    allow = set(allow)
    for name in sorted(allow - set(names)):
        hint = suggestion(name, names)
        raise ConfigError(f"allow_config_change must name fields, got {name!r}.{hint}")
    changed = {}
    for name in names:
        if name in FREE_FIELDS or name.startswith(FREE_PREFIX):
            continue
        before, after = _as_json(old, name), _as_json(new, name)
        if before != after:
            changed[name] = f"{name}: {before} -> {after}"
    refused = [name for name in changed if name not in allow]
    if refused:
        lines = "\n".join(f"  {changed[name]}" for name in refused)
        wanted = ",".join(sorted(set(refused) | (allow & set(changed))))
        raise ConfigError(
            f"a resumed run must keep its configuration, but these fields differ:\n"
            f"{lines}\nUndo the change, pass --allow_config_change {wanted} to continue anyway, "
            "or start a new run in another --output_dir."
        )
    return list(changed.values())


def _as_json(fields: Mapping, name: str) -> str:
    """A field as in config.json, so that a tuple equals the list it was written as."""
    if name not in fields:
        return "(absent)"
    return json.dumps(_plain(fields[name]), sort_keys=True, default=str)


def _plain(value):
    """A value whose whole numbers are integers: 1.0, read from a file, is the 1 of a notebook."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
