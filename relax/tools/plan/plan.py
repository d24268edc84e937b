"""Ahead-of-time compilation of a training step and a decode step for absent devices.

Nothing is allocated: XLA compiles shapes, and reports memory, FLOPs and the text of the program. A
deep model is compiled at two small depths and extrapolated: each layer adds the same.

Axes: B rows or slots, T tokens of a row, L layers.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from relax import parallel
from relax.config.text import format_bytes
from relax.engine import memory
from relax.errors import ConfigError
from relax.files import json_object
from relax.models import Transformer, TransformerConfig, kernels, read_pretrained_config
from relax.models.config import LoRA
from relax.models.families import family_of
from relax.models.huggingface.text_parts import text_part
from relax.models.lora import ALL_LINEAR
from relax.models.quantization import quantize_linear
from relax.optimizers import OPTIMIZERS, offload
from relax.parallel.mesh import BATCH
from relax.sampling import step
from relax.sampling.distribution import Rules
from relax.tools.plan.chips import CHIPS
from relax.tools.plan.config import PlanConfig
from relax.tools.plan.flops import forward_flops, parameter_count
from relax.tools.plan.hlo import Traffic, collectives
from relax.trainers import SFTTrainer
from relax.trainers.state import fresh_params, initial_state

DEPTHS = (2, 4)  # depths to extrapolate from; with one layer the compiler schedules differently


@dataclasses.dataclass(frozen=True)
class Program:
    """The cost of a compiled step, per device.

    Attributes:
      parts: bytes by name.
      flops: FLOPs by XLA's count, which counts the body of a loop once.
      accessed: bytes of memory read and written, by the same count.
      traffic: bytes between devices, by kind of collective.
      host: bytes in the host's memory.
    """

    parts: dict[str, float]
    flops: float
    accessed: float
    traffic: dict[str, Traffic]
    host: float = 0.0

    @property
    def total(self) -> float:
        """Bytes of memory."""
        return sum(self.parts.values())

    @property
    def moved(self) -> float:
        """Bytes between devices."""
        return sum(traffic.nbytes for traffic in self.traffic.values())


def plan(config: PlanConfig) -> list[str]:
    """Compiles both steps; returns the lines that `relax plan` prints.

    Raises:
      ConfigError: the compiler does not know the topology, or the mesh does not fit it.
    """
    name, d = config.model.model_name_or_path, config.devices
    assert name is not None  # guaranteed by the rules of the configuration
    shape = read_shape(name)
    if config.steps.quick:
        jax.config.update("jax_optimization_level", "O1")
    mesh = parallel.make_mesh(d.mesh, topology_devices(d.topology))
    rules = parallel.RULES if d.sharding_rules is None else parallel.read_rules(d.sharding_rules)
    with parallel.use(mesh, rules, shape.tensor_heads):
        layout = _layout()
        model = _model(config, shape)
        attention = kernels.describe_attention(model, config.steps.max_length)
        full = config.steps.full_depth
        update = attempt(lambda: extrapolated(lambda s: update_program(config, s), shape, full))
        decode = None
        if config.steps.slots:
            decode = attempt(lambda: extrapolated(lambda s: decode_program(config, s), shape, full))
        rows = config.steps.per_device_train_batch_size * layout.batch_shards
        slots = config.steps.slots * layout.batch_shards
    length = config.steps.max_length
    tokens = rows * config.steps.gradient_accumulation_steps * length
    forward = forward_flops(shape, tokens, length)
    # Two forward passes with recomputation, and a backward pass of twice the FLOPs.
    passes = 3 if config.steps.gradient_checkpointing_policy == "matmuls" else 4
    lines = [
        f"{Path(name)}: {shape.num_hidden_layers} layers, "
        f"{parameter_count(shape) / 1e9:.2f} B parameters",
        *layout.describe(),
        f"attention: {attention}",
        "",
        f"step of {rows} x {config.steps.gradient_accumulation_steps} rows of {length} tokens",
        *described(update, d.topology, passes * forward / mesh.size),
    ]
    if decode is not None:
        lines += [
            "",
            f"decode step of {slots} slots with {length} cache columns",
            *described(decode, d.topology, forward_flops(shape, slots, length) / mesh.size),
        ]
    if not config.steps.full_depth and _can_extrapolate(shape):
        lines.append(
            f"extrapolated from {DEPTHS[0]} and {DEPTHS[1]} layers; --full_depth compiles all"
        )
    if config.steps.quick:
        lines.append("compiled with --quick, which overestimates memory and traffic")
    return lines


def read_shape(path: str) -> TransformerConfig:
    """The configuration of a model from its directory or its config.json."""
    file = Path(path).expanduser()
    if not file.is_file():
        return read_pretrained_config(path)
    try:
        fields = json_object(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{file}' is no config.json of a model: {error}.") from error
    fields, where = text_part(fields, str(file))
    return family_of(fields.get("model_type"), where).from_hugging_face(fields, where)


def topology_devices(topology: str) -> list:
    """The devices of a topology. TPUs may be absent, but the package `libtpu` is needed."""
    name, _, sizes = topology.partition(":")
    if name == "cpu":
        devices = jax.devices("cpu")
        if len(devices) != int(sizes):
            raise ConfigError(
                f"there are {len(devices)} host devices, and the topology has {sizes}: set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={sizes}."
            )
        return devices
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # the compiler's library may raise anything
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(
            f"there is no compiler for topology {topology!r} here: {reason}. TPUs need `pip "
            "install 'jax[tpu]'`; cpu:N needs nothing."
        ) from error


def attempt(compiled) -> Program | str:
    """`compiled()`, or the compiler's message if the program does not fit into memory."""
    try:
        return compiled()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = re.search(r"Used \S+ of \S+", str(error))
        return found[0] if found else str(error).strip().splitlines()[0]


