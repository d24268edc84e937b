"""Damaged files: `python -m benchmarks.reliability.corruptions --count 300`.

Every file of a checkpoint, of the run's directory and of the model's is flipped in one bit, cut,
lengthened, emptied or removed, and the run is resumed (for a file of the model: begun). It ends
with one sentence and no traceback, or with the bytes of the run whose files were whole. A flipped
weight of a model directory is another model, which no reader can know: a run of it must end with a
sentence or train it, and is counted apart.
"""

import collections
import contextlib
import io
import json
import random
import shutil
import tempfile
import warnings
from pathlib import Path

import fire

from benchmarks.reliability import jobs

SHORT = {"max_steps": 6, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
WAYS = ("flip", "flip", "flip", "cut", "append", "empty", "remove")


def damaged(data: bytes, way: str, rng: random.Random) -> bytes | None:
    """The bytes of a file after a damage; None: no file."""
    if way == "flip" and data:
        bit = rng.randrange(8 * len(data))
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed)
    return {"cut": data[: rng.randrange(len(data) or 1)], "append": data + b"\0", "empty": b""}.get(
        way
    )


def run_here(fields: dict) -> tuple[int | None, str, str]:
    """`run_sft.py` in this process: its exit code (None: a traceback), output and errors."""
    import runs

    from relax.config import SFTConfig, cli
    from run_sft import main as run_sft

    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        with warnings.catch_warnings(record=True):
            try:
                cli.run(SFTConfig, run_sft, runs.flags(**fields))
                code = 0
            except SystemExit as stop:
                code = stop.code
            except Exception as error:
                errors.write(f"Traceback: {type(error).__name__}: {error}")
                code = None
    return code, out.getvalue(), errors.getvalue()


class Campaign:
    """Damages of one run.

    Args:
      root: a directory, in which the run and the model are made.
    """

    def __init__(self, root: Path, rng: random.Random):
        self.rng, self.root = rng, root
        self.fields = jobs.make("sft", root, **SHORT).fields
        self.model = Path(self.fields["model_name_or_path"])
        self.whole = root / "whole"
        code, _, errors = run_here(self.fields | {"output_dir": self.whole})
        assert code == 0, errors
        self.weights = self.exported(self.whole)
        # As if it had been killed after the last checkpoint.
        self.stopped = Path(shutil.copytree(self.whole, root / "stopped"))
        shutil.rmtree(self.stopped / "final")
        shutil.rmtree(self.stopped / "checkpoints" / "6")
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []

    @staticmethod
    def exported(output: Path) -> bytes:
        return (output / "final" / "model.safetensors").read_bytes()

    def resume(self, name: str, way: str) -> None:
        """Damages a file of the stopped run and resumes it."""
        output = self.root / "run"
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(self.stopped, output)
        self.damage(output / name, way)
        result = run_here(self.fields | {"output_dir": output, "resume": "auto"})
        kind = "checkpoint" if name.startswith("checkpoints") else "run directory"
        self.judge(kind, f"{way} {name}", output, result)

    def begin(self, name: str, way: str) -> None:
        """Damages a file of the model and begins a run of it."""
        model, output = self.root / "model", self.root / "run"
        for place in (model, output):
            shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.model, model)
        self.damage(model / name, way)
        result = run_here(self.fields | {"model_name_or_path": model, "output_dir": output})
        self.judge("model", f"{way} {name}", output, result)

    def damage(self, file: Path, way: str) -> None:
        changed = damaged(file.read_bytes(), way, self.rng)
        file.unlink() if changed is None else file.write_bytes(changed)

    def judge(self, kind: str, what: str, output: Path, result) -> None:
        code, out, errors = result
        self.counts[f"{kind}: tried"] += 1
        if code == 0:
            same = self.exported(output) == self.weights
            self.counts[f"{kind}: {'the same' if same else 'other'} bytes"] += 1
            if kind == "model" and not same:
                self.counts[f"model: other bytes, {what.split()[1]}"] += 1
            if kind != "model" and not same:
                self.wrong.append(f"{what}: ends with other bytes")
        elif code is None or "Traceback" in errors:
            self.counts[f"{kind}: traceback"] += 1
            self.wrong.append(f"{what}: {errors.strip().splitlines()[-1][:300]}")
        else:
            self.counts[f"{kind}: a sentence"] += 1


def main(count: int = 300, seed: int = 0, directory: str = "") -> None:
    """Prints counts, and every damage that neither a sentence nor the right bytes followed.

    Args:
      count: damages, dealt out to the files in turn.
      directory: for the runs; a temporary one.
    """
    root = Path(directory or tempfile.mkdtemp(prefix="relax-corruptions-"))
    campaign = Campaign(root, random.Random(seed))
    files = [(campaign.begin, path.name) for path in sorted(campaign.model.iterdir())]
    for path in sorted(path for path in campaign.stopped.rglob("*") if path.is_file()):
        if path.name != ".lock":
            files.append((campaign.resume, str(path.relative_to(campaign.stopped))))
    for number in range(count):
        attempt, name = files[number % len(files)]
        attempt(name, WAYS[(number // len(files)) % len(WAYS)])
        if number % 25 == 24:
            print(f"{number + 1} tried, {len(campaign.wrong)} wrong", flush=True)
    print(json.dumps(dict(sorted(campaign.counts.items())), indent=1))
    print(f"{len(files)} files; {len(campaign.wrong)} wrong")
    print("\n".join(campaign.wrong))
    raise SystemExit(bool(campaign.wrong))


if __name__ == "__main__":
    fire.Fire(main)
