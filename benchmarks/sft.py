"""Speed and memory of the compiled training step: `python benchmarks/sft.py MODEL_DIR`.

In place of a directory, `gemma3-270m`, `gemma4-e2b` and `qwen3.5-0.8b` stand for random models of
those sizes; `--layers` cuts them to so many layers, with as large a part of them sharing keys. With
`--use_peft`, adapters are trained beside all weights, and the memory that this saves is printed;
with `--noall_weights` adapters alone are.

Per shape of full batches (no padding, every token trained), in a process of its own: tokens per
second, the matrix-multiply rate that this reaches (6 x parameters x tokens / s; 4 x with adapters,
as frozen weights have no gradient; without tables that are only looked up), the machine's own
peak (a 2048 x 2048 float32 product, measured before and after the steps), their ratio, the peak
memory of the whole process, the memory of the compiled step by XLA's account, and the compile time.

Times on shared machines vary; the ratio is what to compare.
"""

import concurrent.futures
import multiprocessing
import resource
import time

import fire

SHAPES = ((4, 256), (8, 512))
PEAK_SIZE = 2048
SLIDING, FULL = "sliding_attention", "full_attention"
RANDOM = {
    "gemma3-270m": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32768,
        "sliding_window": 512,
    },
    "gemma4-e2b": {
        "model_type": "gemma4_text",
        "vocab_size": 262144,
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "layer_types": ([SLIDING] * 4 + [FULL]) * 7,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "final_logit_softcapping": 30.0,
    },
    "qwen3.5-0.8b": {
        "model_type": "qwen3_5_text",
        "vocab_size": 248320,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "linear_num_value_heads": 16,
        "max_position_embeddings": 262144,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25},
    },
}


def main(
    model_dir: str,
    steps: int = 5,
    dtype: str = "float32",
    gradient_checkpointing: bool = True,
    loss_chunk_size: int = 256,
    use_peft: bool = False,
    all_weights: bool = True,
    layers: int = 0,
    shape: str = "",
) -> None:
    """Prints a table; `--shape 4x256` measures that shape alone."""
    settings = {
        "steps": steps,
        "dtype": dtype,
        "gradient_checkpointing": gradient_checkpointing,
        "loss_chunk_size": loss_chunk_size,
        "layers": layers,
    }
    for rows, tokens in [tuple(map(int, shape.split("x")))] if shape else SHAPES:
        variants = (*((False,) if all_weights else ()), *((True,) if use_peft else ()))
        found = [_in_a_process(model_dir, rows, tokens, peft, settings) for peft in variants]
        devices = {column.pop("device") for column in found}
        print(f"{rows} x {tokens}, {dtype}, on {', '.join(devices)}")
        if len(variants) > 1:
            print(f"  {'':34} {'all weights':>12} {'adapters':>12} {'ratio':>6}")
        for name in found[0]:
            values = [column[name] for column in found]
            shown = [f"{v:>12,.3f}" if v < 100 else f"{v:>12,.0f}" for v in values]
            shown += [f"{values[1] / values[0]:>6.2f}"] if len(values) > 1 else []
            print(f"  {name:34} {' '.join(shown)}")


def _in_a_process(*arguments) -> dict:
    """`_measure` in a process of its own, whose peak of memory is its own too."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
        return pool.submit(_measure, *arguments).result()


def _measure(model_dir, rows, tokens, use_peft, settings) -> dict:
    from relax.parallel.cpu import prepare_cpu, release_freed_memory

    prepare_cpu()  # as run_sft.py does
    import jax
    import jax.numpy as jnp
    import numpy as np

    from relax.models.config import LoRA
    from relax.optimizers import adamw, learning_rate_schedule
    from relax.trainers import SFTTrainer
    from relax.trainers.state import initial_state

    steps = settings["steps"]
    names = ("dtype", "gradient_checkpointing", "layers")
    model, params = _model(model_dir, *(settings[name] for name in names))
    if use_peft:
        model = model.clone(lora=LoRA(target_modules=("all-linear",)))
    optimizer = adamw(learning_rate_schedule("constant", 1e-5, steps))
    trainer = SFTTrainer(
        model, optimizer, loss_chunk_size=settings["loss_chunk_size"], max_grad_norm=1.0
    )
    state = initial_state(model, optimizer, jax.random.key(0), params)
    del params
    trained, count = (
        sum(leaf.size for leaf in jax.tree.leaves(tree))
        for tree in (state.params, (state.params, state.frozen))
    )
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
    looked_up = "embed_tokens_per_layer"
    kept = (state.params.get(looked_up), state.frozen.get("base", {}).get(looked_up))
    learnt, still = (0 if leaf is None else leaf.size for leaf in kept)
    multiplied = 2 * (count - learnt - still) + (trained - learnt)
    reached = 2 * multiplied * rate / 1e9
    memory = compiled.memory_analysis()
    return {
        "device": jax.devices()[0].device_kind,
        "parameters, millions": count / 1e6,
        "of which trained, millions": trained / 1e6,
        "tokens/s": rate,
        "tokens/s, median step": rows * tokens / float(np.median(step_s)),
        "matrix rate reached, GFLOP/s": reached,
        "matrix peak, GFLOP/s": peak,
        "share of the peak": reached / peak,
        "peak memory of the process, GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "state and batch, GB": memory.argument_size_in_bytes / 1e9,
        "temporaries of the step, GB": memory.temp_size_in_bytes / 1e9,
        "compile, s": compile_s,
    }


def _model(name, dtype, gradient_checkpointing, layers):
    """The model and its parameters."""
    import flax.traverse_util
    import jax.numpy as jnp
    import numpy as np

    from relax.models import Transformer, load_pretrained
    from relax.models.families import family_of
    from relax.models.huggingface.tensors import leaf_shapes

    dtype = jnp.dtype(dtype)
    if name not in RANDOM:
        return load_pretrained(name, dtype, gradient_checkpointing=gradient_checkpointing)
    fields = RANDOM[name]
    if layers:
        types, shared = fields.get("layer_types"), fields.get("num_kv_shared_layers", 0)
        fields = fields | {
            "num_hidden_layers": layers,
            **({"layer_types": types[:layers]} if types else {}),
            **({"num_kv_shared_layers": layers * shared // len(types)} if shared else {}),
        }
    config = family_of(fields["model_type"]).from_hugging_face(fields)
    rng = np.random.default_rng(0)  # takes no compiling, as the model's own initialisation would

    def leaf(shape):
        numbers = rng.standard_normal(shape, np.float32)
        numbers *= 0.02  # in place: tables of embeddings take gigabytes
        return jnp.asarray(numbers)

    params = {path: leaf(shape) for path, shape in leaf_shapes(config).items()}
    model = Transformer(config, dtype, gradient_checkpointing=gradient_checkpointing)
    return model, flax.traverse_util.unflatten_dict(params)


if __name__ == "__main__":
    fire.Fire(main)
