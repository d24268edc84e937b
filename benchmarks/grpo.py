"""Seconds of a GRPO update and where they go: `python benchmarks/grpo.py MODEL_DIR`.

One rollout of 4 prompts x 8 completions of exactly 32 new tokens (no token ends them), rewards from
a worker process, one update, as `run_grpo.py` does it: rollout, reward, the compiled step, and what
is left; the peak memory of the process; and the same update with each completion in a row of its
own behind a copy of its prompt, which is what the shared prompt saves.

Times on shared machines vary; the median and the best of several updates are printed.
"""

import resource
import time

import fire


def main(
    model_dir: str,
    prompts: int = 4,
    completions: int = 8,
    new_tokens: int = 32,
    updates: int = 6,
    dtype: str = "float32",
    gradient_checkpointing: bool = True,
    separate_rows: bool = True,
) -> None:
    """Prints a table."""
    from relax.parallel.cpu import prepare_cpu, release_freed_memory

    prepare_cpu()  # as run_grpo.py does
    import jax
    import jax.numpy as jnp

    from relax.data import load_tokenizer
    from relax.data.prompts import prepare_prompts
    from relax.models import load_pretrained
    from relax.optimizers import adamw, learning_rate_schedule
    from relax.sampling import SamplingConfig
    from relax.trainers import GRPOTrainer, TrainState

    model, params = load_pretrained(
        model_dir, jnp.dtype(dtype), gradient_checkpointing=gradient_checkpointing
    )
    tokenizer = load_tokenizer(model_dir)
    questions = [
        {"prompt": [{"role": "user", "content": f"What is {17 + i} + {58 - i}? Only the number."}]}
        for i in range(prompts)
    ]
    item = prepare_prompts([q | {"answer": "75"} for q in questions], tokenizer)
    item = {"prompt_ids": item.prompt_ids, "rows": item.rows}
    never = (model.config.vocab_size - 1,)  # ends a completion, and is not drawn
    optimizer = adamw(learning_rate_schedule("constant", 1e-6, 100))

    def trainer(row_size):
        made = GRPOTrainer(
            model,
            optimizer,
            reward_funcs=["last_number_match"],
            tokenizer=tokenizer,
            sampling=SamplingConfig(max_new_tokens=new_tokens, eos_token_ids=never),
            num_generations=completions,
            max_grad_norm=1.0,
        )
        made.row_size = row_size
        return made

    shared = trainer(None)
    state = TrainState.create(params=params, optimizer=optimizer, rng=jax.random.key(0))
    del params
    rows = []
    for n in range(updates + 2):
        start_s = time.perf_counter()
        (given,) = shared.make_batches(state, item)
        made_s = time.perf_counter()
        state, metrics = shared.train_step(state, given.batch)
        jax.block_until_ready((state, metrics))
        if n == 0:
            release_freed_memory()
        elif n > 1:  # the first two compile and touch their memory
            times = {name: given.metrics[name] for name in given.metrics if name[:5] == "time/"}
            times["time/update"] = time.perf_counter() - made_s
            whole = time.perf_counter() - start_s
            rows.append(times | {"time/other": whole - sum(times.values()), "step": whole})
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    device, lengths = jax.devices()[0].device_kind, [len(ids) for ids in item["prompt_ids"]]
    print(
        f"{prompts} prompts of {min(lengths)} to {max(lengths)} tokens x {completions} completions "
        f"of {new_tokens}, {dtype}, on {device}"
    )
    print(f"  {'seconds of an update':24} {'median':>9} {'best':>9}")
    for name in rows[0]:
        seconds = sorted(row[name] for row in rows)
        print(f"  {name:24} {seconds[len(seconds) // 2]:9.3f} {seconds[0]:9.3f}")
    print(f"  {'peak memory, GB':24} {peak_gb:9.2f}")
    if separate_rows:
        _compare(trainer, state, item, updates)


def _compare(trainer, state, item, updates: int) -> None:
    """The compiled step alone, prompts shared and not, one after the other in turns."""
    import jax

    seconds = {"shared prompt": [], "separate rows": []}
    trainers = dict(zip(seconds, (trainer(None), trainer(1)), strict=True))
    batches = {}
    for name, made in trainers.items():
        (given,) = made.make_batches(state, item)
        batches[name] = given.batch
    for _ in range(updates + 1):
        for name, made in trainers.items():
            start_s = time.perf_counter()
            state, metrics = made.train_step(state, batches[name])
            jax.block_until_ready((state, metrics))
            seconds[name].append(time.perf_counter() - start_s)
    print("  update, in turns:")
    for name, values in seconds.items():
        values = sorted(values[1:])  # the first compiles
        print(f"  {name:24} {values[len(values) // 2]:9.3f} {values[0]:9.3f}")


if __name__ == "__main__":
    fire.Fire(main)
