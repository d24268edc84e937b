"""The runs of the campaigns: tiny models and a few rows, so that a run takes seconds."""

import runpy
from pathlib import Path
from typing import Any, NamedTuple

import grpo_runs
import runs
from two_processes import start_two

from relax.models import save_pretrained
from relax.rewards import EpisodeRunner

ALGORITHMS = ("sft", "grpo", "async", "tools", "agent")
AGENTS = Path(runs.__file__).with_name("agents.py")
CALCULATOR = Path(__file__).parents[2] / "examples" / "calculator_tool.py"
# Kinds of GRPO. The agent takes random times, which must not matter.
GRPO: dict[str, dict] = {
    "grpo": {},
    "async": {"async_rollouts": 2},
    "tools": {
        "tools": f"{CALCULATOR}:add",
        "reward_funcs": "exact_match",
        "max_completion_length": 48,
        "learning_rate": 1e-3,
    },
    "agent": {"agent": f"{AGENTS}:several_at_once", "agent_max_length": 64},
}
SFT = {
    "test_size": 8,
    "per_device_train_batch_size": 4,
    "gradient_checkpointing": False,
    "learning_rate": 1e-3,
}


class Job(NamedTuple):
    """A script and the values of its flags."""

    script: Path
    fields: dict

    def start(self, output_dir: Path, *, faults=(None,), **fields) -> list[runs.Child]:
        """Starts the run in as many processes as there are faults, see `faults.meet`."""
        fields = self.fields | fields
        if len(faults) == 2:
            return start_two(output_dir, fields, faults=faults, script=self.script)
        flags = runs.flags(**fields, output_dir=output_dir)
        return [runs.fork(*flags, fault=faults[0], script=self.script)]

    @property
    def has_rollouts(self) -> bool:
        return self.script == grpo_runs.SCRIPT

    def outcome(self, output_dir: Path) -> dict:
        """All that must be the same after a finished run: bytes, metrics, names of files."""
        module = grpo_runs if self.has_rollouts else runs
        return module.outcome(output_dir)


def make(algorithm: str, directory: Path, **fields) -> Job:
    """Writes the files of a job, and returns it with fields changed."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    directory.mkdir(parents=True, exist_ok=True)
    grpo = grpo_runs.make_job(directory)
    if algorithm == "tools":
        grpo |= calculator(directory)
    if algorithm in ("tools", "agent"):
        del grpo["reward_funcs"], grpo["reward_weights"]
    if algorithm in GRPO:
        return Job(grpo_runs.SCRIPT, grpo | GRPO[algorithm] | fields)
    rows = runs.write_rows(directory / "rows.jsonl", runs.additions(40))
    sft = SFT | {"dataset_name": rows, "model_name_or_path": grpo["model_name_or_path"]}
    return Job(runs.SCRIPT, sft | fields)


def rows(processes: int) -> dict:
    """The rows of each device, for the same update over any number of processes."""
    return {"per_device_train_batch_size": 4 // processes}


def calculator(directory: Path) -> dict:
    """Writes a model that calls a tool in half of its answers, and sums to ask it."""
    example: Any = runpy.run_path(str(CALCULATOR))
    model, params, tokenizer, rng = example["teach"](
        0, list(EpisodeRunner([example["add"]]).info.tools)
    )
    asked = [example["question"](rng) for _ in range(12)]
    sums = [{"prompt": messages, "answer": str(a + b)} for a, b, messages in asked]
    return {
        "model_name_or_path": save_pretrained(directory / "taught", model, params, tokenizer),
        "dataset_name": runs.write_rows(directory / "sums.jsonl", sums),
    }
