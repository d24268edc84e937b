"""Speed of generation: `python benchmarks/generate.py MODEL_DIR`.

Per batch size, in a process of its own, 64 prompt tokens and 64 new ones: tokens per second of
prefill and of decoding, apart; and the share of the machine's bound that decoding reaches. A step
reads every weight once and multiplies it with every row, so its time is at least the larger of

    weight bytes / memory bandwidth    and    2 x weights x rows / matrix peak,

both measured in the same process (the sum of a large array, a 2048 x 2048 float32 product), before
and after. Then a mixed workload: 64 prompts x 8 samples, whose lengths are geometric with mean 40
and at most 256, through 64 slots; against the same rows in batches of 64 that each last until their
longest row has ended. The lengths are set by a limit per row, so that both do the same work. Last,
decoding in bfloat16, as rollouts with `rollout_dtype` do, against float32, in turns.

Times on shared machines vary; the shares and ratios are what to compare.
"""

import json
import subprocess
import sys
import time

import fire

BATCHES = (1, 16, 64)
PROMPT = NEW = 64
PEAK_SIZE = 2048
BANDWIDTH_FLOATS = 100_000_000
MEAN, MOST = 40, 256


def main(
    model_dir: str,
    dtype: str = "float32",
    repeats: int = 3,
    mixed_prompts: int = 64,
    part: str = "",
) -> None:
    """Prints a table, or with `--part 16` or `--part mixed` one JSON object for that part.

    mixed_prompts: prompts of the mixed workload, and its slots.
    """
    if part == "mixed":
        print(json.dumps(_mixed(model_dir, dtype, repeats, mixed_prompts)))
        return
    if part == "dtypes":
        print(json.dumps(_dtypes(model_dir, repeats)))
        return
    if part:
        print(json.dumps(_batch(model_dir, dtype, repeats, int(part))))
        return
    for part in (*map(str, BATCHES), "mixed", "dtypes"):
        command = [sys.executable, __file__, model_dir, f"--part={part}"]
        command += [f"--dtype={dtype}", f"--repeats={repeats}", f"--mixed_prompts={mixed_prompts}"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        what = f"batch {part}, {dtype}" if part.isdigit() else part
        print(f"{what}, on {found.pop('device')}")
        for name, value in found.items():
            print(f"  {name:50} {value:>12,.3f}" if value < 100 else f"  {name:50} {value:>12,.0f}")


def _load(model_dir, dtype):
    from relax.parallel.cpu import prepare_cpu

    prepare_cpu()  # as the scripts do
    import jax.numpy as jnp

    from relax.models import load_pretrained

    return load_pretrained(model_dir, jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))


def _prompts(model, count):
    import numpy as np

    return np.random.default_rng(0).integers(0, model.config.vocab_size, (count, PROMPT)).tolist()


def _machine(repeats=6):
    """Bytes and float32 operations per second, of the best of a few tries."""
    import jax
    import jax.numpy as jnp

    square, long = jnp.ones((PEAK_SIZE, PEAK_SIZE)), jnp.ones((BANDWIDTH_FLOATS,))
    product, total = jax.jit(lambda a: a @ a), jax.jit(jnp.sum)
    operations, moved = 2 * PEAK_SIZE**3, 4 * BANDWIDTH_FLOATS
    product_s = min(_seconds(lambda: product(square)) for _ in range(repeats))
    total_s = min(_seconds(lambda: total(long)) for _ in range(repeats))
    return moved / total_s, operations / product_s


def _seconds(f):
    import jax

    start = time.perf_counter()
    jax.block_until_ready(f())
    return time.perf_counter() - start


