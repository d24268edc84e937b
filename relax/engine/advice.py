"""What to change where an update needs more memory than there is, computed from its sizes."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from relax.checkpoint.checkpointer import tree_bytes
from relax.config.text import format_bytes
from relax.engine.memory import Capacity, Sizes, rows_of
from relax.errors import ConfigError
from relax.optimizers.optimizers import OPTIMIZERS

MARGIN = 1.05  # an accelerator's own account of a program is exact but for fragmentation


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change of flags, and what it makes of the sizes, by estimate."""

    flags: str
    apply: Callable[[Sizes], Sizes]


def check(sizes: Sizes, capacity: Capacity, groups: list[list[Remedy]]) -> str | None:
    """Refuses an update that cannot fit.

    Args:
      sizes: what it needs, or at least needs where the activations are not known.
      capacity: what there is.
      groups: of remedies, see `advice`.

    Returns:
      A warning where it fits only if others make room; None: it fits.

    Raises:
      ConfigError: it needs more than there is, with the flag that makes it fit by estimate.
    """
    is_cpu = capacity.name == "cpu"
    if capacity.total is not None and sizes.total > capacity.total * (1 if is_cpu else MARGIN):
        least = "" if sizes.activations else "at least "
        raise ConfigError(
            f"an update needs {least}{format_bytes(sizes.total)}, and {capacity.name} has "
            f"{format_bytes(capacity.total)}. {advice(sizes, capacity.total, groups)}"
        )
    if capacity.free is not None and sizes.total > capacity.free:
        return (
            f"an update needs {format_bytes(sizes.total)}, and {format_bytes(capacity.free)} are "
            f"free. Should memory run out: {advice(sizes, capacity.free, groups)}"
        )
    return None


def advice(sizes: Sizes, limit: int, groups: list[list[Remedy]]) -> str:
    """Names the first change that is enough by estimate, or else the changes that are together.

    Args:
      limit: bytes to fit into.
      groups: in the order of preference; of a group, whose members go further and
        further, at most one is taken.
    """
    for remedy in (remedy for group in groups for remedy in group):
        after = remedy.apply(sizes)
        if after.total <= limit:
            return f"By estimate {remedy.flags} makes it fit ({format_bytes(after.total)})."
    flags = []
    for group in groups:
        after = group[-1].apply(sizes)
        if after.total < sizes.total:
            sizes = after
            flags.append(group[-1].flags)
        if sizes.total <= limit:
            return (
                f"By estimate no one flag is enough; together {' '.join(flags)} make it fit "
                f"({format_bytes(sizes.total)})."
            )
    return (
        f"By estimate no flags make it fit (all together: {format_bytes(sizes.total)}): take "
        "a smaller model or a larger device."
    )


