"""Devices and processes of a run: joins the processes, compares them, makes the mesh."""

import contextlib
import os
import platform
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from rich.console import Console

from relax import parallel
from relax.config import TrainerConfig
from relax.config.mesh import mesh_text, parse_mesh
from relax.engine.run_dir import RunDir
from relax.errors import ConfigError, ModelLoadError
from relax.files import content_digest
from relax.models import TransformerConfig
from relax.models.huggingface.directories import find_directory
from relax.parallel import Rule, processes

C = TypeVar("C", bound=TrainerConfig)

CACHE_DIR = "jax_compilation_cache_dir"  # jax's own option
# Fields that may differ between the processes of a run.
_OWN = ("process_id",)
# Fields that may name files, whose bytes must be the same in all processes.
_FILES = (
    "model_name_or_path",
    "value_model",
    "dataset_name",
    "eval_dataset_name",
    "chat_template_path",
    "profile",
    "reward_funcs",
    "callbacks",
)
_ROWS = ("per_device_train_batch_size", "per_device_eval_batch_size")


@contextlib.contextmanager
def open_mesh(
    config: C, console: Console, model_config: Callable[[], TransformerConfig]
) -> Iterator[tuple[C, Console]]:
    """Context that joins the processes of a run and activates its mesh.

    Args:
      model_config: returns the model's configuration; called after the processes have joined.

    Yields:
      The configuration with an explicit `mesh`, and the console, which is silent in all processes
      but the first.

    Raises:
      ConfigError: the mesh does not fit the devices, bad sharding rules, or processes that differ.
    """
    system = config.system
    if system.mesh is None:
        if processes.count() > 1:
            raise ConfigError(
                f"{processes.count()} processes have joined and need a common mesh. "
                "Pass --mesh auto."
            )
        yield config, console
        return
    if system.coordinator is not None:
        processes.start(
            system.coordinator, system.num_processes, system.process_id, system.heartbeat_s
        )
    with processes.abort_on_error():
        mesh = parallel.make_mesh(system.mesh)
        rules: Sequence[Rule] = parallel.RULES
        if system.sharding_rules is not None:
            rules = parallel.read_rules(system.sharding_rules)
        flat = {name: value for name, value in config.flat().items() if name not in _OWN}
        processes.check_same(flat | {"the sharding rules": repr(rules)})
        if processes.count() > 1:
            processes.check_same(_digests(config))
        _check_possible(config)
        if not processes.is_main():
            console = Console(quiet=True)
        with parallel.use(mesh, rules, model_config().num_key_value_heads) as layout:
            assert layout is not None  # there is a mesh
            for line in layout.describe():
                console.print(line, markup=False)
            yield config.replace(mesh=mesh_text(layout.sizes)), console


def _digests(config: TrainerConfig) -> dict[str, str]:
    """Checksums of all files that the configuration names, to compare them across processes."""
    flat = config.flat()
    found = {}
    for name in _FILES:
        values = flat.get(name)
        for value in filter(None, values if isinstance(values, list | tuple) else [values]):
            path = Path(str(value).removeprefix("model:").partition(".py:")[0])
            path = path.with_suffix(".py") if ".py:" in str(value) else path
            if name == "model_name_or_path":
                with contextlib.suppress(ModelLoadError):  # reported later
                    path = find_directory(path)
            if path.exists():
                found[f"the content of {name} '{value}'"] = content_digest(path)
    return found


def _check_possible(config: TrainerConfig) -> None:
    environment = config.flat().get("environment")
    if environment is not None and processes.count() > 1:
        raise ConfigError(
            "an environment needs a single process, since its answers must be the same everywhere, "
            f"got {processes.count()} processes. Remove --coordinator or --environment."
        )


def for_all_devices(config: C) -> C:
    """The configuration with batch sizes per device multiplied by the number of devices."""
    shards = parallel.batch_shards()
    if shards == 1:
        return config
    flat = config.flat()
    return config.replace(**{name: flat[name] * shards for name in _ROWS})


def global_batch_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Flat fields with batch sizes over all devices, equal if the same is computed.

    >>> global_batch_fields({"mesh": "data=2,fsdp=4", "per_device_train_batch_size": 3})
    {'mesh': 'data=2,fsdp=4', 'per_device_train_batch_size': 24}
    """
    sizes = parse_mesh(fields["mesh"]) if fields.get("mesh") else {}
    shards = sizes.get("data", 1) * sizes.get("fsdp", 1)
    rows = "per_device_train_batch_size"
    return {**fields, rows: fields[rows] * shards} if rows in fields else dict(fields)


@contextlib.contextmanager
def run_dir(output_dir: str) -> Iterator[RunDir]:
    """Context with the directory of the run, or a temporary one in all processes but the first.

    So all processes run the same code, and no two write the same file. All of them read and write
    checkpoints in the run's directory.
    """
    if processes.is_main():
        yield RunDir(output_dir)
        return
    scratch = tempfile.mkdtemp(prefix="relax-process-")
    try:
        own = RunDir(scratch)
        shared = RunDir(output_dir)
        own.checkpoints, own.best = shared.checkpoints, shared.best
        yield own
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def compilation_cache_dir(asked: str | None) -> Path | None:
    """The directory in which jax is to keep compiled steps; None: jax's own setting stays.

    Programs for CPUs use the instructions of the processor that they were compiled on, and homes
    are shared between machines: so each kind of processor has a directory of its own.

    Args:
      asked: a directory, "auto" or None.
    """
    if asked != "auto":
        return None if asked is None else Path(asked)
    if getattr(jax.config, CACHE_DIR) is not None:  # the environment says where
        return None
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    features = [line for line in lines if line.startswith(("flags", "Features", "model name"))][:2]
    words = [platform.machine(), platform.processor(), *features]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = home / "relax" / f"jax-{jax.__version__}-{zlib.crc32(repr(words).encode()):08x}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written: nothing is kept, as jax does by default
        return None
    return directory if os.access(directory, os.W_OK) else None
