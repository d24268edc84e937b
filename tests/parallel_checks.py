"""What `test_parallel.py` claims, on eight forced CPU devices: prints one JSON line per check.

`XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/parallel_checks.py`
"""

import json
import sys
import traceback

import jax
import numpy as np
import optax

jax.config.update("jax_numpy_rank_promotion", "raise")

from relax import parallel  # noqa: E402
from relax.config.mesh import parse_mesh  # noqa: E402
from relax.models import Transformer, TransformerConfig  # noqa: E402
from relax.trainers import SFTTrainer  # noqa: E402

MESHES = ("data=8", "data=2,fsdp=4", "data=2,fsdp=2,tensor=2", "fsdp=2,tensor=2", "data=1")
V, T = 24, 12
SHAPE = TransformerConfig(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    tie_word_embeddings=False,
    attention_bias=True,
    initializer_range=0.2,
)


def shape(**changes):
    import dataclasses

    return dataclasses.replace(SHAPE, **changes)


def use(mesh, config=SHAPE):
    """A mesh over the first of the devices."""
    count = np.prod(list(parse_mesh(mesh).values()))
    mesh = parallel.make_mesh(mesh, jax.devices()[: int(count)])
    return parallel.use(mesh, heads=config.num_key_value_heads)


def sft_batches(count, rows=16, seed=0):
    """Rows of two documents and padding, of which some tokens are trained."""
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(count):
        ids = rng.integers(0, V, (rows, T)).astype(np.int32)
        cut = rng.integers(2, T - 3, (rows, 1))
        places = np.arange(T)[None, :]
        segments = np.where(places < cut, 1, np.where(places < T - 2, 2, 0)).astype(np.int32)
        positions = np.where(places < cut, places, places - cut).astype(np.int32)
        labels = np.where((rng.random((rows, T)) < 0.6) & (segments > 0), ids, -100)
        batches.append(
            {
                "input_ids": ids,
                "labels": labels.astype(np.int32),
                "positions": positions,
                "segment_ids": segments,
            }
        )
    return batches


def run_sft(config=SHAPE, **options):
    """Losses of three updates and an evaluation, and the parameters after them."""
    model = Transformer(config, gradient_checkpointing=True)
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 1.0} | options
    trainer = SFTTrainer(model, optax.adamw(1e-2), loss_chunk_size=8, **options)
    losses = []

    class Log:
        def __getattr__(self, name):
            return lambda *_: None if name != "state_dict" else {}

        def on_batch_end(self, event):
            losses.append(float(event.metrics["loss"]))

        def on_validation_end(self, event):
            losses.append(float(event.metrics["loss"]))

    trainer.callbacks = (Log(),)
    batches = sft_batches(4)
    state = trainer.train(batches[:3], key=jax.random.key(0), eval_loader=batches[3:])
    sizes = trainer.train_step._cache_size()
    return losses, jax.tree.map(np.asarray, state.params), sizes, state


def same(found, wanted, tolerance=1e-5):
    worst = max(
        float(np.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    )
    assert worst < tolerance, worst
    return worst


def check_sft():
    told = {}
    for name, config in {
        "grouped": SHAPE,
        "three heads": shape(num_attention_heads=3, num_key_value_heads=3, qk_norm="head"),
    }.items():
        losses, params, _, _ = run_sft(config)
        for mesh in MESHES if name == "grouped" else MESHES[2:3]:
            with use(mesh, config):
                found = run_sft(config)
            assert found[2] == 1, "compiled more than once"
            told[f"{name} {mesh}"] = [same(found[0], losses), same(found[1], params)]
    return told


def check_weights_are_cut():
    with use("data=2,fsdp=2,tensor=2"):
        state = run_sft()[3]
    cut = state.params["layers_0"]["q_proj"]["kernel"]
    assert cut.sharding.shard_shape(cut.shape) == (8, 8), cut.sharding
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == cut.shape]
    assert moments and all(x.sharding == cut.sharding for x in moments)
    return parallel.bytes_per_device(state)


CHECKS = {name[6:]: f for name, f in globals().items() if name.startswith("check_")}


def main(names):
    assert jax.device_count() == 8, jax.devices()
    for name in names or CHECKS:
        try:
            print(json.dumps({"check": name, "told": CHECKS[name]()}), flush=True)
        except Exception:
            print(json.dumps({"check": name, "error": traceback.format_exc()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
