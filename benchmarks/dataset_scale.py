"""Seconds and memory of preparing many short rows, beside `datasets.map` with the same tokenizer.

    python benchmarks/dataset_scale.py MODEL_DIR                    # 1 million rows of text
    python benchmarks/dataset_scale.py MODEL_DIR --datasets PYTHON  # and in an environment with it
    python benchmarks/dataset_scale.py loader 10000000              # batches of so many rows
    python benchmarks/dataset_scale.py loader 10000000 pairs        # or pairs
    python benchmarks/dataset_scale.py prompts MODEL_DIR 1000000    # prompts of RL, and their items

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
from functools import partial
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


def loader(count: int, kind: str = "rows", batches: int = 1000) -> None:
    """Prints the seconds and memory of batches in random order, from rows of 4 to 12 tokens."""
    from relax.data import DataLoader, PreferenceLoader
    from relax.data.cache import Writer
    from relax.data.preference import Preferences
    from relax.data.preference_arrays import Pairs

    with tempfile.TemporaryDirectory() as folder:
        writer, given = Writer(Path(folder)), _random_rows(count)
        if kind == "pairs":
            pairs = Pairs.written(_random_pairs(given), writer)
            make = partial(PreferenceLoader, Preferences(pairs, True), 32)
        else:
            make = partial(DataLoader, writer.write(given), 32)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        _take(f"{count:,} {kind}, {size / 2**20:,.0f} MiB of tokens", make, batches)


def _random_rows(count: int, size: int = 100_000):
    import numpy as np

    from relax.data.examples import Block

    rng = np.random.default_rng(0)
    for first in range(0, count, size):
        lengths = rng.integers(4, 13, min(size, count - first))
        ids = rng.integers(1, 1000, lengths.sum(), dtype=np.int32)
        yield Block(ids, ids, lengths, lengths - 1)


def _random_pairs(blocks):
    """A prompt of two tokens, and completions of what is left and of one token."""
    from relax.data.preference_arrays import Preference

    for block in blocks:
        ends = block.lengths.cumsum().tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            ids = block.input_ids[start:end]
            yield Preference(ids[:2], ids[2:], ids[:1])


def prompts(model_dir: str, count: int, batches: int = 1000) -> None:
    """Prints the seconds and memory of preparing prompts, twice, and of items of 32."""
    from transformers import AutoTokenizer

    from relax.data import PromptLoader, prepare_prompts, read_rows
    from relax.data.cache import ExampleCache

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    with tempfile.TemporaryDirectory() as folder:
        file, cache = Path(folder, "prompts.jsonl"), ExampleCache(Path(folder, "cache"))
        with file.open("w") as out:
            for i in range(count):
                row = {"prompt": f"What is {i} plus {i % 97}?", "answer": str(i + i % 97)}
                out.write(json.dumps(row) + "\n")
        for when in ("first", "later"):
            with Memory() as memory:
                begin = time.perf_counter()
                made = prepare_prompts(read_rows(file, stored_from=0), tokenizer, cache=cache)
                seconds = time.perf_counter() - begin
            print(f"{when} run: {seconds:.1f} s, {memory.grown / 2**20:,.0f} MiB", flush=True)
        _take(f"{count:,} prompts", partial(PromptLoader, made, 32), batches)


def _take(what: str, make, batches: int) -> None:
    """Prints the seconds and memory of a loader and its batches."""
    with Memory() as memory:
        begin = time.perf_counter()
        made = make().batches(0)
        next(made)
        first_s, peak = time.perf_counter() - begin, memory.grown
        begin = time.perf_counter()
        taken = sum(1 for _ in zip(range(batches), made, strict=False))
        each_ms = 1000 * (time.perf_counter() - begin) / taken
        time.sleep(0.2)
        kept = memory.now - memory.before
    print(f"{what}: first batch after {first_s:.1f} s, {each_ms:.2f} ms a batch; "
          f"memory {kept / 2**20:,.0f} MiB, at most {peak / 2**20:,.0f} MiB")  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1] == "loader":
        loader(int(sys.argv[2]), *sys.argv[3:])
    elif sys.argv[1] == "prompts":
        prompts(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1] == "one":
        print(json.dumps(one(*sys.argv[2:])))
    else:
        main(sys.argv[1:])
