"""Seconds and memory of preparing many short rows, beside `datasets.map` with the same tokenizer.

    python benchmarks/dataset_scale.py MODEL_DIR                    # 1 million rows of text
    python benchmarks/dataset_scale.py MODEL_DIR --datasets PYTHON  # and in an environment with it
    python benchmarks/dataset_scale.py loader 10000000              # batches of so many rows

MODEL_DIR holds a tokenizer. Every line is a process of its own, whose seconds begin when everything
is imported: reading the file, tokenising its rows and writing the tokens to the disk; then the same
again, which finds them. `loader` writes rows of random tokens and takes batches of 32 rows of them.
Memory is the growth of the process's own pages (`RssAnon`), the largest of all samples, with that
of its children; pages of files are the system's, which takes them back when it needs them.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

WORDS = (
    "the port of Brest is nine metres wide and it holds many ships that come from other lands "
    "with salt and wine at high water when the wind blows in from the west"
).split()


def main(arguments: list[str]) -> None:
    model_dir, *rest = arguments
    given = dict(zip(rest[::2], rest[1::2], strict=True))
    count = int(given.get("--rows", 1_000_000))
    kinds = [("ReLax", sys.executable, "1"), ("ReLax, again", sys.executable, "1")]
    if "--datasets" in given:
        kinds += [(f"datasets.map, {n} process", given["--datasets"], n) for n in ("1", "2")]
    with tempfile.TemporaryDirectory(dir=given.get("--dir")) as folder:
        file = Path(folder, "rows.jsonl")
        write(file, count)
        print(f"{count:,} rows, {file.stat().st_size / 2**20:,.0f} MiB")
        for kind, python, workers in kinds:
            found = _run(python, kind, model_dir, str(file), workers)
            print(f"{kind:24} {found['seconds']:8.1f} s {found['memory'] / 2**20:8,.0f} MiB"
                  f"  {found['tokens']:,} tokens", flush=True)  # fmt: skip


def write(file: Path, count: int) -> None:
    """Writes rows of 5 to 20 words."""
    rng = random.Random(0)
    with file.open("w") as out:
        for _ in range(count):
            text = " ".join(rng.choices(WORDS, k=rng.randint(5, 20)))
            out.write(f'{{"text": "{text}"}}\n')


def _run(python: str, *arguments: str) -> dict:
    root = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "true"}
    command = [python, __file__, "one", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{arguments[0]} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


class Memory:
    """The largest number of bytes of this process and its children, sampled in a thread."""

    def __enter__(self) -> "Memory":
        self.before, self.most, self._ended = self._now(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def grown(self) -> int:
        return self.most - self.before

    @property
    def now(self) -> int:
        return self._now()

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            self.most = max(self.most, self._now())

    def _now(self) -> int:
        total = 0
        for pid in [os.getpid(), *_children(os.getpid())]:
            try:
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            except OSError:  # it has ended
                continue
            total += sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        return 1024 * total


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found += map(int, (task / "children").read_text().split())
        except OSError:
            continue
    return found


def one(kind: str, model_dir: str, file: str, workers: str) -> dict:
    """Prepares the rows of a file once."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer("warm up")
    if kind.startswith("ReLax"):
        return _relax(tokenizer, file)
    return _datasets(tokenizer, file, int(workers))


def _relax(tokenizer, file: str) -> dict:
    from relax.data import DataLoader, prepare, read_rows
    from relax.data.cache import ExampleCache

    with Memory() as memory:
        begin = time.perf_counter()
        cache = ExampleCache(Path(file).parent / "cache")
        examples, report = prepare(read_rows(file, stored_from=0), tokenizer, cache=cache)
        next(iter(DataLoader(examples, 32)))
        seconds = time.perf_counter() - begin
    return {"seconds": seconds, "memory": memory.grown, "tokens": report.num_tokens}


def _datasets(tokenizer, file: str, workers: int) -> dict:
    import datasets

    datasets.disable_progress_bars()

    def tokenize(rows):
        ids = tokenizer([text + tokenizer.eos_token for text in rows["text"]])["input_ids"]
        return {"input_ids": ids, "labels": ids}

    with tempfile.TemporaryDirectory(dir=Path(file).parent) as folder, Memory() as memory:
        begin = time.perf_counter()
        rows = datasets.load_dataset("json", data_files=file, split="train", cache_dir=folder)
        made = rows.map(tokenize, batched=True, remove_columns=["text"],
                        num_proc=workers if workers > 1 else None)  # fmt: skip
        seconds = time.perf_counter() - begin
        tokens = sum(map(len, made[:1000]["input_ids"])) * len(made) // 1000
    return {"seconds": seconds, "memory": memory.grown, "tokens": tokens}


def loader(count: int, batches: int = 1000) -> None:
    """Prints the seconds and memory of batches in random order, from rows of 4 to 12 tokens."""
    import numpy as np

    from relax.data import DataLoader
    from relax.data.cache import Writer
    from relax.data.examples import Block

    def blocks(size: int = 100_000):
        rng = np.random.default_rng(0)
        for first in range(0, count, size):
            lengths = rng.integers(4, 13, min(size, count - first))
            ids = rng.integers(1, 1000, lengths.sum(), dtype=np.int32)
            yield Block(ids, ids, lengths, lengths - 1)

    with tempfile.TemporaryDirectory() as folder:
        examples = Writer(Path(folder)).write(blocks())
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        with Memory() as memory:
            begin = time.perf_counter()
            given = DataLoader(examples, 32)
            made = given.batches(0)
            next(made)
            first_s, peak = time.perf_counter() - begin, memory.grown
            begin = time.perf_counter()
            for _, batch in zip(range(batches), made, strict=False):
                assert batch["input_ids"].any()
            each_ms = 1000 * (time.perf_counter() - begin) / batches
            time.sleep(0.2)
            kept = memory.now - memory.before
    print(f"{count:,} rows, {size / 2**20:,.0f} MiB of tokens: first batch after {first_s:.1f} s, "
          f"{each_ms:.2f} ms a batch; memory {kept / 2**20:,.0f} MiB, "
          f"at most {peak / 2**20:,.0f} MiB")  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1] == "loader":
        loader(int(sys.argv[2]))
    elif sys.argv[1] == "one":
        print(json.dumps(one(*sys.argv[2:])))
    else:
        main(sys.argv[1:])
