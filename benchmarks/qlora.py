"""Adapters over a quantised base against adapters over a float32 one: bytes, memory and time.

    python benchmarks/qlora.py MODEL_DIR [--shape 2x512] [--steps 3] [--rounds 2] [--peer]

Every kind of base is trained in processes of its own, in turns, with adapters of rank 16 on all
linear layers. Printed are the bytes of all weights, XLA's account of an update, the peak memory of
the process and the median time of an update, each also as a share of float32's. `--peer` adds
peft with bitsandbytes' nf4 (gradient checkpointing on), where they are installed.

MODEL_DIR may be the config.json of a model, whose weights are then random.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KINDS = ("float32", "nf4", "int8")


def of_relax(directory: str, kind: str, rows: int, length: int, steps: int) -> dict:
    """Makes some updates in this process."""
    from relax.engine import prepare_process

    prepare_process()
    import jax
    import jax.numpy as jnp

    from relax.engine import memory
    from relax.models import load_pretrained
    from relax.models.config import LoRA
    from relax.models.huggingface.quantized import BaseQuantizer
    from relax.optimizers import adamw
    from relax.trainers import SFTTrainer

    quantize = None if kind == "float32" else BaseQuantizer(kind)
    model, params = load_pretrained(directory, gradient_checkpointing=True, quantize=quantize)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    model = model.clone(lora=LoRA(16, 32, 0.0, ("all-linear",)))
    trainer = SFTTrainer(model, adamw(1e-4), params=params, donate_params=True, max_grad_norm=1.0)
    state = trainer.create_train_state(jax.random.key(0))
    del params
    ids = jnp.arange(rows * length, dtype=jnp.int32).reshape(rows, length) % 1000
    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), (rows, 1))
    batch = {"input_ids": ids, "labels": ids, "positions": positions,
             "segment_ids": jnp.ones_like(ids)}  # fmt: skip
    account = memory.update_sizes(trainer, state, batch).total
    times = []
    for _ in range(steps + 1):
        start_s = time.perf_counter()
        state, metrics = trainer.train_step(state, batch)
        loss = float(metrics["loss"])
        times.append(time.perf_counter() - start_s)
    return {"weights": weights, "account": account, "times": times[1:], "loss": loss}


def of_peft(directory: str, rows: int, length: int, steps: int) -> dict:
    """The same by peft over bitsandbytes' nf4."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    weights = sum(p.numel() * p.element_size() for p in base.parameters())
    base = peft.prepare_model_for_kbit_training(base)
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.arange(rows * length).reshape(rows, length) % 1000
    times = []
    for _ in range(steps + 1):
        start_s = time.perf_counter()
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start_s)
    return {"weights": weights, "account": 0, "times": times[1:], "loss": float(loss)}


def directory_of(model: str, scratch: str) -> str:
    """A model's directory, with random weights where only its config.json is given."""
    if Path(model).is_dir():
        return model
    import jax
    import jax.numpy as jnp

    from relax.models import Transformer, save_pretrained
    from relax.tools.plan.plan import read_shape

    made = Transformer(read_shape(model))
    params = jax.jit(made.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    return str(save_pretrained(f"{scratch}/model", made, params))


def child(words: list[str]) -> dict:
    """The result of one process."""
    run = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stderr[-2000:])
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    """Prints a line per kind of base."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--shape", default="2x512")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    rows, length = map(int, options.shape.split("x"))
    if options.only:
        sizes = (rows, length, options.steps)
        peer = options.only == "peft"
        found = (
            of_peft(options.model, *sizes)
            if peer
            else of_relax(options.model, options.only, *sizes)
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(found | {"peak": peak}))
        return
    kinds = [*options.kinds.split(","), *(["peft"] if options.peer else [])]
    results: dict[str, list[dict]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as scratch:
        directory = directory_of(options.model, scratch)
        for _ in range(options.rounds):
            for kind in kinds:
                words = [directory, "--shape", options.shape, "--steps", str(options.steps)]
                results[kind].append(child([*words, "--only", kind]))
    first = None
    for kind, runs in results.items():
        times = [t for run in runs for t in run["times"]]
        row = {
            "weights": runs[0]["weights"] / 1e6,
            "account": runs[0]["account"] / 1e6,
            "peak": min(run["peak"] for run in runs) / 1e6,
            "step": min(times),
        }
        first = first or row
        shares = {name: value / first[name] if first[name] else 0 for name, value in row.items()}
        print(
            f"{kind:8} weights {row['weights']:7.0f} MB ({shares['weights']:.2f})  "
            f"update by XLA {row['account']:6.0f} MB ({shares['account']:.2f})  "
            f"peak {row['peak']:6.0f} MB ({shares['peak']:.2f})  "
            f"step {row['step']:6.2f} s ({shares['step']:.2f}), "
            f"median {statistics.median(times):.2f}"
        )


if __name__ == "__main__":
    main()
