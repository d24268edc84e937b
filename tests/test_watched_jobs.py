"""Jobs with everything that watches them: what lies in their directory, whatever became of them."""

import io
import json
from pathlib import Path

import jax
import pytest
from rich.console import Console
from runs import additions, write_rows

from relax.callbacks import TrainingStatusWriter
from relax.checkpoint.checkpointer import Checkpointer, named_leaves
from relax.config import SFTConfig, create_default_config
from relax.engine import TrainerEngine
from relax.errors import ConfigError, NonFiniteError
from relax.models import load_pretrained
from relax.monitor import read_status

CALLBACK = """
from relax.callbacks import Callback

class Count(Callback):
    def __init__(self):
        self.updates = 0

    def on_batch_end(self, event):
        self.updates += 1

    def state_dict(self):
        return {"updates": self.updates}

    def load_state_dict(self, state):
        self.updates = state["updates"]

class Explode(Callback):
    def on_batch_end(self, event):
        if event.step == 3:
            raise RuntimeError("boom <b>")

class Tracker:
    def log(self, metrics, step):
        with open("FILE", "a") as file:
            file.write(f"{step}\\n")
"""


def job(directory: Path, engine: TrainerEngine | None = None, **fields):
    """A run of the embedded model on a few sums, as a user would ask for it."""
    rows = write_rows(directory / "rows.jsonl", additions(24))
    code = CALLBACK.replace("FILE", str(directory / "tracked.txt"))
    (directory / "mine.py").write_text(code)
    options = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 6,
        "test_size": 4.0,
        "eval_strategy": "steps",
        "eval_steps": 2.0,
        "logging_steps": 1.0,
        "save_steps": 2.0,
        "learning_rate": 3e-3,
        "gradient_checkpointing": False,
    } | fields
    output = str(directory / "out")
    config = create_default_config(None, str(rows), output, **options)
    return (engine or TrainerEngine(console=quiet())).run_job(config)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=150)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A finished run with previews, a tracker, an own callback and the best state at its end."""
    directory = tmp_path_factory.mktemp("watched")
    console = quiet()
    writer = TrainingStatusWriter(directory / "status" / "training_status.json")
    result = job(
        directory,
        TrainerEngine(writer, console=console),
        num_samples=2,
        max_new_tokens=5,
        report_to=[f"{directory}/mine.py:Tracker"],
        callbacks=[f"{directory}/mine.py:Count"],
        load_best_model_at_end=True,
        metric_for_best_model="eval_mean_token_accuracy",
        greater_is_better=False,  # so that the best one is not the last
        profile_steps="2:2",
    )
    return directory, result, console.file.getvalue()


def test_a_finished_run_leaves_status_report_previews_and_its_trace(watched):
    directory, result, said = watched
    out = result.output_dir
    status = read_status(out / "status.json")
    assert (status["phase"], status["step"], status["total_steps"]) == ("finished", 6, 6)
    assert status["last_checkpoint"]["step"] == 6 and status["environment"]["jax"]
    assert read_status(directory / "status" / "training_status.json")["phase"] == "finished"
    steps = sorted(path.stem for path in (out / "samples").iterdir())
    assert steps == ["step_000002", "step_000004", "step_000006"]
    record = json.loads((out / "samples" / "step_000006.jsonl").read_text().splitlines()[0])
    assert record["prompt"].endswith("=") and record["expected"].isdigit()
    assert record["right"] is (record["completion"].strip() == record["expected"])
    assert 1 <= record["tokens"] <= 5 and status["last_preview"] == record
    assert list((out / "profile").rglob("*.trace.json.gz"))
    page = (out / "report.html").read_text()
    for words in ("finished", "held-out prompts", record["prompt"], "eval_loss", "Configuration"):
        assert words in page
    assert "held-out prompts after step 6" in said
    seen = (directory / "tracked.txt").read_text().split()
    assert seen == ["1", "2", "2", "3", "4", "4", "5", "6", "6"]


def test_the_best_state_is_what_is_exported(watched):
    _, result, said = watched
    lines = map(json.loads, (result.output_dir / "metrics.jsonl").read_text().splitlines())
    found = {li["step"]: v for li in lines if (v := li.get("eval_mean_token_accuracy")) is not None}
    best = min(found, key=found.get)
    assert best != 6 and f"restoring the best state, of step {best}" in said
    assert result.best_checkpoint == result.output_dir / "best" / str(best)
    state = jax.eval_shape(lambda state: state, result.state)
    kept, _, step = Checkpointer(result.output_dir / "best").restore(state)
    assert step == best
    _, params = load_pretrained(result.model_dir)
    exported, expected = named_leaves(params), named_leaves(kept.params)
    assert exported.keys() == expected.keys()
    for name, leaf in expected.items():
        assert (exported[name] == leaf).all(), name


def test_callbacks_stand_in_the_order_of_the_documentation(watched):
    _, result, _ = watched
    newest = result.output_dir / "checkpoints" / "6" / "relax_state.json"
    states = json.loads(newest.read_text())["progress"]["callbacks"]
    assert list(states) == [
        "MetricsLog.0", "NonFiniteGuard.0", "LearningMonitor.0", "Count.0", "BestCheckpoint.0",
    ]  # fmt: skip
    assert states["Count.0"] == {"updates": 6}


def test_a_run_that_fails_leaves_its_error_in_status_and_report(tmp_path):
    writer = TrainingStatusWriter(tmp_path / "status.json")
    with pytest.raises(RuntimeError, match="boom"):
        job(
            tmp_path,
            TrainerEngine(writer, console=quiet()),
            callbacks=[f"{tmp_path}/mine.py:Explode"],
        )
    for path in (tmp_path / "out" / "status.json", writer.path):
        status = read_status(path)
        assert (status["phase"], status["step"]) == ("failed", 3)
        assert status["error"].startswith("RuntimeError: boom <b>")
        assert "raised by the callback Explode.on_batch_end" in status["error"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "boom &lt;b&gt;" in page and "boom <b>" not in page


def test_a_run_whose_updates_are_not_finite_stops_and_says_which(tmp_path):
    with pytest.raises(NonFiniteError, match="3 updates in a row"):
        job(tmp_path, learning_rate=1e30, max_grad_norm=0.0, eval_steps=6.0)
    status = read_status(tmp_path / "out" / "status.json")
    assert status["phase"] == "failed"
    [skipped] = [w for w in status["warnings"] if "were skipped" in w["text"]]
    assert f"up to step {skipped['step']} were skipped" in skipped["text"]
    assert len((tmp_path / "out" / "bad_batch.jsonl").read_text().splitlines()) == 3


def test_a_job_that_is_refused_leaves_no_trace_but_tells_its_writer(tmp_path):
    writer = TrainingStatusWriter(tmp_path / "status.json")
    engine = TrainerEngine(writer, console=quiet())
    with pytest.raises(ConfigError, match="max_steps must be"):
        engine.run_job(SFTConfig().replace(max_steps=0))
    assert read_status(writer.path)["error"].startswith("max_steps must be")
    with pytest.raises(ConfigError, match="there is no module 'no_such_package'"):
        job(tmp_path, engine, callbacks=["no_such_package.Class"])
    status = read_status(writer.path)
    assert status["phase"] == "failed" and "no_such_package" in status["error"]
    assert status["output_dir"] == str(tmp_path / "out")
    with pytest.raises(ConfigError, match="max_length|positions|rows"):
        job(tmp_path, engine, test_size=24.0)
    assert read_status(writer.path)["phase"] == "failed"
    assert "test_size must leave rows" in read_status(writer.path)["error"]
    left = (
        sorted(path.name for path in (tmp_path / "out").iterdir())
        if (tmp_path / "out").exists()
        else []
    )
    assert set(left) <= {".lock"}
