"""Speed and memory of the compiled training step: `python benchmarks/sft.py MODEL_DIR`.

Per shape of full batches (no padding, every token trained), in a process of its own: tokens per
second, the matrix-multiply rate that this reaches (6 x parameters x tokens / s), the machine's own
peak (a 2048 x 2048 float32 product, measured before and after the steps), their ratio, the peak
memory of the whole process, the memory of the compiled step by XLA's account, and the compile time.

Times on shared machines vary; the ratio is what to compare.
"""

import json
import resource
import subprocess
import sys
import time

import fire

SHAPES = ((4, 256), (8, 512))
PEAK_SIZE = 2048


def main(
    model_dir: str,
    steps: int = 5,
    dtype: str = "float32",
    gradient_checkpointing: bool = True,
    loss_chunk_size: int = 256,
    shape: str = "",
) -> None:
    """Prints a table, or with `--shape 4x256` one JSON object for that shape."""
    if shape:
        rows, tokens = map(int, shape.split("x"))
        print(
            json.dumps(
                _measure(
                    model_dir, rows, tokens, steps, dtype, gradient_checkpointing, loss_chunk_size
                )
            )
        )
        return
    for rows, tokens in SHAPES:
        command = [sys.executable, __file__, model_dir, f"--shape={rows}x{tokens}"]
        command += [f"--steps={steps}", f"--dtype={dtype}", f"--loss_chunk_size={loss_chunk_size}"]
        command += [f"--gradient_checkpointing={gradient_checkpointing}"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"{rows} x {tokens}, {dtype}, on {found.pop('device')}")
        for name, value in found.items():
            print(f"  {name:34} {value:>12,.3f}" if value < 100 else f"  {name:34} {value:>12,.0f}")


def _measure(model_dir, rows, tokens, steps, dtype, gradient_checkpointing, loss_chunk_size):
    from relax.cpu import prepare_cpu, release_freed_memory

    prepare_cpu()  # as run_sft.py does
    import jax
    import jax.numpy as jnp
    import numpy as np

    from relax.models import load_pretrained
    from relax.trainers import SFTTrainer, TrainState
    from relax.trainers.optimizer import adamw, learning_rate_schedule

    model, params = load_pretrained(
        model_dir, jnp.dtype(dtype), gradient_checkpointing=gradient_checkpointing
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    optimizer = adamw(learning_rate_schedule("constant", 1e-5, steps))
    trainer = SFTTrainer(model, optimizer, loss_chunk_size=loss_chunk_size, max_grad_norm=1.0)
    state = TrainState.create(params=params, optimizer=optimizer, rng=jax.random.key(0))
    del params
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, tokens), np.int32)
    batch = {"input_ids": ids, "labels": ids, "segment_ids": np.ones_like(ids)}

    start = time.perf_counter()
    compiled = trainer.train_step.lower(state, batch).compile()
    compile_s = time.perf_counter() - start
    square = jnp.ones((PEAK_SIZE, PEAK_SIZE))
    product = jax.jit(lambda a: a @ a)

    def seconds(f):
        start = time.perf_counter()
        out = jax.block_until_ready(f())
        return time.perf_counter() - start, out

    step_s = []
    peak_s = [seconds(lambda: product(square))[0] for _ in range(12)]
    for step in range(steps + 2):
        if step == 1:
            release_freed_memory()
        took_s, (state, _) = seconds(lambda: compiled(state, batch))  # noqa: B023
        step_s.append(took_s)
    del step_s[:2]  # these touch their memory for the first time
    peak_s += [seconds(lambda: product(square))[0] for _ in range(12)]
    peak = 2 * PEAK_SIZE**3 / min(peak_s) / 1e9
    rate = rows * tokens / min(step_s)
    reached = 6 * count * rate / 1e9
    return {
        "device": jax.devices()[0].device_kind,
        "parameters, millions": count / 1e6,
        "tokens/s": rate,
        "tokens/s, median step": rows * tokens / float(np.median(step_s)),
        "matrix rate reached, GFLOP/s": reached,
        "matrix peak, GFLOP/s": peak,
        "share of the peak": reached / peak,
        "peak memory of the process, GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "temporaries of the step, GB": compiled.memory_analysis().temp_size_in_bytes / 1e9,
        "compile, s": compile_s,
    }


if __name__ == "__main__":
    fire.Fire(main)
