"""Cost of a distillation step: `python benchmarks/distillation.py`.

Student and teacher have the sizes of SmolLM2-135M and random weights. Rows are full, every token
but the first is trained on, over the whole vocabulary. Compares the compiled step of distillation
with that of SFT on the same tokens plus a forward pass of the teacher: seconds, and memory by XLA's
account. The programs take turns, and the fastest of each counts: times on shared machines vary.
"""

import time

import fire


def main(
    rows: int = 4, tokens: int = 256, steps: int = 3, beta: float = 0.5, layers: int = 30
) -> None:
    """Prints a table; `--layers 6` is a quick look."""
    from relax.parallel.cpu import prepare_cpu

    prepare_cpu()  # as run_distill.py does
    import jax
    import jax.numpy as jnp
    import numpy as np

    from relax.data import Encoded, arithmetic_tokenizer
    from relax.models import Transformer
    from relax.models.forward import hidden_states
    from relax.optimizers import adamw, learning_rate_schedule
    from relax.trainers import DistillationTrainer, SFTTrainer, Teacher
    from relax.trainers.state import fresh_params

    model = Transformer(_smollm2(layers), gradient_checkpointing=True)
    optimizer = adamw(learning_rate_schedule("constant", 1e-5, steps))
    teacher = fresh_params(model, jax.random.key(1))
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, tokens), np.int32)
    labels = np.where(np.arange(tokens) > 0, ids, -100)
    sft = SFTTrainer(model, optimizer, max_grad_norm=1.0)
    distillation = DistillationTrainer(
        model,
        optimizer,
        teachers=[Teacher(model, teacher)],
        donate_params=True,
        tokenizer=arithmetic_tokenizer(),
        beta=beta,
        lmbda=0.0,
        max_grad_norm=1.0,
    )
    item = {
        "prompt_ids": [row[:1].tolist() for row in ids],
        "rows": [{"prompt": ""}] * rows,
        "examples": [Encoded(*row) for row in zip(ids, labels, strict=True)],
    }
    state = distillation.create_train_state(jax.random.key(0))
    (given,) = distillation.make_batches(state, item)
    batches = {
        "SFT": {"input_ids": ids, "labels": labels, "segment_ids": np.ones_like(ids)},
        "distillation": {name: jnp.asarray(value) for name, value in given.batch.items()},
    }
    names = ("input_ids", "positions", "segment_ids")
    forward = jax.jit(lambda params, batch: hidden_states(model, params, batch)[0])
    frozen, seconds, memory = state.frozen, {}, {}
    states = {"SFT": state.replace(frozen={}), "distillation": state}
    compiled = {
        name: trainer.train_step.lower(states[name], batches[name]).compile()
        for name, trainer in (("SFT", sft), ("distillation", distillation))
    }
    read = {name: batches["distillation"][name] for name in names}
    state = states.pop("distillation")
    states.clear()
    for _ in range(steps + 1):
        for name in ("SFT", "distillation", "teacher"):
            start = time.perf_counter()
            if name == "teacher":
                jax.block_until_ready(forward(frozen["teacher_0"], read))
            else:  # the frozen weights are donated, and come back
                held = frozen if name == "distillation" else {}
                state, metrics = compiled[name](state.replace(frozen=held), batches[name])
                jax.block_until_ready(metrics)
                frozen = state.frozen or frozen
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    least = {name: min(values[1:]) for name, values in seconds.items()}
    for name, program in compiled.items():
        account = program.memory_analysis()
        memory[name] = account.argument_size_in_bytes + account.temp_size_in_bytes
        memory[name] += account.output_size_in_bytes - account.alias_size_in_bytes
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))
    bound_s, bound = least["SFT"] + least["teacher"], memory["SFT"] + weights
    rows_of = batches["distillation"]["input_ids"].shape
    print(f"{rows} x {tokens} tokens (packed {rows_of[0]} x {rows_of[1]}), beta {beta}, float32")
    for name in ("SFT", "teacher", "distillation"):
        print(f"  {name:14} {least[name]:8.2f} s {memory.get(name, weights) / 2**20:9.0f} MiB")
    ratios = least["distillation"] / bound_s, memory["distillation"] / bound
    print(f"  {'ratio to both':14} {ratios[0]:8.2f}   {ratios[1]:9.2f}")


def _smollm2(layers: int):
    from relax.models import TransformerConfig

    return TransformerConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


if __name__ == "__main__":
    fire.Fire(main)
