"""Gain of rollouts that reuse earlier ones: `python benchmarks/reuse.py MODEL_DIR`.

Three epochs of GRPO over the same prompts, 4 x 8 completions an item, at a learning rate of 1e-6.
Before the updates of an item the same completions are drawn with drafts and without, in turns, from
the same weights with the same keys: the share of tokens that the drafts give, and the ratio of the
two times. The first call of each compiles and is not counted.
"""

import dataclasses
import time

import fire

SHAPE = (4, 8)  # prompts of an item, completions of a prompt


def main(
    model_dir: str,
    items: int = 3,
    epochs: int = 3,
    new_tokens: int = 96,
    learning_rate: float = 1e-6,
    num_iterations: int = 1,
    turns: int = 2,
    dtype: str = "float32",
) -> None:
    """Prints a line per epoch.

    items: of an epoch; so many updates, times num_iterations, lie between two rollouts of a prompt.
    """
    from relax.parallel.cpu import prepare_cpu

    prepare_cpu()  # as run_grpo.py does
    import jax
    import jax.numpy as jnp

    from relax.data import load_tokenizer
    from relax.data.prompts import prepare_prompts
    from relax.models import load_pretrained
    from relax.optimizers import adamw, learning_rate_schedule
    from relax.sampling import SamplingConfig, generate
    from relax.trainers import GRPOTrainer

    model, params = load_pretrained(model_dir, jnp.dtype(dtype), gradient_checkpointing=True)
    tokenizer = load_tokenizer(model_dir)
    prompts = prepare_prompts([_question(i) for i in range(items * SHAPE[0])], tokenizer)
    trainer = GRPOTrainer(
        model,
        adamw(learning_rate_schedule("constant", learning_rate, 100)),
        reward_funcs=[lambda completions: [float(len(c[0]["content"])) for c in completions]],
        tokenizer=tokenizer,
        params=params,
        donate_params=True,
        sampling=SamplingConfig(max_new_tokens=new_tokens),
        num_generations=SHAPE[1],
        num_iterations=num_iterations,
        prompts_per_item=SHAPE[0],
        max_grad_norm=1.0,
        rollout_reuse=True,
    )
    state = trainer.create_train_state(jax.random.key(0))
    config = dataclasses.replace(trainer.sampling, coupled=True)
    keys = {i: jax.random.split(jax.random.key(i), SHAPE[0] * SHAPE[1]) for i in range(items)}
    drafts: dict[int, list] = {}

    def draw(i, given):
        start_s = time.perf_counter()
        ids = prompts.prompt_ids[i * SHAPE[0] : (i + 1) * SHAPE[0]]
        weights = trainer.model_params(state.params, state.frozen)
        out = generate(model, weights, ids, keys[i], config, drafts=given)
        return time.perf_counter() - start_s, out

    for epoch in range(epochs):
        times = {"plain": 0.0, "with drafts": 0.0}
        tokens = reused = differ = 0
        for i in range(items):
            kinds = {"plain": None, "with drafts": drafts.get(i)}
            best = dict.fromkeys(kinds, float("inf"))
            for _ in range(turns + 1 if epoch else 1):
                found = {name: draw(i, given) for name, given in kinds.items()}
                best = {name: min(best[name], found[name][0]) for name in kinds}
            times = {name: times[name] + best[name] for name in times}
            plain, out = found["plain"][1], found["with drafts"][1]
            tokens, reused = tokens + int(out.lengths.sum()), reused + out.reused
            differ += sum(a != b for a, b in zip(plain.completions, out.completions, strict=True))
            drafts[i] = out.completions
            state = _update(trainer, state, prompts, i, out)
        if epoch:
            print(
                f"epoch {epoch + 1}: {tokens:,} tokens, {reused / tokens:.1%} reused, "
                f"{tokens / times['plain']:.0f} tokens/s without drafts, "
                f"{tokens / times['with drafts']:.0f} with: "
                f"{times['plain'] / times['with drafts']:.2f} x; {differ} completions differ",
                flush=True,
            )


def _question(i: int) -> dict:
    text = f"What is {17 + 3 * i} + {58 - i} - {9 + i}? Explain it in a few words."
    return {"prompt": [{"role": "user", "content": text}]}


def _update(trainer, state, prompts, i: int, out):
    """The updates of an item on given completions."""
    from relax.trainers.rl.generation import decoder
    from relax.trainers.rl.rollout import make_rollout

    mine = slice(i * SHAPE[0], (i + 1) * SHAPE[0])
    item = {"prompt_ids": prompts.prompt_ids[mine], "rows": prompts.rows[mine]}
    rollout = make_rollout(item, out, trainer.sampling, decoder(trainer.tokenizer))
    scored = trainer.score(rollout)
    for logged in trainer.split_updates(state, scored, *trainer.timed_experience(state, scored)):
        state, _ = trainer.train_step(state, logged.batch)
    return state


if __name__ == "__main__":
    fire.Fire(main)
