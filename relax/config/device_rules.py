"""The rules of the options about devices and processes: a mesh, and who takes part."""

from collections.abc import Callable, Iterator
from typing import Any

from relax.config.mesh import parse_mesh
from relax.errors import ConfigError

AUTO = "auto"
FROM_ENVIRONMENT = ("num_processes", "process_id")


def problems(values: dict[str, Any], given: Callable[[str], bool]) -> Iterator[str]:
    """What is wrong with them, one sentence each."""
    mesh, coordinator = values["mesh"], values["coordinator"]
    if mesh is not None:
        try:
            parse_mesh(mesh)
        except ConfigError as error:
            yield str(error)
    elif given("sharding_rules"):
        yield "sharding_rules has no effect: without mesh there is one device; give mesh"
    count, number = (values[name] for name in FROM_ENVIRONMENT)
    if coordinator is None:
        for name in FROM_ENVIRONMENT:
            if given(name):
                yield f"{name} has no effect: without coordinator there is one process; give it"
        return
    if mesh is None:
        yield "coordinator needs mesh: several processes share one mesh; give mesh auto"
    if coordinator == AUTO:
        for name in FROM_ENVIRONMENT:
            if given(name):
                yield f"{name} has no effect: coordinator auto takes it from the environment"
        return
    if not coordinator.rpartition(":")[2].isdecimal() or ":" not in coordinator:
        yield f"coordinator must be HOST:PORT of process 0, or auto, got {coordinator!r}"
    if count is None or number is None:
        yield "coordinator needs num_processes and process_id; give them, or coordinator auto"
    elif number >= count:
        yield f"process_id must be below num_processes, got {number} of {count}"
