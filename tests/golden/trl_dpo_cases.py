"""What is recorded of TRL's DPOTrainer and replayed by ReLax: pairs and flags, the same for both.

Imports neither jax nor torch, as `trl_cases.py`.
"""

import json
from pathlib import Path

from golden.trl_cases import TWO_BY_TWO, gsm_rows

COMMON = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "beta": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "max_length": 512,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
}

# A byte is a token in the tiny model: some prompts fill max_length, and most answers are cut.
SHORT = {"max_length": 320}
TINY = {
    "texts_with_an_implied_prompt": ("texts", SHORT),
    "two_micro_batches": ("number_first", SHORT | TWO_BY_TWO),
    "four_losses": (
        "number_first",
        SHORT
        | {
            "loss_type": ["robust", "sft", "ipo", "apo_down"],
            "loss_weights": [1.0, 0.2, 0.01, 0.5],
            "label_smoothing": 0.1,
        },
    ),
}
SMOLLM2 = {"one_batch": ("number_last", {})}


def flags(name: str, extra: dict) -> dict:
    """All flags of a case; the tiny model takes a rate at which it moves."""
    return COMMON | {"learning_rate": 1e-3 if name in TINY else 1e-5} | extra


def write_pairs(path: Path, kind: str = "number_last", count: int = 200) -> Path:
    """Writes worked answers of the committed rows: with the right number, over a wrong one."""
    rows = [_pair(row, i, kind) for i, row in enumerate(gsm_rows()[:count])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _pair(row: dict, i: int, kind: str) -> dict:
    question, answer = row["prompt"][0]["content"], row["completion"][0]["content"]
    work, _, number = answer.rpartition("#### ")
    wrong = f"{float(number) + (1 + i % 9) * (1, -1, 10)[i % 3]:g}"
    if kind == "number_last":
        chosen, rejected = answer, f"{work}#### {wrong}"
    else:  # so that answers differ however much is cut of them
        chosen, rejected = f"{number}\n{work}", f"{wrong}\n{work}"
    if kind == "texts":  # without `prompt`: it is what both begin with
        return {"chosen": f"{question}\n{chosen}", "rejected": f"{question}\n{rejected}"}
    return {
        "prompt": row["prompt"],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