def extrapolated(compiled, shape: TransformerConfig, full: bool) -> Program:
    """`compiled(shape)`, extrapolated from two small depths unless `full`."""
    depth = shape.num_hidden_layers
    if full or not _can_extrapolate(shape):
        return compiled(shape)
    one, two = (compiled(shallow(shape, n)) for n in DEPTHS)
    steps = (depth - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])

    def further(a: float, b: float) -> float:
        # The memory peak may move with depth, but never decreases.
        return a + max(b - a, 0) * steps

    none = Traffic(0, 0.0)
    kinds = sorted({*one.traffic, *two.traffic})
    return Program(
        {name: further(one.parts[name], two.parts[name]) for name in one.parts},
        further(one.flops, two.flops),
        further(one.accessed, two.accessed),
        {
            kind: Traffic(
                round(further(one.traffic.get(kind, none).runs, two.traffic.get(kind, none).runs)),
                further(one.traffic.get(kind, none).nbytes, two.traffic.get(kind, none).nbytes),
            )
            for kind in kinds
        },
        further(one.host, two.host),
    )


def _can_extrapolate(shape: TransformerConfig) -> bool:
    """Whether all layers are alike, so that a few represent all."""
    return shape.num_hidden_layers > max(DEPTHS) and len(set(shape.layers)) == 1


def shallow(shape: TransformerConfig, depth: int) -> TransformerConfig:
    """The model with only its first layers."""
    lists = {
        name: value[:depth]
        for name in ("layer_types", "no_rope_layers")
        if (value := getattr(shape, name))
    }
    dense = tuple(i for i in shape.dense_layers if i < depth)
    return dataclasses.replace(shape, num_hidden_layers=depth, dense_layers=dense, **lists)


def _model(config: PlanConfig, shape: TransformerConfig) -> Transformer:
    return Transformer(
        shape,
        jnp.dtype(config.model.dtype),
        jnp.dtype(config.model.param_dtype),
        gradient_checkpointing=True,
        gradient_checkpointing_policy=config.steps.gradient_checkpointing_policy,
        lora=_lora(config),
    )


def _lora(config: PlanConfig) -> LoRA | None:
    if not config.steps.use_peft:
        return None
    return LoRA(config.steps.lora_r, 2.0 * config.steps.lora_r, 0.0, (ALL_LINEAR,))


def update_program(config: PlanConfig, shape: TransformerConfig) -> Program:
    """The compiled training step of supervised fine-tuning."""
    steps = config.steps
    model = _model(config, shape)
    optimizer = OPTIMIZERS[steps.optim](1e-5)
    trainer = SFTTrainer(
        model,
        offload(optimizer) if steps.offload_optimizer else optimizer,
        gradient_accumulation_steps=steps.gradient_accumulation_steps,
        max_grad_norm=1.0,
    )

    def first_state(key):
        params = _quantized(config, fresh_params(model, key))
        return initial_state(model, trainer.optimizer, key, params)

    state = parallel.sharded_shapes(jax.eval_shape(first_state, _key()))
    rows = steps.per_device_train_batch_size * steps.gradient_accumulation_steps
    size = (rows * parallel.batch_shards(), steps.max_length)
    names = ("input_ids", "labels", "positions", "segment_ids")
    batch = {name: jax.ShapeDtypeStruct(size, jnp.int32) for name in names}
    compiled = trainer.train_step.lower(state, parallel.batch_shapes(batch)).compile()
    sizes = memory.with_activations(
        memory.state_sizes(state, steps.gradient_accumulation_steps), compiled.memory_analysis()
    )
    parts = dataclasses.asdict(sizes)
    return _program(compiled, parts, parts.pop("host"))


