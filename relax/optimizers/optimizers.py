"""Optimizers, and the course of their learning rate, under transformers' names.

Every optimizer here is made as `adamw(schedule, weight_decay=0.1)`, is optax's, and

- tells its learning rate in its state, once, so that it is among the metrics;
- keeps its state and computes in float32, whatever the precision of the parameters: a mean of
  squares that moves by a thousandth per update would stand still in bfloat16;
- decays matrices only: norms and biases (arrays of at most one axis) are left alone. The decay is
  decoupled: per update, a parameter loses learning rate * weight decay of itself.
"""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from relax.errors import ConfigError

SCHEDULES = (
    *("linear", "cosine", "constant", "constant_with_warmup"),
    *("cosine_with_min_lr", "wsd"),
)


def learning_rate_schedule(
    kind: str,
    learning_rate: float,
    total_steps: int,
    warmup_steps: int = 0,
    *,
    min_lr_rate: float = 0.0,
    num_decay_steps: int = 1,
) -> optax.Schedule:
    """The learning rate of update n, counted from 0.

    Warm-up rises linearly from 0, and is over at update `warmup_steps`. Then `linear` falls to 0
    at `total_steps`, `cosine` falls along half a cosine, `constant_with_warmup` stays.
    `cosine_with_min_lr` falls to `min_lr_rate` of the peak. `wsd` (warm-up, stable, decay)
    stays, and falls along half a cosine in the last `num_decay_steps` updates; it begins at
    `min_lr_rate` of the peak and ends there. `constant` has no warm-up, as in transformers.

    Args:
      kind: one of `SCHEDULES`.
      learning_rate: the peak.
      total_steps, warmup_steps: updates.
      min_lr_rate: in [0, 1), for the last two kinds.
      num_decay_steps: updates (>= 1), for `wsd`.

    Raises:
      ConfigError: an unknown kind, or phases of `wsd` that are longer than the run.

    Hu et al., MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training
    Strategies, 2024 (wsd).

    >>> schedule = learning_rate_schedule("linear", 1.0, total_steps=10, warmup_steps=2)
    >>> [float(schedule(n)) for n in (0, 1, 2, 6, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if kind not in SCHEDULES:
        raise ConfigError(f"unknown schedule {kind!r}. Known: {', '.join(SCHEDULES)}.")
    if kind == "constant":
        return optax.constant_schedule(learning_rate)
    floor = min_lr_rate if kind in ("cosine_with_min_lr", "wsd") else 0.0
    stable_steps = total_steps - warmup_steps - num_decay_steps if kind == "wsd" else 0
    if stable_steps < 0:
        raise ConfigError(
            "warmup_steps and num_decay_steps must fit into the run, got "
            f"{warmup_steps} + {num_decay_steps} of {total_steps} updates. Lower one of them."
        )
    decay_steps = max(total_steps - warmup_steps - stable_steps, 1)
    after = stable = optax.constant_schedule(learning_rate)
    if kind == "linear":
        after = optax.linear_schedule(learning_rate, 0.0, decay_steps)
    elif kind != "constant_with_warmup":
        after = optax.cosine_decay_schedule(learning_rate, decay_steps, alpha=floor)
    if stable_steps:
        after = optax.join_schedules([stable, after], [stable_steps])
    if not warmup_steps:
        return after
    begin = learning_rate * floor if kind == "wsd" else 0.0
    warmup = optax.linear_schedule(begin, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def eval_params(opt_state, params):
    """The weights to evaluate and to save.

    They are `params`, but for a schedule-free optimizer: its gradients are taken at `params`, and
    what it has learnt is an average that it keeps.

    Args:
      opt_state: of any optax optimizer.
      params: the parameters that it belongs to.
    """

    def is_average(node):
        return isinstance(node, optax.contrib.ScheduleFreeState)

    if isinstance(opt_state, ByKeyState):
        return {name: eval_params(opt_state.parts[name], part) for name, part in params.items()}
    nodes = jax.tree.leaves(opt_state, is_leaf=is_average)
    averages = [node for node in nodes if is_average(node)]
    return _average(averages[0], params) if averages else params


@jax.jit
def _average(state, params):
    average = optax.contrib.schedule_free_eval_params(state, params)
    return jax.tree.map(lambda x, y: x.astype(y.dtype), average, params)


def learning_rate(opt_state) -> jax.Array | None:
    """The rate of the last update, where an optimizer tells one."""
    found = optax.tree.get_all_with_path(
        opt_state, "learning_rate", filtering=lambda _, value: isinstance(value, jax.Array)
    )
    return found[0][1] if len(found) == 1 else None


class ByKeyState(NamedTuple):
    """State of `partition_by_key`: those of the optimizers within, by their names."""

    parts: dict[str, Any]


def partition_by_key(
    optimizers: dict[str, optax.GradientTransformation],
) -> optax.GradientTransformation:
    """An optimizer for each part of parameters that are a dict of parts, by the part's name."""

    def init(params):
        parts = {name: optimizer.init(params[name]) for name, optimizer in optimizers.items()}
        return ByKeyState(parts)

    def update(updates, state, params):
        both = {
            name: optimizer.update(updates[name], state.parts[name], params[name])
            for name, optimizer in optimizers.items()
        }
        moves, parts = ({name: pair[i] for name, pair in both.items()} for i in (0, 1))
        return moves, ByKeyState(parts)

    return optax.GradientTransformation(init, update)


