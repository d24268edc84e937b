"""Seconds of GRPO, DPO and SFT updates on rows of uneven length, beside another checkout's.

    python benchmarks/packing.py MODEL_DIR --other CHECKOUT

Every line is one update of the same synthetic tokens: GRPO with 4 prompts x 8 completions of
geometric lengths, DPO with 8 pairs of such lengths, SFT with 8 rows of 30 to 400 tokens. The two
checkouts take turns, each in a process of its own, so that their ratio means something on a shared
machine. Without `--other` this checkout is measured alone.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import fire

WORK = ("grpo", "dpo", "sft")


def main(
    model_dir: str,
    other: str | None = None,
    work: str = ",".join(WORK),
    turns: int = 3,
    updates: int = 3,
) -> None:
    """Prints a table: seconds of the best update, real tokens a second, and temporaries."""
    names = work if isinstance(work, (tuple, list)) else work.split(",")
    here = Path(__file__).parents[1]
    checkouts = {"here": here} | ({} if other is None else {"other": Path(other)})
    print(f"{'work':6} {'tokens':>7} {'':8} {'seconds':>9} {'tokens/s':>9} {'temporaries':>12}")
    for name in names:
        best: dict[str, dict] = {}
        for _ in range(turns):
            for which, path in checkouts.items():
                found = _run(path, model_dir, name, updates)
                if which not in best or found["seconds"] < best[which]["seconds"]:
                    best[which] = found
        for which, found in best.items():
            print(
                f"{name:6} {found['tokens']:7,} {which:8} {found['seconds']:9.3f} "
                f"{found['tokens'] / found['seconds']:9.0f} {found['temporaries'] / 1e9:9.2f} GB"
            )
        if len(best) == 2:
            ratio = best["other"]["seconds"] / best["here"]["seconds"]
            memory = best["here"]["temporaries"] / best["other"]["temporaries"]
            print(f"{name:6} {'':7} {ratio:.2f} x as fast, {memory:.2f} x the temporaries")


def _run(checkout: Path, model_dir: str, name: str, updates: int) -> dict:
    command = [sys.executable, __file__, "one", model_dir, name, str(updates)]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed in {checkout}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def one(model_dir: str, name: str, updates: str) -> None:
    """Measures one kind of update in this process; prints a line of JSON."""
    from relax.parallel.cpu import prepare_cpu

    prepare_cpu()
    import jax

    from relax.models import load_pretrained
    from relax.trainers import TrainState

    model, params = load_pretrained(model_dir, gradient_checkpointing=True)
    trainer, item, tokens = {"grpo": _grpo, "dpo": _dpo, "sft": _sft}[name](model, params)
    frozen = {"ref": jax.tree.map(lambda x: x.copy(), params)} if name == "dpo" else {}
    state = TrainState.create(
        params=params, optimizer=trainer.optimizer, rng=jax.random.key(0), frozen=frozen
    )
    (given,) = trainer.make_batches(state, item)
    batch = getattr(given, "batch", given)
    step = trainer.train_step.lower(state, batch).compile()
    seconds = []
    for _ in range(int(updates) + 1):
        start_s = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start_s)
    found = {
        "seconds": min(seconds[1:]),
        "tokens": tokens,
        "temporaries": step.memory_analysis().temp_size_in_bytes,
        "loss": float(metrics["loss"]),
    }
    print(json.dumps(found))


def _optimizer():
    from relax.optimizers import adamw, learning_rate_schedule

    return adamw(learning_rate_schedule("constant", 1e-6, 100))


def _lengths(shape, mean: int, cap: int):
    import numpy as np

    return np.minimum(np.random.default_rng(1).geometric(1 / mean, shape), cap)


def _grpo(model, params):
    import numpy as np

    from relax.sampling import SamplingConfig
    from relax.trainers import GRPOTrainer
    from relax.trainers.rl.rollout import Rollout, bucket

    rng, V = np.random.default_rng(0), model.config.vocab_size
    lengths = _lengths((4, 8), 40, 256).astype(np.int32)
    C = bucket(int(lengths.max()), 256)
    real = np.arange(C) < lengths[..., None]

    class Given(GRPOTrainer):
        def generate(self, state, item, key, sampling=None):
            return Rollout(
                rows=item["rows"],
                prompt_ids=np.array(item["prompt_ids"], np.int32),
                prompt_lengths=np.full(4, 32, np.int32),
                completion_ids=rng.integers(0, V, real.shape).astype(np.int32),
                completion_lengths=lengths,
                mask=real,
                logprobs=np.where(real, -2.0, 0.0).astype(np.float32),
                finish=np.full(lengths.shape, "eos"),
                texts=[["x"] * 8] * 4,
                environment_rewards=np.full(lengths.shape, np.nan),
            )

    class Tokenizer:
        eos_token_id = 0

        def decode(self, ids, skip_special_tokens=True):
            return "x"

    trainer = Given(
        model,
        _optimizer(),
        reward_funcs=[lambda completions: [float(i % 3) for i in range(len(completions))]],
        tokenizer=Tokenizer(),
        sampling=SamplingConfig(max_new_tokens=256),
        num_generations=8,
        max_grad_norm=1.0,
    )
    prompts = rng.integers(0, V, (4, 32)).tolist()
    item = {"prompt_ids": prompts, "rows": [{"prompt": "p"}] * 4}
    return trainer, item, int(lengths.sum() + 4 * 32)


def _dpo(model, params):
    import numpy as np

    from relax.data import PreferenceLoader
    from relax.data.preference import Preference, Preferences
    from relax.trainers import DPOTrainer

    rng, V = np.random.default_rng(0), model.config.vocab_size
    lengths = _lengths((8, 2), 80, 400)
    pairs = [
        Preference(*(rng.integers(0, V, n).astype(np.int32) for n in (64, *both)))
        for both in lengths
    ]
    trainer = DPOTrainer(model, _optimizer(), max_grad_norm=1.0)
    (item,) = PreferenceLoader(Preferences(pairs, True), 8, shuffle=False)
    return trainer, item, int(lengths.sum() + 8 * 64)


def _sft(model, params):
    import numpy as np

    from relax.data import DataLoader
    from relax.data.examples import Encoded
    from relax.trainers import SFTTrainer

    rng, V = np.random.default_rng(0), model.config.vocab_size
    lengths = np.random.default_rng(1).integers(30, 401, 8)
    rows = [rng.integers(0, V, n).astype(np.int32) for n in lengths]
    (item,) = DataLoader([Encoded(ids, ids) for ids in rows], 8, shuffle=False)
    return SFTTrainer(model, _optimizer(), max_grad_norm=1.0), item, int(lengths.sum())


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "one":
        one(*sys.argv[2:])
    else:
        fire.Fire(main)
