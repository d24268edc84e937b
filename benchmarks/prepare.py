"""Rows a second and bytes a token of preparing chats for SFT, beside TRL.

    python benchmarks/prepare.py MODEL_DIR                    # 100,000 short chats
    python benchmarks/prepare.py MODEL_DIR --trl PYTHON       # and in an environment with TRL
    python benchmarks/prepare.py MODEL_DIR --template FILE    # with another chat template

MODEL_DIR holds a tokenizer whose chat template has no marks. Every line is a process of its own,
which takes turns with the others: all tokens trained, and the assistant's only. For TRL, whose
trainer needs marks, the template is replaced by ChatML with marks; it prepares the rows in one
process with `SFTTrainer`'s own code. Seconds begin when the rows are in memory and end when the
tokens and labels are there.
"""

import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

KINDS = ("all tokens", "the assistant's", "TRL, all tokens", "TRL, the assistant's")
MARKED = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>
{% endgeneration %}{% else %}{{ m.content }}<|im_end|>
{% endif %}{% endfor %}"""
WORDS = (
    "the port of Brest is nine metres wide and it holds many ships that come from other lands "
    "with salt and wine at high water when the wind blows in from the west"
).split()


def main(arguments: list[str]) -> None:
    model_dir, *rest = arguments
    given = dict(zip(rest[::2], rest[1::2], strict=True))
    count, turns = int(given.get("--rows", 100_000)), int(given.get("--turns", 1))
    kinds = KINDS if "--trl" in given else KINDS[:2]
    best: dict[str, dict] = {}
    for _ in range(turns):
        for kind in kinds:
            python = given["--trl"] if kind.startswith("TRL") else sys.executable
            found = _run(python, model_dir, kind, count, given.get("--template", ""))
            if kind not in best or found["seconds"] < best[kind]["seconds"]:
                best[kind] = found
    print(f"{count:,} chats, {best[kinds[0]]['tokens']:,} tokens")
    print(f"{'':22} {'rows/s':>8} {'trained':>11} {'kept':>12} {'peak':>12}")
    for kind, found in best.items():
        kept = [f"{found[name] / found['tokens']:.1f} B/token" for name in ("kept", "peak")]
        rate = count / found["seconds"]
        print(f"{kind:22} {rate:8,.0f} {found['trained']:11,} {kept[0]:>12} {kept[1]:>12}")


def _run(python: str, model_dir: str, kind: str, count: int, template: str) -> dict:
    command = [python, __file__, "one", model_dir, kind, str(count), template]
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{kind} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def chats(count: int) -> list[dict]:
    """Rows of one or two turns with texts of 5 to 80 words."""
    rng = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    def turns() -> list[dict]:
        return [{"role": "user", "content": text(5, 40)},
                {"role": "assistant", "content": text(10, 80)}]  # fmt: skip

    return [{"messages": turns() + (turns() if i % 3 == 0 else [])} for i in range(count)]


def one(model_dir: str, kind: str, count: int, template: str) -> dict:
    """Prepares the rows once.

    Returns:
      seconds; tokens; trained tokens; bytes `kept` in memory, and the growth of its `peak` over the
      rows.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    if template:
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    only = "assistant" in kind
    prepare = _trl if kind.startswith("TRL") else _relax
    prepare(chats(10), tokenizer, only)
    rows = chats(count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    found = prepare(rows, tokenizer, only)
    found["seconds"] = time.perf_counter() - begin
    found["peak"] = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return found


def _relax(rows: list[dict], tokenizer, only: bool) -> dict:
    from relax.data import FormatOptions, prepare

    examples, report = prepare(rows, tokenizer, FormatOptions(assistant_only_loss=only))
    kept = examples.input_ids.nbytes + examples.labels.nbytes + examples.offsets.nbytes
    return {"tokens": report.num_tokens, "trained": report.num_trained_tokens, "kept": kept}


def _trl(rows: list[dict], tokenizer, only: bool) -> dict:
    import tempfile

    from datasets import Dataset, disable_caching, disable_progress_bars
    from transformers import GPT2Config, GPT2LMHeadModel
    from trl import SFTConfig, SFTTrainer

    disable_caching()
    disable_progress_bars()
    if only:
        tokenizer.chat_template = MARKED
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1))
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(folder, assistant_only_loss=only, max_length=1024, report_to=[],
                           use_cpu=True, bf16=False)  # fmt: skip
        data = Dataset.from_list(rows)
        trainer = SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer)
        found = trainer.train_dataset
    tokens = sum(map(len, found["input_ids"]))
    trained = sum(label != -100 for row in found["labels"] for label in row) if only else tokens
    return {"tokens": tokens, "trained": trained, "kept": found.data.nbytes}


if __name__ == "__main__":
    if sys.argv[1] == "one":
        print(json.dumps(one(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])))
    else:
        main(sys.argv[1:])
