"""Records what TRL's DPOTrainer logs, for `tests/test_dpo_parity.py` to hold ReLax to.

Needs what `record_trl.py` needs.

    python benchmarks/record_trl_dpo.py tiny                # -> tests/golden/trl_dpo.json
    python benchmarks/record_trl_dpo.py smollm2 MODEL_DIR   # -> tests/golden/trl_dpo_smollm2.json

Everything runs on the CPU in float32, in the order of the file. The cases, that is the pairs and
flags, are in `tests/golden/trl_dpo_cases.py`.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from golden.trl_cases import HERE, write_tiny_llama  # noqa: E402
from golden.trl_dpo_cases import SMOLLM2, TINY, flags, write_pairs  # noqa: E402
from record_trl import PACKAGES  # noqa: E402

SIDES = [
    f"{what}/{side}" for what in ("rewards", "logps", "logits") for side in ("chosen", "rejected")
]
LOGGED = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", *SIDES)
LOGGED += ("rewards/margins", "rewards/accuracies")


def record(model_dir: Path, rows: Path, settings: dict, scratch: Path) -> dict:
    """Trains with TRL and returns what it logged, a list with an entry per update each."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        output_dir=str(scratch / "out"),
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
        train_sampling_strategy="sequential",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    lines = rows.read_text(encoding="utf-8").splitlines()
    dataset = Dataset.from_list([json.loads(line) for line in lines])
    trainer = DPOTrainer(str(model_dir), args=args, train_dataset=dataset)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: [entry[name] for entry in history] for name in LOGGED}


def main(argv: list[str]) -> int:
    if argv[:1] == ["tiny"] and len(argv) == 1:
        cases, file = TINY, HERE / "trl_dpo.json"
    elif argv[:1] == ["smollm2"] and len(argv) == 2:
        cases, file = SMOLLM2, HERE / "trl_dpo_smollm2.json"
    else:
        print(__doc__, file=sys.stderr)
        return 2
    recorded = {}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        model_dir = Path(argv[1]) if cases is SMOLLM2 else write_tiny_llama(scratch / "model")
        for name, (kind, extra) in cases.items():
            settings = flags(name, extra)
            rows = write_pairs(scratch / f"{name}.jsonl", kind, count=100)
            logged = record(model_dir, rows, settings, scratch)
            recorded[name] = {"rows": kind, "settings": settings, "logged": logged}
            print(name, logged["loss"], flush=True)
    versions = {package: version(package) for package in PACKAGES}
    file.write_text(json.dumps({"versions": versions, "cases": recorded}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