def _quantized(config: PlanConfig, params):
    kind = config.steps.quantize_base
    return params if kind is None else quantize_linear(params, kind)


def decode_program(config: PlanConfig, shape: TransformerConfig) -> Program:
    """The compiled decode step, of one token per slot."""
    layout, model = _layout(), _model(config, shape)
    B, S = config.steps.slots * layout.batch_shards, config.steps.max_length
    params = jax.eval_shape(lambda key: _quantized(config, fresh_params(model, key)), _key())
    params = parallel.unsharded_shapes(params, model.dtype)
    keys = jax.eval_shape(lambda key: jax.random.split(key, B), _key())
    cache, slots = jax.eval_shape(lambda keys: step.empty(model, keys, B, S, False), keys)

    def cut(leaf):
        heads = None if leaf.shape[1] % layout.sizes["tensor"] else "tensor"
        where = NamedSharding(layout.mesh, P(BATCH, heads))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    cache = jax.tree.map(cut, cache)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    compiled = step.run_segment.lower(
        model,
        params,
        cache,
        slots,
        jax.ShapeDtypeStruct((B,), bool),
        *jax.eval_shape(_rules),
        number,
        number,
        top_k=0,
        N=1,
    ).compile()
    account = compiled.memory_analysis()
    parts = {"parameters": parallel.bytes_per_device(params)}
    parts["cache"] = parallel.bytes_per_device(cache)
    rest = memory.total_bytes(account) - sum(parts.values())
    return _program(compiled, parts | {"activations": max(rest, 0)})


def _rules() -> tuple[Rules, step.StopRules]:
    """Rules of sampling at a temperature, with one EOS token."""
    end, number = jnp.zeros(1, jnp.int32), jnp.int32(0)
    return Rules(temperature=jnp.float32(1)), step.StopRules(end, number)


def _layout() -> parallel.Layout:
    layout = parallel.layout()
    assert layout is not None  # a plan always has a mesh
    return layout


def _program(compiled, parts: Mapping[str, float], host: float = 0.0) -> Program:
    costs = compiled.cost_analysis() or {}
    costs = costs[0] if isinstance(costs, list) else costs
    return Program(
        dict(parts),
        costs.get("flops", 0),
        costs.get("bytes accessed", 0),
        collectives(compiled.as_text()),
        host + compiled.memory_analysis().host_temp_size_in_bytes,
    )


def _key():
    """The shape of a key, since nothing can be computed on absent devices."""
    return jax.eval_shape(lambda: jax.random.key(0))


def described(program: Program | str, topology: str, flops: float) -> list[str]:
    """The lines that describe a program; `flops` are the model's, per device."""
    if isinstance(program, str):
        return [f"  does not fit, not compiled: {program}"]
    lines = [f"  {name:16} {format_bytes(n):>10}" for name, n in program.parts.items() if n]
    chip = CHIPS.get(topology.partition(":")[0])
    have = ""
    if chip is not None:
        fits = "fits" if program.total <= chip.memory else "does not fit"
        have = f" of {format_bytes(chip.memory)}: {fits}"
    lines.append(f"  {'total':16} {format_bytes(program.total):>10}{have}")
    if program.host:
        moved = f"{format_bytes(2 * program.host)} copied per step, both ways together"
        lines.append(f"  {'on the host':16} {format_bytes(program.host):>10}, {moved}")
    lines.append(f"  {'arithmetic':16} {flops / 1e12:>7.3g} TFLOP")
    for kind, (count, nbytes) in program.traffic.items():
        lines.append(f"  {kind:16} {format_bytes(nbytes):>10} in {count}")
    lines.append(f"  {'memory traffic':16} {format_bytes(program.accessed):>10} by XLA's count")
    if chip is not None:
        # All allocated memory is read at least once. XLA's count is useless here: it counts a whole
        # buffer if a part of it is read.
        times = {
            "arithmetic": flops / chip.flops,
            "memory": program.total / chip.bandwidth,
            "links": program.moved / chip.link,
        }
        most = max(times, key=times.__getitem__)
        parts = ", ".join(f"{name} {1e3 * seconds:.3g}" for name, seconds in times.items())
        lines.append(f"  at least {1e3 * times[most]:.3g} ms, by {most} (ms: {parts})")
    return lines
