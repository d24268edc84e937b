"""Bad input ends in one clear sentence, before anything is compiled; a full disk loses nothing."""

import errno
import json
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import meet
from runs import additions, call, flags, model_bytes, outcome, start, write_rows
from safetensors.numpy import load_file, save_file

from relax.callbacks import MetricsLog
from relax.data import arithmetic_tokenizer
from relax.files import list_steps
from relax.models import Transformer, TransformerConfig, save_pretrained
from relax.trainers import Trainer

ROWS = additions(4)
LONG = {"prompt": "1+" * 40, "completion": "80"}  # 83 tokens, the last three trained


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """A Hugging Face directory: two small layers, 128 positions, a token per byte."""
    shape = TransformerConfig(
        vocab_size=261,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    model = Transformer(shape)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    path = tmp_path_factory.mktemp("model") / "tiny"
    return save_pretrained(path, model, params, arithmetic_tokenizer())


@pytest.fixture
def run(tmp_path, capsys):
    """Runs a job of one update with some fields: exit code, what it said to stdout and stderr."""

    def run(**fields) -> tuple[int, str, str]:
        defaults = {
            "output_dir": tmp_path / "run",
            "max_steps": 1,
            "per_device_train_batch_size": 2,
            "save_strategy": "no",
            "pad_to_multiple_of": 16,
        }
        code = call(*flags(**{n: v for n, v in (defaults | fields).items() if v is not None}))
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def refused(run):
    """The one message with which a job ends before it has compiled or written anything."""

    def refused(**fields) -> str:
        code, out, err = run(**fields)
        assert code == 2, (out, err)
        assert "compiling" not in out
        assert err.startswith("error: ") and len(err.splitlines()) == 1, err
        return err.removeprefix("error: ").strip()

    return refused


def line(row) -> str:
    return json.dumps(row) + "\n"


GOOD = "".join(map(line, ROWS))

# name of the file -> (its text, the whole message after "FILE")
BROKEN_FILES = {
    "json": (
        GOOD + '{"prompt": "1+1=", "completion": }\n',
        ":5: broken JSON: Expecting value at column 34.",
    ),
    "misspelt": (
        GOOD.replace("prompt", "promt"),
        ":1: column 'prompt' is missing; the row has 'promt', 'completion' (did you mean 'promt'?)",
    ),
    "misspelt later": (
        GOOD + line({"prompt": "1+1=", "completon": "2"}),
        ":5: column 'completion' is missing; the row has 'prompt', 'completon' (did you mean",
    ),
    "other columns": (
        line({"question": "1+1=", "answer": "2"}),
        ":1: no known column: the row has 'question', 'answer'. A row has 'text', 'messages', or "
        "'prompt' and 'completion'",
    ),
    "wrong type": (
        GOOD + line({"prompt": 12, "completion": "2"}),
        ":5: 'prompt' must be a string, it is 12.",
    ),
    "empty": ("", ": the file holds no rows."),
    "nothing but blanks": ("\n \n", ": the file holds no rows."),
    "list": (GOOD + "[1]\n", ":5: a row must be a JSON object, this is a list."),
    "cut off": (
        GOOD + '{"prompt": "1+1=", "comp',
        ":5: broken JSON in the last line, which has no line end: the file looks truncated",
    ),
    "messages that are texts": (
        line({"messages": ["1+1=", "2"]}),
        ":1: 'messages[0]' must be an object, it is '1+1='.",
    ),
    "half a surrogate pair": (
        GOOD + '{"prompt": "\\ud83d", "completion": "2"}\n',
        ":5: a text holds U+D83D, half of a surrogate pair, at character 1",
    ),
    "token id": (
        line({"input_ids": [5, 6]}) + line({"input_ids": [5, 261]}),
        ":2: token id 261 is outside of the model's embedding of 261 rows",
    ),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_is_refused_with_its_line(name, refused, tmp_path):
    text, message = BROKEN_FILES[name]
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    assert refused(dataset_name=file).startswith(f"{file}{message}")


def test_the_script_prints_the_sentence_and_no_traceback(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(BROKEN_FILES["json"][0])
    child = start(*flags(dataset_name=file, output_dir=tmp_path / "run"))
    assert child.end() == 2
    # The precision, what was under way, and nothing else.
    first, *lines = child.stdout.splitlines()
    assert first.startswith("precision: ") and all(line.endswith(" ...") for line in lines)
    assert child.stderr == f"error: {file}{BROKEN_FILES['json'][1]}\n"


def test_a_row_without_a_trained_token_is_left_out_and_counted(run, tmp_path):
    none, some = ({"input_ids": [5, 6, 7], "labels": [-100, *ids]} for ids in ([-100] * 2, [6, 7]))
    code, out, _ = run(dataset_name=write_rows(tmp_path / "rows.jsonl", [none, some, some]))
    assert code == 0
    assert "3 read, 2 trained on" in out and "1 (1 no trained token)" in out
    report = json.loads((tmp_path / "run" / "data.json").read_text())["reports"]["training data"]
    assert report["dropped"] == {"no trained token": 1}


def test_a_data_set_without_a_trained_token_is_refused(refused, tmp_path):
    rows = [{"input_ids": [5, 6], "labels": [-100, -100]}] * 3
    message = refused(dataset_name=write_rows(tmp_path / "rows.jsonl", rows))
    assert message.startswith("none of 3 rows can be trained on (3 no trained token)")


# truncation_mode -> (what the report says of the long row, tokens in all)
LONG_ROWS = {
    "keep_start": ({"no trained token within max_length": 1}, 0, 0),
    "keep_end": ({}, 1, 16),
    "drop": ({"longer than max_length": 1}, 0, 0),
}


@pytest.mark.parametrize("mode", LONG_ROWS)
def test_a_prompt_longer_than_max_length_is_counted(mode, run, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [*ROWS, LONG])
    code, out, _ = run(dataset_name=file, max_length=16, truncation_mode=mode)
    dropped, truncated, tokens = LONG_ROWS[mode]
    report = json.loads((tmp_path / "run" / "data.json").read_text())["reports"]["training data"]
    short = sum(len(row["prompt"] + row["completion"]) + 1 for row in ROWS)
    assert code == 0
    assert report["dropped"] == dropped and report["truncated"] == truncated
    assert report["num_tokens"] == short + tokens
    assert f"5 read, {5 - len(dropped)} trained on" in out


def test_a_prompt_longer_than_max_length_can_be_an_error(refused, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [*ROWS, LONG])
    message = refused(dataset_name=file, max_length=16, truncation_mode="error")
    assert message.startswith(f"{file}:5: the row has 83 tokens, max_length=16: raise max_length")


def test_rows_that_are_all_too_long_are_refused(refused, tmp_path):
    message = refused(dataset_name=write_rows(tmp_path / "rows.jsonl", [LONG]), max_length=16)
    assert message.endswith("raise max_length=16 (the longest row has 83 tokens).")


def change(directory: Path, tensors=None, config=None, without=()) -> None:
    """Damages a copy of a model directory."""
    if tensors:
        held = load_file(directory / "model.safetensors")
        tensors(held)
        save_file(held, directory / "model.safetensors", metadata={"format": "pt"})
    if config:
        fields = json.loads((directory / "config.json").read_text()) | config
        (directory / "config.json").write_text(json.dumps(fields))
    for name in without:
        (directory / name).unlink()


NORM = "model.norm.weight"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
DAMAGED_MODELS = {
    "missing tensor": ({"tensors": lambda t: t.pop(NORM)}, f"1 missing: {NORM}"),
    "extra tensor": (
        {"tensors": lambda t: t.update({"lm_head.weight": np.zeros((261, 32), np.float32)})},
        "1 not in the architecture: lm_head.weight. Is tie_word_embeddings in config.json right?",
    ),
    "misshapen tensor": (
        {"tensors": lambda t: t.update({NORM: np.zeros(31, np.float32)})},
        f"{NORM} has shape (31,), expected (32,)",
    ),
    "unknown architecture": (
        {"config": {"model_type": "mamba"}},
        "config.json: unknown architecture: model_type is 'mamba'. Known: ",
    ),
    "no config": ({"without": ["config.json"]}, "has no config.json"),
    "no tensors": (
        {"without": ["model.safetensors"]},
        "has neither model.safetensors nor model.safetensors.index.json",
    ),
    "no tokenizer": (
        {"without": TOKENIZER_FILES},
        "A model directory needs tokenizer.json and tokenizer_config.json",
    ),
    "too few embeddings": (
        {
            "tensors": lambda t: t.update(
                {"model.embed_tokens.weight": t["model.embed_tokens.weight"][:20]}
            ),
            "config": {"vocab_size": 20},
        },
        "rows.jsonl:1: token id 20 is outside of the model's embedding of 20 rows",
    ),
}


@pytest.mark.parametrize("name", DAMAGED_MODELS)
def test_a_damaged_model_directory_is_refused(name, model_dir, refused, tmp_path):
    how, message = DAMAGED_MODELS[name]
    damaged = Path(shutil.copytree(model_dir, tmp_path / "model"))
    change(damaged, **how)
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    said = refused(dataset_name=file, model_name_or_path=damaged)
    assert message in said and str(tmp_path) in said


def test_names_that_are_no_directory_and_not_on_the_hub_are_refused(refused, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    said = refused(dataset_name=rows, model_name_or_path="no/model")
    assert said.startswith("'no/model' is no directory here and could not be fetched from the hub")
    said = refused(dataset_name="no/rows")
    assert said.startswith("'no/rows' is neither a file nor a directory, nor a data set on the hub")
    said = refused(dataset_name=rows, model_name_or_path=tmp_path / "nothing")
    assert said.startswith(f"no model directory at '{tmp_path / 'nothing'}'")
    said = refused(dataset_name=tmp_path / "nothing.jsonl")
    assert said.startswith(f"'{tmp_path / 'nothing.jsonl'}' is neither a file nor a directory")


def test_messages_without_a_chat_template_are_refused(model_dir, refused, tmp_path):
    bare = Path(shutil.copytree(model_dir, tmp_path / "model"))
    change(bare, without=["chat_template.jinja"])
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    said = refused(dataset_name=file, model_name_or_path=bare)
    assert "the tokenizer has none: give one with --chat_template_path" in said


def test_rows_longer_than_the_model_has_positions_are_refused(model_dir, refused, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "a" * 300}])
    said = refused(dataset_name=file, model_name_or_path=model_dir)
    assert said == (
        "training data: batches are up to 304 tokens long, and the model has 128 positions. "
        "Pass --max_length 128."
    )


def test_evaluation_without_rows_for_it_is_refused(refused, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    said = refused(dataset_name=file, eval_strategy="epoch")
    assert said.startswith("eval_strategy and eval_on_start need evaluation rows: pass --eval_")
    said = refused(dataset_name=file, test_size=4)
    assert said == "test_size must leave rows to train on, got 4 of 4 rows. Lower it."


def test_an_output_directory_in_use_is_refused_and_not_touched(run, refused, model_dir, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert run(dataset_name=file)[0] == 0
    before = model_bytes(tmp_path / "run")
    said = refused(dataset_name=file, seed=1)
    assert f"'{tmp_path / 'run'}' holds another run. Pass --resume auto to resume it" in said
    assert "--overwrite_output_dir to delete it" in said
    assert model_bytes(tmp_path / "run") == before

    said = refused(dataset_name=file, output_dir=model_dir)
    assert f"'{model_dir}' holds config.json, not written by ReLax" in said
    assert not (model_dir / ".lock").exists()
    said = refused(dataset_name=file, output_dir=file)
    assert said.startswith(f"output_dir must be a writable directory, got '{file}'")


def test_overwriting_deletes_the_earlier_run_only_when_all_is_well(run, refused, tmp_path):
    """A misspelt file name must not cost the run that was there."""
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert run(dataset_name=file)[0] == 0
    before = model_bytes(tmp_path / "run")
    refused(dataset_name=tmp_path / "row.jsonl", overwrite_output_dir=True)
    assert model_bytes(tmp_path / "run") == before
    code, out, _ = run(dataset_name=file, seed=1, overwrite_output_dir=True)
    assert code == 0 and "overwrite: deleted" in out
    assert model_bytes(tmp_path / "run") != before


# A job of three updates, each of them saved.
SAVING = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}


def test_a_disk_that_fills_up_while_saving_ends_the_run_and_a_resume_completes_it(
    run, tmp_path, monkeypatch
):
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert run(dataset_name=file, output_dir=tmp_path / "whole", **SAVING)[0] == 0
    with monkeypatch.context() as patch:
        meet("mid_write:2:enospc", patch)
        code, _, err = run(dataset_name=file, **SAVING)
    assert code == 1 and len(err.splitlines()) == 1
    assert err.startswith("error: checkpoint 2 does not fit on the disk: it needs about 9.85 MB, '")
    assert "B free (No space left); checkpoint 1 is intact. Free some space" in err
    assert run(dataset_name=file, resume="auto", **SAVING)[0] == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_disk_that_is_full_at_the_export_keeps_the_checkpoints(run, tmp_path, monkeypatch):
    """The kernel refuses the large file; here by the limit on the size of one."""
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    train = Trainer.train

    def train_and_fill(*args, **kwargs):
        state = train(*args, **kwargs)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        return state

    fields = {"dataset_name": file, "save_strategy": "steps", "save_steps": 1}
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train", train_and_fill)
            code, _, err = run(**fields)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    final = tmp_path / "run" / "final"
    assert code == 1 and len(err.splitlines()) == 1
    assert err.startswith(f"error: the model cannot be written to '{final}': File too large")
    assert "Checkpoint 1 is intact; make room and run: " in err and "--resume auto" in err
    assert [p.name for p in final.parent.iterdir() if "final" in p.name] == []
    assert run(**fields, resume="auto")[0] == 0
    assert model_bytes(tmp_path / "run")


def test_a_disk_that_is_full_for_the_metrics_ends_in_a_sentence(run, tmp_path, monkeypatch):
    def full(self, line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    monkeypatch.setattr(MetricsLog, "_write", full)
    code, _, err = run(dataset_name=write_rows(tmp_path / "rows.jsonl", ROWS))
    assert code == 1 and len(err.splitlines()) == 1
    assert err.startswith("error: the disk is full: [Errno 28] No space left on device: '")
    assert "No checkpoint was saved; make room and run: " in err


def test_metrics_that_cannot_be_written_end_in_a_sentence_with_the_command_that_resumes(
    run, tmp_path
):
    fields = {"dataset_name": write_rows(tmp_path / "rows.jsonl", ROWS)}
    fields |= {"save_strategy": "steps", "save_steps": 1}
    assert run(**fields)[0] == 0
    path = tmp_path / "run" / "metrics.jsonl"
    path.unlink()
    path.mkdir()
    code, _, err = run(**fields, resume="auto")
    assert code == 1 and len(err.splitlines()) == 1
    assert err.startswith("error: the run cannot write its files: [Errno 21] Is a directory: '")
    assert "make the path writable and run: " in err and "--resume auto" in err


def test_a_disk_too_small_for_the_checkpoints_is_refused_before_compiling(
    run, tmp_path, monkeypatch
):
    usage = SimpleNamespace(total=10**9, used=0, free=20_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    code, out, err = run(dataset_name=file, **SAVING)
    assert code == 2 and "compiling" not in out
    assert err.startswith(
        "error: 4 checkpoints of 9.85 MB and a model of 3.28 MB need 42.7 MB, and "
        f"'{tmp_path / 'run'}' has 20 MB free. Free some space, lower save_total_limit, or"
    )
    assert list_steps(tmp_path / "run" / "checkpoints") == []
