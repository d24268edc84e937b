"""Optimizers over 25 updates of a small network, against torch's and transformers' own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from compare import difference
from peers import tiny_model
from transformers.training_args import OptimizerNames

from relax.config.foreign import nearest_value, own_value
from relax.optimizers import OPTIMIZERS
from relax.optimizers.optimizers import adafactor, adamw, lion, muon, sgd
from relax.trainers.update import clip_scale

SECTION = "Optimizers"
RNG = np.random.default_rng(9)
SHAPES = {"kernel": (6, 5), "bias": (5,), "norm": (6,)}
PARAMS = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
GRADIENTS = [
    {name: RNG.normal(size=shape).astype(np.float32) * scale for name, shape in SHAPES.items()}
    for scale in np.exp(RNG.normal(size=25)).astype(np.float32)
]
RATES = np.linspace(1e-2, 1e-3, len(GRADIENTS))


def ours(make, gradients=GRADIENTS, params=PARAMS, **settings):
    optimizer = make(lambda n: jnp.asarray(RATES, jnp.float32)[n], **settings)
    params = jax.tree.map(jnp.asarray, params)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in gradients:
        updates, state = update(step, state, params)
        params = optax.apply_updates(params, updates)
    return params


def theirs(make, gradients=GRADIENTS, params=PARAMS, weight_decay=0.0):
    """Parameters in two groups, as transformers' Trainer makes them: no decay of vectors."""
    tensors = {name: torch.nn.Parameter(torch.from_numpy(p.copy())) for name, p in params.items()}
    groups = [
        {"params": [t for t in tensors.values() if t.ndim > 1], "weight_decay": weight_decay},
        {"params": [t for t in tensors.values() if t.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = make([group for group in groups if group["params"]])
    for step, rate in zip(gradients, RATES, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = float(np.float32(rate))
        for name, tensor in tensors.items():
            tensor.grad = torch.from_numpy(step[name].copy())
        optimizer.step()
    return tensors


@pytest.mark.parametrize("decay", [0.0, 0.1])
def check_adamw(parity, decay):
    betas = {"betas": (0.8, 0.95), "eps": 1e-6}
    mine = ours(adamw, b1=0.8, b2=0.95, eps=1e-6, weight_decay=decay)
    other = theirs(lambda groups: torch.optim.AdamW(groups, lr=1.0, **betas), weight_decay=decay)
    parity.equal(
        f"`adamw`, `weight_decay` {decay}", "torch", "weights after 25 updates", mine, other
    )


def check_sgd(parity):
    mine = ours(sgd)
    other = theirs(lambda groups: torch.optim.SGD(groups, lr=1.0))
    parity.equal("`sgd`", "torch", "weights after 25 updates", mine, other)
    mine = ours(sgd, weight_decay=0.1)
    other = theirs(lambda groups: torch.optim.SGD(groups, lr=1.0), weight_decay=0.1)
    parity.equal("`sgd`, `weight_decay` 0.1", "torch", "weights after 25 updates", mine, other)


def check_adafactor(parity):
    """transformers' Trainer makes it without scaling by the parameter and relative steps."""
    fixed = {"scale_parameter": False, "relative_step": False}

    def make(groups):
        return transformers.Adafactor(groups, lr=1.0, **fixed)

    vectors = [{name: g for name, g in step.items() if name != "kernel"} for step in GRADIENTS]
    params = {name: p for name, p in PARAMS.items() if name != "kernel"}
    mine, other = ours(adafactor, vectors, params), theirs(make, vectors, params)
    subject = "`adafactor`, vectors"
    parity.equal(subject, "transformers", "weights after 25 updates", mine, other, tolerance=1e-5)
    large = {"kernel": RNG.normal(size=(130, 140)).astype(np.float32)}
    steps = [{"kernel": RNG.normal(size=(130, 140)).astype(np.float32)} for _ in GRADIENTS]
    mine, other = ours(adafactor, steps, large), theirs(make, steps, large)
    subject = "`adafactor`, matrices of 128 and more"
    parity.equal(subject, "transformers", "weights after 25 updates", mine, other, tolerance=1e-5)
    small = {"kernel": PARAMS["kernel"]}
    steps = [{"kernel": step["kernel"]} for step in GRADIENTS]
    parity.departs(
        "`adafactor`, smaller matrices",
        "transformers",
        "weights after 25 updates",
        ours(adafactor, steps, small),
        theirs(make, steps, small),
        "ReLax keeps the whole second moment of matrices with an axis below 128, as optax does; "
        "transformers factors all matrices.",
    )


def check_muon(parity):
    """torch's Muon takes matrices only; its `match_rms_adamw` is the scale of ReLax."""
    matrix = {"kernel": PARAMS["kernel"]}
    steps = [{"kernel": step["kernel"]} for step in GRADIENTS]

    def make(groups):
        settings = {"momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
        return torch.optim.Muon(groups, lr=1.0, **settings)

    mine = ours(muon, steps, matrix, weight_decay=0.1)["kernel"] - PARAMS["kernel"]
    other = theirs(make, steps, matrix, weight_decay=0.1)["kernel"].detach() - PARAMS["kernel"]
    why = (
        "ReLax orthogonalises in float32, torch in bfloat16; ReLax also corrects the bias of the "
        "momentum, as optax does. Together they change the sum of these updates by 1 to 2 %."
    )
    assert difference(mine, other) < 0.03
    parity.departs("`muon`, a matrix", "torch", "change in 25 updates", mine, other, why)


def check_lion(parity):
    mine = ours(lion, b1=0.9, b2=0.99, weight_decay=0.1)
    reference = optax.lion(
        lambda n: jnp.asarray(RATES, jnp.float32)[n],
        weight_decay=0.1,
        mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree),
    )
    parity.equal(
        "`lion`, `weight_decay` 0.1",
        "optax",
        "weights after 25 updates",
        mine,
        ours(lambda schedule: reference),
    )


def check_which_weights_decay(parity):
    """Here a matrix or more axes; in transformers' Trainer what is not named bias or norm."""
    model = tiny_model()
    names = transformers.Trainer.get_decay_parameter_names(None, model)
    mine = [name for name, weight in model.named_parameters() if weight.ndim > 1]
    parity.equal("weights that decay", "transformers", "names", sorted(mine), sorted(names))


def check_clipping(parity):
    for most in (0.5, 100.0):
        tensors = [torch.nn.Parameter(torch.from_numpy(p)) for p in PARAMS.values()]
        for tensor, gradient in zip(tensors, GRADIENTS[0].values(), strict=True):
            tensor.grad = torch.from_numpy(gradient.copy())
        norm = torch.nn.utils.clip_grad_norm_(tensors, most)
        ours_norm = optax.global_norm(GRADIENTS[0])
        scale = clip_scale(ours_norm, most)
        subject = f"`max_grad_norm` {most}"
        parity.equal(subject, "torch", "norm", ours_norm, norm)
        mine = [np.asarray(g * scale) for g in GRADIENTS[0].values()]
        parity.equal(subject, "torch", "gradients", mine, [t.grad for t in tensors])


def check_which_optimizers_are_not_there(parity):
    for name in sorted(name.value for name in OptimizerNames):
        if own_value("optim", name) not in OPTIMIZERS:
            why = nearest_value("optim", name).removeprefix("; ")
            parity.missing(f"`--optim {name}`", "transformers", why)