def advice_for(config, trainer, state, batch=None) -> list[list[Remedy]]:
    """What can be changed about a run, first what leaves the result as it is; for `advice`.

    Args:
      config: a `TrainerConfig`.
      trainer: of a `relax.models.Transformer`.
      state: a `TrainState`, or its shapes.
      batch: of one update, or its shapes; None where activations are not known.
    """
    values, shape, groups = config.flat(), trainer.model.config, []
    if batch is not None:
        rows, length = rows_of(batch)
        rows //= trainer.gradient_accumulation_steps
        groups += [_keep_less(values, shape, rows * length), _fewer_rows(values, state)]
        if values["dtype"] == "float32":
            groups.append([Remedy("--dtype bfloat16", _scaled(0.5))])
    if not values["use_peft"] and values["freeze"] is None:
        groups.append([_adapters(values, shape)])
    groups.append(_optimizers(values, state))
    if values["param_dtype"] == "float32":
        groups.append([Remedy("--param_dtype bfloat16", _halve_parameters)])
    if batch is not None and "max_length" in values:
        shorter = [n for n in (length // 2, length // 4) if n >= 64]
        groups.append([Remedy(f"--max_length {n}", _scaled(n / length)) for n in shorter])
    return [group for group in groups if group]


def _with_activations(sizes: Sizes, estimate: float) -> Sizes:
    """Not less than the optimizer's own temporaries, which do not depend on the batch: measured on
    CPUs they are clipped gradients and updates."""
    least = min(2 * sizes.parameters, sizes.activations)
    return dataclasses.replace(sizes, activations=int(max(estimate, least)))


def _scaled(factor: float) -> Callable[[Sizes], Sizes]:
    return lambda sizes: _with_activations(sizes, sizes.activations * factor)


def _keep_less(values, shape, tokens: int) -> list[Remedy]:
    """Gradient checkpointing, and its policies that keep less and less per layer."""
    L, D, N = shape.num_hidden_layers, shape.hidden_size, shape.num_attention_heads
    heads, kv_heads = N * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    hidden = shape.intermediate_size
    if shape.num_experts:
        hidden = shape.num_experts_per_tok * shape.moe_intermediate_size
    width = jnp.dtype(values["dtype"]).itemsize
    kept = {"nothing": width * D}  # bytes per token and layer
    kept["attention"] = kept["nothing"] + width * heads + 4 * N
    kept["matmuls"] = kept["attention"] + width * (heads + 2 * kv_heads + 2 * D + 2 * hidden)
    policy = values["gradient_checkpointing_policy"]
    on = values["gradient_checkpointing"]
    order = ["matmuls", "attention", "nothing"]

    def apply(name, sizes):
        now = sizes.activations
        one_layer = now / L
        if on:
            one_layer = max(now - L * tokens * kept[policy], one_layer)
        return _with_activations(sizes, min(one_layer + L * tokens * kept[name], now))

    def flags(name):
        first = [] if on else ["--gradient_checkpointing true"]
        more = [] if name == "matmuls" else [f"--gradient_checkpointing_policy {name}"]
        return " ".join(first + more)

    later = order[order.index(policy) + 1 :] if on else order
    return [Remedy(flags(name), functools.partial(apply, name)) for name in later]


def _fewer_rows(values, state) -> list[Remedy]:
    """The same update in more micro-batches, whose gradients are summed in float32."""
    rows, steps = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
    sums = 4 * sum(leaf.size for leaf in jax.tree.leaves(state.params)) if steps == 1 else 0

    def apply(parts, sizes):
        scaled = _scaled(1 / parts)(sizes)
        return dataclasses.replace(scaled, gradients=sizes.gradients + sums)

    return [
        Remedy(
            f"--per_device_train_batch_size {rows // parts} "
            f"--gradient_accumulation_steps {steps * parts}",
            functools.partial(apply, parts),
        )
        for parts in range(2, rows + 1)
        if rows % parts == 0
    ]


def _adapters(values, shape) -> Remedy:
    D, F = shape.hidden_size, shape.intermediate_size
    heads = shape.num_attention_heads * shape.head_dim
    kv_heads = shape.num_key_value_heads * shape.head_dim
    sides = 2 * (D + heads) + 2 * (D + kv_heads) + (0 if shape.num_experts else 3 * (D + F))
    adapters = 4 * values["lora_r"] * shape.num_hidden_layers * sides  # bytes, in float32

    def apply(sizes):
        share = adapters / sizes.parameters
        return Sizes(
            parameters=adapters,
            frozen=sizes.frozen + sizes.parameters,
            gradients=int(sizes.gradients * share),
            optimizer=int(sizes.optimizer * share),
            activations=sizes.activations,
        )

    return Remedy("--use_peft", apply)


def _optimizers(values, state) -> list[Remedy]:
    """Those whose state is smaller."""
    now, found = tree_bytes(state.opt_state), []
    for name in ("adafactor", "sgd"):
        nbytes = tree_bytes(jax.eval_shape(OPTIMIZERS[name](1e-3).init, state.params))
        if nbytes < now and name != values["optim"]:
            apply = functools.partial(dataclasses.replace, optimizer=nbytes)
            found.append(Remedy(f"--optim {name}", apply))
    return found


def _halve_parameters(sizes: Sizes) -> Sizes:
    half = sizes.parameters // 2
    return dataclasses.replace(
        sizes, parameters=half, frozen=sizes.frozen // 2, gradients=sizes.gradients - half
    )