class DelayedState(NamedTuple):
    """State of `freeze_for`: that of the optimizer within, and the updates left out."""

    inner: Any
    waited: jax.Array


def freeze_for(optimizer: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
    """Begins after so many updates; until then parameters and the optimizer's state stay."""
    if not steps:
        return optimizer

    def init(params):
        return DelayedState(optimizer.init(params), jnp.zeros((), jnp.int32))

    def update(updates, state, params):
        moves, inner = optimizer.update(updates, state.inner, params)
        waits = state.waited < steps
        moves = jax.tree.map(lambda move: jnp.where(waits, 0, move), moves)
        inner = jax.tree.map(lambda new, old: jnp.where(waits, old, new), inner, state.inner)
        return moves, DelayedState(inner, state.waited + waits)

    return optax.GradientTransformation(init, update)


def _matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    def cast(tree):
        return optax.tree.cast(tree, jnp.float32)

    def init(params):
        return inner.init(cast(params))

    def update(updates, state, params):
        return inner.update(cast(updates), state, cast(params))

    return optax.GradientTransformation(init, update)


def _optimizer(make):
    """Turns `make(learning_rate, **settings)` into what the head of this file promises."""

    @functools.wraps(make)
    def optimizer(schedule: optax.ScalarOrSchedule, **settings) -> optax.GradientTransformation:
        def inner(learning_rate):
            return _in_float32(make(learning_rate, **settings))

        return optax.inject_hyperparams(inner, hyperparam_dtype=jnp.float32)(schedule)

    return optimizer


@_optimizer
def adamw(learning_rate, *, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """Adam with decoupled weight decay.

    Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019.
    """
    return optax.adamw(
        learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=_matrices
    )


@_optimizer
def adafactor(learning_rate, *, weight_decay=0.0):
    """Steps scaled by the root of a second moment that has one value per row and per column.

    The learning rate is the schedule's: neither falling with the update's number nor scaled by the
    parameter's size, as in transformers' Trainer. Matrices with an axis below 128 keep the whole
    second moment, since little memory is to be had there. No first moment is kept.

    Shazeer and Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, 2018.
    """
    return optax.adafactor(
        learning_rate,
        multiply_by_parameter_scale=False,
        # optax takes off this part of a parameter as it stands, without the learning rate.
        weight_decay_rate=learning_rate * weight_decay,
        weight_decay_mask=_matrices,
    )


@_optimizer
def lion(learning_rate, *, b1=0.9, b2=0.99, weight_decay=0.0):
    """The sign of a mix of gradient and momentum; wants a third to a tenth of Adam's learning rate.

    A run from flags hands it adam_beta1 and adam_beta2, as transformers' Trainer does; the paper's
    are 0.9 and 0.99.

    Chen et al., Symbolic Discovery of Optimization Algorithms, 2023.
    """
    return optax.lion(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=_matrices)


@_optimizer
def muon(learning_rate, *, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """Momentum (0.95, Nesterov's) made orthogonal, for matrices; AdamW for all else.

    Matrices are the kernels of linear layers, and the last two axes of stacks of them, such as a
    layer's experts, each for itself. Embeddings, output heads, norms and biases go to AdamW, to
    which `b1`, `b2` and `eps` belong. An orthogonal step is scaled by 0.2 √max(rows, columns): its
    entries are then as large as those of AdamW's steps, and one learning rate fits both.

    Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024; Liu et al., Muon
    is Scalable for LLM Training, 2025 (the scale).
    """
    matrices = optax.contrib.muon(
        learning_rate,
        weight_decay=weight_decay,
        muon_weight_dimension_numbers=lambda tree: jax.tree.map(_last_two_axes, tree),
        consistent_rms=0.2,
    )
    others = optax.adamw(
        learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=_matrices
    )
    return optax.partition({"muon": matrices, "adamw": others}, _muon_or_adamw)


def _last_two_axes(leaf):
    return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)


def _muon_or_adamw(params):
    """Labels: a head is told by its name (`lm_head`, `value_head`, `score`), as embeddings are."""

    def label(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/").lower()
        outer = re.search(r"embed|head(/|$)|(^|/)score(/|$)", name)
        return "adamw" if leaf.ndim < 2 or outer else "muon"

    return jax.tree_util.tree_map_with_path(label, params)


@_optimizer
def sgd(learning_rate, *, weight_decay=0.0):
    """The gradient itself, without momentum: nothing is kept per parameter."""
    decay = optax.add_decayed_weights(weight_decay, _matrices)
    return optax.chain(decay, optax.sgd(learning_rate))


@_optimizer
def schedule_free_adamw(learning_rate, *, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """AdamW that averages its iterates instead of lowering its learning rate.

        y = (1 − b1) z + b1 x        gradients are taken here: `state.params`
        z ← z − learning rate * g(y) / (√v + eps)
        x ← (1 − c) x + c z          the average, c by the squares of the rates so far

    `eval_params` gives x, which is what is evaluated and saved. `b1` must be above 0. Wants a
    constant learning rate, with warm-up.

    Defazio et al., The Road Less Scheduled, 2024.
    """
    # optax.contrib.schedule_free_adamw, but for the mask of the decay, which it has none of.
    base = optax.chain(
        optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(weight_decay, _matrices),
        optax.scale_by_learning_rate(learning_rate),
    )
    return optax.contrib.schedule_free(base, learning_rate, b1=b1)


OPTIMIZERS = {
    make.__name__: make for make in (adamw, adafactor, lion, muon, sgd, schedule_free_adamw)
}
