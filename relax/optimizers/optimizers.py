"""Optimizers under transformers' names.

Every optimizer is constructed as `adamw(schedule, weight_decay=0.1)`, wraps optax's, and

- has its learning rate in its state, once, so that it can be logged;
- computes in float32, whatever the dtype of the parameters, and keeps its state so unless it is
  told otherwise: a mean of squares that changes by a thousandth per update would not change at all
  in bfloat16;
- decays matrices only, not norms and biases (arrays of at most one axis). The decay is decoupled:
  each update multiplies a parameter by 1 - learning rate * weight decay.
"""

import functools
import re

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from relax.optimizers.eight_bit import scale_by_adam_8bit
from relax.optimizers.host import is_on_host, to_device
from relax.optimizers.wrappers import ByKeyState


def eval_params(opt_state, params):
    """The weights to evaluate and to save: `params`, or a schedule-free optimizer's average.

    A schedule-free optimizer takes gradients at `params`; the average in its state is the model.

    Args:
      opt_state: the state of any optax optimizer.
      params: its parameters.
    """

    def is_found(node):
        return is_on_host(node) or isinstance(node, optax.contrib.ScheduleFreeState)

    if isinstance(opt_state, ByKeyState):
        return {name: eval_params(opt_state.parts[name], part) for name, part in params.items()}
    nodes = filter(is_found, jax.tree.leaves(opt_state, is_leaf=is_found))
    if (node := next(nodes, None)) is None:
        return params
    if is_on_host(node):
        parts = {name: {name: part} for name, part in params.items()}
        return {name: eval_params(node.on_host[name], parts[name])[name] for name in params}
    return _average(node, params)


@jax.jit
def _average(state, params):
    average = optax.contrib.schedule_free_eval_params(to_device(state), params)
    return jax.tree.map(lambda x, y: x.astype(y.dtype), average, params)


def learning_rate(opt_state) -> jax.Array | None:
    """Learning rate of the last update; None if the state holds none, or several."""

    def first(node):  # of the parts of a state on the host, which have the same
        return next(iter(node.on_host.values())) if is_on_host(node) else node

    opt_state = jax.tree.map(first, opt_state, is_leaf=is_on_host)
    found = optax.tree.get_all_with_path(
        opt_state, "learning_rate", filtering=lambda _, value: isinstance(value, jax.Array)
    )
    return found[0][1] if len(found) == 1 else None


def _matrices(params):
    """Which leaves are matrices, stacks of some included; the biases of experts are none."""

    def is_matrix(path, leaf):
        return leaf.ndim > 1 and not jax.tree_util.keystr(path[-1:], simple=True).endswith("bias")

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    def cast(tree):
        return optax.tree.cast(tree, jnp.float32)

    def init(params):
        return inner.init(cast(params))

    def update(updates, state, params):
        return inner.update(cast(updates), state, cast(params))

    return optax.GradientTransformation(init, update)


def _optimizer(make):
    """Decorator: `make(learning_rate, **settings)` -> `make(schedule, **settings)`, in float32."""

    @functools.wraps(make)
    def optimizer(schedule: optax.ScalarOrSchedule, **settings) -> optax.GradientTransformation:
        def inner(learning_rate):
            return _in_float32(make(learning_rate, **settings))

        return optax.inject_hyperparams(inner, hyperparam_dtype=jnp.float32)(schedule)

    return optimizer


@_optimizer
def adamw(learning_rate, *, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, mu_dtype=None):
    """Adam with decoupled weight decay; `mu_dtype`: dtype of the first moment, None: float32.

    Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019,
    https://arxiv.org/abs/1711.05101
    """
    return optax.adamw(
        learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        mask=_matrices,
        mu_dtype=mu_dtype,
    )


