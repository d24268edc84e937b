"""Seconds of a gated delta rule beside full attention of the same width, over lengths of a row.

    python benchmarks/delta.py

Each line is a forward and backward pass of one mixer with its projections, float32, with the heads
of Qwen 3.5 0.8B in proportion to the width. The two take turns, so that their ratio means something
on a shared machine; the least of some turns counts.
"""

import functools
import time

import fire
import jax
import jax.numpy as jnp

from relax.models import TransformerConfig
from relax.models.attention import attention_mask
from relax.models.mixers import MIXERS, Context
from relax.models.transformer import all_angles


def main(
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384),
    hidden_size: int = 512,
    turns: int = 3,
    segments: int = 1,
) -> None:
    """Prints a table of seconds.

    Args:
      segments: documents of equal length in a row.
    """
    print(f"{'tokens':>7} {'attention':>10} {'delta rule':>10} {'ratio':>6}")
    for T in lengths:
        runs = [_run(layer, hidden_size, T, segments) for layer in (0, 1)]
        best = [
            min(seconds)
            for seconds in zip(*([run() for run in runs] for _ in range(turns)), strict=True)
        ]
        print(f"{T:7,} {best[0]:10.3f} {best[1]:10.3f} {best[1] / best[0]:6.2f}", flush=True)


def _config(width: int) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=8,
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 512,
        head_dim=256,
        rotary_dim=64,
        qk_norm="head",
        norm_plus_one=True,
        attention_gate="entry",
        layer_types=("full_attention", "linear_attention"),
        conv_width=4,
        linear_num_key_heads=width // 64,
        linear_num_value_heads=width // 64,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
    )


def _run(layer: int, width: int, T: int, segments: int):
    """A function that makes one pass of a layer, compiled, and returns its seconds."""
    config = _config(width)
    spec = config.layers[layer]
    mixer = MIXERS[spec.mixer](config, spec, jnp.float32, jnp.float32)
    ids = (jnp.arange(T) * segments // T + 1)[None]
    positions = jnp.arange(T)[None]
    mask = attention_mask(ids, 1, T) if spec.mixer == "attention" else None
    context = Context(ids > 0, all_angles(config, positions)[spec], mask, ids)
    x = jax.random.normal(jax.random.key(0), (T, width))
    params = jax.jit(mixer.init)(jax.random.key(1), x, context, None)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(params, x, context):
        return jnp.square(mixer.apply(params, x, context, None)[0]).sum()

    jax.block_until_ready(gradients(params, x, context))

    def seconds() -> float:
        start = time.perf_counter()
        jax.block_until_ready(gradients(params, x, context))
        return time.perf_counter() - start

    return seconds


if __name__ == "__main__":
    fire.Fire(main)