def _batch(model_dir, dtype, repeats, rows):
    import jax

    from relax.sampling import SamplingConfig, generate

    model, params = _load(model_dir, dtype)
    prompts, config = _prompts(model, rows), SamplingConfig(max_new_tokens=NEW, slots=rows)

    def run(new):
        return _seconds(
            lambda: generate(model, params, prompts, jax.random.key(0), config, limits=[new] * rows)
        )

    compile_s = run(NEW)
    run(1)
    bandwidth, peak = _machine()
    times = [(run(1), run(NEW)) for _ in range(repeats)]
    again = _machine()
    bandwidth, peak = max(bandwidth, again[0]), max(peak, again[1])
    first_s, all_s = (min(column) for column in zip(*times, strict=True))
    step_s = (all_s - first_s) / (NEW - 1)
    read, weights = _weights(model, params)
    bound = max(read / bandwidth, 2 * weights * rows / peak)
    return {
        "device": jax.devices()[0].device_kind,
        "decoding, tokens/s": rows / step_s,
        "decoding, ms per step": step_s * 1e3,
        "bound of the machine, tokens/s": rows / bound,
        "share of the bound": bound / step_s,
        "prefill, tokens/s": rows * PROMPT / max(first_s - step_s, 1e-9),
        "prefill and decoding, new tokens/s": rows * NEW / all_s,
        "memory bandwidth, GB/s": bandwidth / 1e9,
        "matrix peak, GFLOP/s": peak / 1e9,
        "first call, with compiling, s": compile_s,
    }


def _weights(model, params):
    """Bytes that a step reads, and how many weights a token is multiplied with."""
    import jax

    leaves = jax.tree.leaves(params)
    if not model.config.tie_word_embeddings:  # rows of the embedding alone are read
        leaves = jax.tree.leaves({k: v for k, v in params.items() if k != "embed_tokens"})
    return sum(leaf.nbytes for leaf in leaves), sum(leaf.size for leaf in leaves if leaf.ndim > 1)


def _mixed(model_dir, dtype, repeats, count):
    import jax
    import numpy as np

    from relax.sampling import SamplingConfig, batch, generate

    model, params = _load(model_dir, dtype)
    prompts, samples, slots = _prompts(model, count), 8, count
    limits = np.random.default_rng(1).geometric(1 / MEAN, count * samples).clip(max=MOST)
    config = SamplingConfig(max_new_tokens=MOST, n=samples, slots=slots)

    def continuous():
        generate(model, params, prompts, jax.random.key(0), config, limits=limits)

    def fixed():
        shrink, batch.SHRINK = batch.SHRINK, sys.maxsize  # a batch keeps all its slots to its end
        for start in range(0, count, slots // samples):
            some = slice(start, start + slots // samples)
            rows = slice(some.start * samples, some.stop * samples)
            key = jax.random.fold_in(jax.random.key(0), start)
            generate(model, params, prompts[some], key, config, limits=limits[rows])
        batch.SHRINK = shrink

    for f in (continuous, fixed):
        f()
    times = [(_seconds(continuous), _seconds(fixed)) for _ in range(max(1, repeats - 1))]
    continuous_s, fixed_s = (min(column) for column in zip(*times, strict=True))
    return {
        "device": jax.devices()[0].device_kind,
        "new tokens": int(limits.sum()),
        "through slots, new tokens/s": limits.sum() / continuous_s,
        "in fixed batches, new tokens/s": limits.sum() / fixed_s,
        "ratio": fixed_s / continuous_s,
    }


def _dtypes(model_dir, repeats):
    import jax
    import jax.numpy as jnp

    from relax.sampling import SamplingConfig, generate

    wide, params = _load(model_dir, "float32")
    models = {"float32": wide, "bfloat16": wide.clone(dtype=jnp.dtype("bfloat16"))}
    found = {"device": jax.devices()[0].device_kind}

    def step_s(name, rows):
        config = SamplingConfig(max_new_tokens=NEW, slots=rows)
        prompts, key = _prompts(wide, rows), jax.random.key(0)

        def run(new):
            limits = [new] * rows
            return _seconds(
                lambda: generate(models[name], params, prompts, key, config, limits=limits)
            )

        return (run(NEW) - run(1)) / (NEW - 1)

    for rows in BATCHES[1:]:
        for name in models:
            step_s(name, rows)
        times = [[step_s(name, rows) for name in models] for _ in range(repeats)]
        best = [min(column) for column in zip(*times, strict=True)]
        for name, seconds in zip(models, best, strict=True):
            found[f"decoding {rows} rows in {name}, tokens/s"] = rows / seconds
        found[f"ratio at {rows} rows"] = best[0] / best[1]
    return found


if __name__ == "__main__":
    fire.Fire(main)