@_optimizer
def adamw_8bit(learning_rate, *, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """AdamW whose moments are stored in 8 bits, see `relax.optimizers.eight_bit`."""
    return optax.chain(
        scale_by_adam_8bit(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, _matrices),
        optax.scale_by_learning_rate(learning_rate),
    )


@_optimizer
def adafactor(learning_rate, *, weight_decay=0.0):
    """Steps scaled by the root of a second moment that has one value per row and per column.

    The learning rate is the schedule's, as in transformers' Trainer; it neither decays by itself
    nor scales with the parameter's size. Matrices with an axis below 128 keep the whole
    second moment, which saves little memory there. No first moment is kept.

    Shazeer and Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, 2018,
    https://arxiv.org/abs/1804.04235
    """
    return optax.adafactor(
        learning_rate,
        multiply_by_parameter_scale=False,
        # optax subtracts this fraction of a parameter without multiplying by the learning rate.
        weight_decay_rate=learning_rate * weight_decay,
        weight_decay_mask=_matrices,
    )


@_optimizer
def lion(learning_rate, *, b1=0.9, b2=0.99, weight_decay=0.0, mu_dtype=None):
    """Steps by the sign of mixed gradient and momentum; use a third to a tenth of Adam's rate.

    Runs pass adam_beta1 and adam_beta2, as transformers' Trainer does; the paper uses 0.9 and
    0.99.

    Chen et al., Symbolic Discovery of Optimization Algorithms, 2023,
    https://arxiv.org/abs/2302.06675
    """
    return optax.lion(
        learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=_matrices, mu_dtype=mu_dtype
    )


@_optimizer
def muon(learning_rate, *, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, mu_dtype=None):
    """Orthogonalised Nesterov momentum (0.95) for matrices, AdamW for all other parameters.

    Matrices are the kernels of linear layers and each matrix of a stack, such as a layer's experts.
    AdamW, with `b1`, `b2` and `eps`, updates embeddings, output heads, norms and biases. Orthogonal
    steps are scaled by 0.2 √max(rows, columns), which makes their entries as large as those of
    AdamW's steps, so that one learning rate fits both.

    Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024,
    https://kellerjordan.github.io/posts/muon; Liu et al., Muon is Scalable for LLM Training, 2025,
    https://arxiv.org/abs/2502.16982 (the scale).
    """
    matrices = optax.contrib.muon(
        learning_rate,
        weight_decay=weight_decay,
        muon_weight_dimension_numbers=lambda tree: jax.tree.map(_last_two_axes, tree),
        consistent_rms=0.2,
        mu_dtype=mu_dtype,
    )
    others = optax.adamw(
        learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        mask=_matrices,
        mu_dtype=mu_dtype,
    )
    return optax.partition({"muon": matrices, "adamw": others}, _muon_or_adamw)


def _last_two_axes(leaf):
    return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)


def _muon_or_adamw(params):
    """Labels; heads (`lm_head`, `value_head`, `score`) and embeddings are recognised by name.

    So are the kernels of convolutions, `weight`, and biases of experts, which are no matrices.
    """

    def label(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/").lower()
        outer = re.search(r"embed|head(/|$)|(^|/)score(/|$)|/weight$|bias$", name)
        return "adamw" if leaf.ndim < 2 or outer else "muon"

    return jax.tree_util.tree_map_with_path(label, params)


@_optimizer
def sgd(learning_rate, *, weight_decay=0.0):
    """Gradient descent without momentum: no state per parameter."""
    decay = optax.add_decayed_weights(weight_decay, _matrices)
    return optax.chain(decay, optax.sgd(learning_rate))


@_optimizer
def schedule_free_adamw(learning_rate, *, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """AdamW that averages its iterates instead of lowering its learning rate.

        y = (1 − b1) z + b1 x        gradients are taken here: `state.params`
        z ← z − learning rate * g(y) / (√v + eps)
        x ← (1 − c) x + c z          the average; c follows from the squared rates so far

    `eval_params` returns x, which is evaluated and saved. `b1` must be above 0. A constant learning
    rate after a warm-up (`constant_with_warmup`) works best.

    Defazio et al., The Road Less Scheduled, 2024, https://arxiv.org/abs/2405.15682
    """
    # optax.contrib.schedule_free_adamw decays norms and biases too: it takes no mask.
    base = optax.chain(
        optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(weight_decay, _matrices),
        optax.scale_by_learning_rate(learning_rate),
    )
    return optax.contrib.schedule_free(base, learning_rate, b1=b1)


OPTIMIZERS = {
    make.__name__: make
    for make in (adamw, adamw_8bit, adafactor, lion, muon, sgd, schedule_free_adamw)
}
