"""Records what TRL's SFTTrainer logs, for `tests/test_trl_parity.py` to hold ReLax to.

Needs an environment with trl, torch, transformers, datasets and numpy, and none of ReLax's own
dependencies; nothing else in the project needs TRL.

    python benchmarks/record_trl.py tiny                # -> tests/golden/trl_sft.json, a minute
    python benchmarks/record_trl.py smollm2 MODEL_DIR   # -> tests/golden/trl_smollm2.json, minutes

Everything runs on the CPU in float32, in the order of the file. The cases, that is the models,
rows and flags, are in `tests/golden/trl_cases.py`.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from golden.trl_cases import (  # noqa: E402
    GSM_ROWS,
    HERE,
    SMOLLM2,
    TINY,
    flags,
    write_rows,
    write_tiny_llama,
)

LOGGED = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "learning_rate")
PACKAGES = ("trl", "transformers", "torch", "accelerate", "datasets")


def record(model_dir: Path, rows: Path, settings: dict, scratch: Path) -> dict:
    """Trains with TRL and returns what it logged, a list with an entry per update each."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
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
    trainer = SFTTrainer(str(model_dir), args=args, train_dataset=dataset)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: [entry[name] for entry in history] for name in LOGGED}


def main(argv: list[str]) -> int:
    if argv[:1] == ["tiny"] and len(argv) == 1:
        cases, file = TINY, HERE / "trl_sft.json"
    elif argv[:1] == ["smollm2"] and len(argv) == 2:
        cases, file = SMOLLM2, HERE / "trl_smollm2.json"
    else:
        print(__doc__, file=sys.stderr)
        return 2
    recorded = {}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        model_dir = Path(argv[1]) if cases is SMOLLM2 else write_tiny_llama(scratch / "model")
        for name, (kind, extra) in cases.items():
            rows = GSM_ROWS if cases is SMOLLM2 else write_rows(scratch / f"{name}.jsonl", kind)
            settings = flags(name, extra)
            logged = record(model_dir, rows, settings, scratch)
            recorded[name] = {"rows": kind, "settings": settings, "logged": logged}
            print(name, logged["loss"], flush=True)
    versions = {package: version(package) for package in PACKAGES}
    file.write_text(json.dumps({"versions": versions, "cases": recorded}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
