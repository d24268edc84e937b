"""`TrainerEngine.run_job` over the forms that data, batches and precision come in."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.trl_cases import write_tiny_llama
from rich.console import Console
from runs import additions, write_rows

from relax.callbacks import Callback, StopTraining
from relax.config import create_default_config, from_dict
from relax.engine import RunResult, TrainerEngine
from relax.engine.rows import source_rows
from relax.engine.run import Run
from relax.errors import ConfigError
from relax.models import load_pretrained

ROWS = additions(12)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture
def job(model_dir, tmp_path):
    """Runs two updates on some data: the result, the losses, and what was printed."""
    count = iter(range(100))

    def job(dataset, **fields) -> tuple[RunResult, list[float], str]:
        output_dir = tmp_path / f"run{next(count)}"
        if not isinstance(dataset, Path):
            dataset = write_rows(tmp_path / f"{output_dir.name}.jsonl", dataset)
        defaults = {
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "pad_to_multiple_of": 64,
            "save_strategy": "no",
        }
        config = create_default_config(
            str(model_dir), str(dataset), str(output_dir), **defaults | fields
        )
        console = Console(file=open(output_dir.with_suffix(".txt"), "w+"), width=120)
        with console.file:
            result = TrainerEngine(console=console).run_job(config)
            console.file.seek(0)
            said = console.file.read()
        lines = map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())
        return result, [record["loss"] for record in lines if "loss" in record], said

    return job


def as_messages(row) -> dict:
    turns = {"user": row["prompt"], "assistant": row["completion"]}
    return {"messages": [{"role": role, "content": text} for role, text in turns.items()]}


def test_a_file_of_every_kind_holds_the_same_rows(job, tmp_path):
    """JSON lines, a list in JSON, parquet, and a directory with a file per split."""
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    _, expected, _ = job(ROWS)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_rows(folder / "train.jsonl", ROWS)
    write_rows(folder / "test.jsonl", ROWS[:4])
    assert job(tmp_path / "rows.json")[1] == expected
    assert job(tmp_path / "rows.parquet")[1] == expected
    result, losses, said = job(folder, eval_strategy="epoch")
    assert losses == expected
    assert "eval_loss" in result.metrics and "evaluation loss" in said


def test_rows_of_every_format_train_on_the_right_tokens(job):
    """Tokens of the first two updates: all of a text, the answers of the others."""
    texts = [{"text": row["prompt"] + row["completion"]} for row in ROWS]
    answers = sum(len(row["completion"]) + 1 for row in ROWS)
    _, _, said = job(texts)
    whole = sum(len(row["text"]) for row in texts)  # the end token stands in for the first one
    assert f"of which {whole} trained" in said and "every token" in said
    _, _, said = job(ROWS)
    assert f"of which {answers} trained" in said and "completions" in said
    _, losses, said = job([as_messages(row) for row in ROWS], assistant_only_loss=True)
    assert f"of which {answers} trained" in said and "the assistant's words" in said
    split = [
        {"prompt": row["messages"][:1], "completion": row["messages"][1:]}
        for row in map(as_messages, ROWS)
    ]
    assert job(split)[1] == losses


def test_packing_changes_the_shape_of_batches_and_not_the_loss(job):
    """All rows in every update: as twelve rows, and packed into two."""
    _, plain, _ = job(ROWS, per_device_train_batch_size=12)
    packing = {"packing": True, "max_length": 64, "pad_to_multiple_of": None}
    _, packed, said = job(ROWS, per_device_train_batch_size=3, **packing)
    assert "packing       bfd: 2 rows" in said
    np.testing.assert_allclose(packed, plain, rtol=1e-5)


def test_gradient_checkpointing_does_not_change_the_loss(job):
    losses = [job(ROWS, gradient_checkpointing=on)[1] for on in (True, False)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


def test_bfloat16_computes_about_the_same_loss_and_keeps_float32_parameters(job):
    _, exact, _ = job(ROWS)
    result, rough, said = job(ROWS, dtype="bfloat16")
    assert ", bfloat16" in said
    np.testing.assert_allclose(rough, exact, rtol=0.02)
    assert not np.array_equal(rough, exact)
    assert {leaf.dtype for leaf in jax.tree.leaves(result.state.params)} == {jnp.dtype(jnp.float32)}
    result, _, _ = job(ROWS, dtype="bfloat16", param_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(result.state.params)} == {
        jnp.dtype(jnp.bfloat16)
    }
    stored = json.loads((result.model_dir / "config.json").read_text())
    assert stored["dtype"] == "bfloat16"


def test_two_by_two_rows_are_one_update_of_four(job):
    _, whole, _ = job(ROWS)
    _, halves, said = job(ROWS, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert "updates of 4 rows (2 x 2)" in said
    np.testing.assert_allclose(halves, whole, rtol=1e-5)


def test_the_result_holds_the_state_the_metrics_and_the_model(job):
    result, _, _ = job(ROWS, test_size=4)
    assert int(result.state.step) == 2
    assert result.metrics["eval_loss"] > 0
    _, params = load_pretrained(result.model_dir)
    jax.tree.map(np.testing.assert_array_equal, result.state.params, params)


def test_a_callback_that_stops_the_run_ends_it_in_order(job, monkeypatch):
    class StopAtOne(Callback):
        def on_batch_end(self, event):
            raise StopTraining

    options = Run.options
    monkeypatch.setattr(Run, "options", lambda *args: options(*args, StopAtOne()))
    result, losses, said = job(ROWS)
    assert int(result.state.step) == 1
    assert len(losses) == 1 and "done in" in said
    assert (result.model_dir / "model.safetensors").is_file()


def test_rows_from_python_train_as_the_same_rows_of_a_file_do(job, model_dir, tmp_path):
    _, expected, _ = job(ROWS)
    config = create_default_config(
        str(model_dir),
        output_dir=str(tmp_path / "python"),
        max_steps=2,
        per_device_train_batch_size=4,
        logging_steps=1,
        learning_rate=1e-3,
        pad_to_multiple_of=64,
        save_strategy="no",
    )
    with open(tmp_path / "said.txt", "w") as file:
        engine = TrainerEngine(console=Console(file=file))
        result = engine.run_job(config, ROWS, ROWS[:4])
    lines = map(json.loads, (tmp_path / "python" / "metrics.jsonl").read_text().splitlines())
    assert [record["loss"] for record in lines if "loss" in record] == expected
    assert result.metrics["eval_loss"] > 0
    saved = json.loads((tmp_path / "python" / "config.json").read_text())
    assert saved["data"]["dataset_name"] == "rows from Python"


def test_rows_from_python_take_the_options_of_rows_from_a_file(model_dir, tmp_path):
    rows = [{"body": f"row {i}"} for i in range(6)]
    config = create_default_config(str(model_dir), output_dir=str(tmp_path / "run"), dry_run=True)
    config = config.replace(dataset_text_field="body")
    with Run(config.replace(test_size=2.0), rows) as run:
        train, held_out = source_rows(run.config, run.rows)
    saved = from_dict(run.config.to_dict())
    with Run(saved, rows) as again:  # what a run saves names no data, and says so
        assert again.config == run.config
    with pytest.raises(ConfigError, match="pass the rows as train_rows"), Run(saved):
        pass
    assert (len(train), len(held_out)) == (4, 2)
    assert sorted(row["body"] for row in train.rows + held_out.rows) == [r["body"] for r in rows]
    with Run(config.replace(num_samples=2), rows, rows[:2]) as run:  # they have previews
        assert [len(part) for part in source_rows(run.config, run.rows)] == [6, 2]


def test_options_that_rows_from_python_leave_without_effect_are_refused(model_dir):
    def refused(reason, *rows, **options):
        config = create_default_config(str(model_dir), dry_run=True).replace(**options)
        with pytest.raises(ConfigError, match=reason), Run(config, *rows) as run:
            source_rows(run.config, run.rows)

    refused("test_size and eval_dataset_name exclude each other", ROWS, ROWS, test_size=2.0)
    refused("num_samples has no effect: no rows are held out", ROWS, num_samples=2)
    refused("dataset_config names a subdirectory", ROWS, dataset_config="main")


def test_rows_and_a_named_data_set_exclude_each_other(model_dir, tmp_path):
    config = create_default_config(str(model_dir), "rows.jsonl", str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="pass either rows or dataset_name"):
        TrainerEngine().run_job(config, ROWS)
    with pytest.raises(ConfigError, match="eval_rows need train_rows"):
        TrainerEngine().run_job(create_default_config(), eval_rows=ROWS)
