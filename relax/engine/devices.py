"""Devices and processes of a run: joins the processes, compares them, makes the mesh."""

import contextlib
import os
import platform
import shutil
import tempfile
import warnings
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
from relax.optimizers.host import MEMORY_KIND
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
        mesh = parallel.make_mesh(system.mesh, devices_of_updates(config))
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
        with parallel.use(mesh, rules, model_config().tensor_heads) as layout:
            assert layout is not None  # there is a mesh
            for line in layout.describe():
                console.print(line, markup=False)
            yield config.replace(mesh=mesh_text(layout.sizes)), console


def devices_of_updates(config: TrainerConfig) -> list[jax.Device]:
    """All devices but those that `rollout_devices` takes, the last ones.

    Raises:
      ConfigError: none is left.
    """
    devices, apart = jax.devices(), config.flat().get("rollout_devices", 0)
    if apart >= len(devices):
        raise ConfigError(
            f"rollout_devices must leave a device for the updates, got {apart} of the "
            f"{len(devices)} devices. Lower it."
        )
    return devices[: len(devices) - apart]


def rollout_mesh(config: TrainerConfig) -> jax.sharding.Mesh | None:
    """The mesh of `rollout_devices`, each with whole weights; None: there are none."""
    apart = config.flat().get("rollout_devices", 0)
    if not apart:
        return None
    own = jax.devices()[len(devices_of_updates(config)) :]
    return parallel.make_mesh(f"data={apart}", own)


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
    options = config.flat()
    given = options.get("tools") or options.get("environment_factory")
    if given and processes.count() > 1:
        raise ConfigError(
            "tools and environments need a single process, since their answers must be the same "
            f"everywhere, got {processes.count()} processes. Remove --coordinator, or --tools and "
            "--environment_factory."
        )


def with_dtype(config: C, console: Console) -> C:
    """The configuration with the precision of the computation, which is printed.

    Unless it is given, that is bfloat16 on accelerators, whose matrix units are made for it, and
    float32 on CPUs, which have none.

    Raises:
      ConfigError: options contradict the precision.
    """
    platform, given = parallel.platform(), config.model.dtype
    dtype = given or ("float32" if platform == "cpu" else "bfloat16")
    why = "as --dtype says" if given else f"the default on {platform}; --dtype changes it"
    console.print(f"precision: {dtype}, {why}", markup=False)
    if given:
        return config
    known = config.warnings()
    config = config.replace(dtype=dtype)
    config.check()
    for text in config.warnings():
        if text not in known:  # an option that this precision leaves without effect
            warnings.warn(text, stacklevel=2)
    return config


def check_host_memory(config: TrainerConfig, console: Console) -> None:
    """Checks that the optimizer's state can lie in the host's memory, if it is to.

    Raises:
      ConfigError: the devices cannot read the host's memory.
    """
    if not config.hyperparams.offload_optimizer:
        return
    device = jax.local_devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if MEMORY_KIND not in kinds:
        raise ConfigError(
            f"offload_optimizer needs devices that read the host's memory ({MEMORY_KIND}), and "
            f"{device.device_kind} has only {', '.join(kinds)}. Remove it."
        )
    if device.platform == "cpu":
        text = "warning: offload_optimizer saves nothing on a CPU, whose memory is the host's"
        console.print(text, style="yellow", markup=False)


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
