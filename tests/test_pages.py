"""The page of an algorithm: the script shows it, a run follows it, and it has one first state."""

import ast
import importlib
import inspect
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from runs import ROOT, additions, write_rows

from relax.checkpoint.storage import tree_bytes
from relax.config import SFTConfig
from relax.engine import Run, TrainerEngine
from relax.engine.recipes import sft as page
from relax.files import list_steps
from relax.trainers import Callback, SFTTrainer

SCRIPTS = {
    "sft": "run_sft",
    "dpo": "run_dpo",
    "reward": "run_reward",
    "grpo": "run_grpo",
    "ppo": "run_rl",
    "distill": "run_distill",
    "online_dpo": "run_online_dpo",
}


def steps_of(file: Path, function: str) -> str:
    """The statements of the run that a function opens, as text without comments."""
    (found,) = (
        node
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == function
    )
    (block,) = (node for node in found.body if isinstance(node, ast.With))
    return ast.unparse(ast.Module(block.body, [])).replace("return run.train(", "run.train(")


@pytest.mark.parametrize("algorithm, script", SCRIPTS.items())
def test_the_script_shows_the_steps_that_the_engine_and_the_command_run(algorithm, script):
    recipe = ROOT / "relax" / "engine" / "recipes" / f"{algorithm}.py"
    shown, run = steps_of(ROOT / f"{script}.py", "main"), steps_of(recipe, f"train_{algorithm}")
    assert shown == run


@pytest.fixture(scope="module")
def fields(tmp_path_factory) -> dict:
    directory = tmp_path_factory.mktemp("pages")
    return {
        "dataset_name": str(write_rows(directory / "rows.jsonl", additions(8))),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "pad_to_multiple_of": 32,
    }


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_from_main_to_the_update_there_are_at_most_four_calls(fields, tmp_path, monkeypatch):
    calls = []

    class Looks(Callback):
        def on_batch_begin(self, event):
            ours = [f for f in inspect.stack() if Path(f.filename).is_relative_to(ROOT)]
            names = [frame.function for frame in ours][::-1]
            calls.append(names[names.index("main") :])

    options = Run.options
    monkeypatch.setattr(Run, "options", lambda *args: options(*args, Looks()))
    main = importlib.import_module("run_sft").main
    main(SFTConfig().replace(**fields, output_dir=str(tmp_path / "run")))
    # `Trainer.train` calls the update as it calls the hooks; the last frames are those of the hook.
    assert calls[0][:3] == ["main", "train", "train"]
    assert len(calls[0]) - 3 == len(["call", "on_batch_begin"])


class OwnState(SFTTrainer):
    """Begins with embeddings of its own, and keeps a number in what is frozen."""

    def create_train_state(self, key):
        state = super().create_train_state(key)
        embedding = state.params["embed_tokens"]
        params = state.params | {"embed_tokens": jnp.full_like(embedding, 0.125)}
        return state.replace(params=params, frozen=state.frozen | {"own": jnp.float32(7)})


def test_a_run_begins_and_resumes_with_the_state_of_an_overridden_create_train_state(
    fields, tmp_path, monkeypatch
):
    seen = []

    class Looks(Callback):
        def on_train_begin(self, event):
            state = event.state
            embedding = np.asarray(state.params["embed_tokens"])
            seen.append((int(state.step), embedding.min(), float(state.frozen["own"])))

    options = Run.options
    monkeypatch.setattr(Run, "options", lambda *args: options(*args, Looks()))
    monkeypatch.setattr(page, "SFTTrainer", OwnState)
    config = SFTConfig().replace(**fields, output_dir=str(tmp_path / "run"), learning_rate=1e-12)
    TrainerEngine(console=quiet()).run_job(config.replace(max_steps=1))
    resumed = config.replace(resume="auto", allow_config_change=["max_steps"])
    result = TrainerEngine(console=quiet()).run_job(resumed)
    assert seen == [(0, 0.125, 7.0), (1, 0.125, 7.0)]
    assert list_steps(tmp_path / "run" / "checkpoints") == [1, 2, 3]
    assert float(result.state.frozen["own"]) == 7


def test_no_second_copy_of_the_weights_is_alive_while_training(fields, tmp_path, monkeypatch):
    """Behind every update all arrays together are the state, but for scalars and a batch."""
    first = SFTConfig().replace(**fields, output_dir=str(tmp_path / "model"))
    model_dir = TrainerEngine(console=quiet()).run_job(first.replace(max_steps=1)).model_dir
    beside = []

    class Looks(Callback):
        def on_batch_end(self, event):
            alive = sum(array.nbytes for array in jax.live_arrays() if array.size > 1000)
            beside.append(alive - tree_bytes(event.state))

    options = Run.options
    monkeypatch.setattr(Run, "options", lambda *args: options(*args, Looks()))
    before = sum(array.nbytes for array in jax.live_arrays() if array.size > 1000)
    config = first.replace(model_name_or_path=str(model_dir), output_dir=str(tmp_path / "run"))
    TrainerEngine(console=quiet()).run_job(config)
    assert len(beside) == 3 and max(beside) - before < 20_000
