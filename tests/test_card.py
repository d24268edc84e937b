"""Model cards of runs, and uploads to the hub, without a hub."""

import json
import re
import types
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.numpy import load_file, save_file

from relax.errors import ConfigError, ModelLoadError
from relax.files import CARD, CARD_MARK, CURVES
from relax.monitor.card import command, licence_of, metadata, plain, write_card
from relax.monitor.run_files import Run
from relax.tools.export.config import ExportConfig
from relax.tools.export.export import upload
from relax.tools.export.hub import push
from relax.tools.merge.sources import find_source


def make_run(**changes) -> Run:
    """A finished SFT run."""
    config = {
        "algorithm": "sft",
        "model": {"model_name_or_path": "owner/base", "dtype": "bfloat16"},
        "data": {"dataset_name": "owner/rows:0.7,/home/me/secret place/b.jsonl:0.3"},
        "hyperparams": {"learning_rate": 1e-3, "max_steps": 20},
        "output": {"output_dir": "/home/me/outputs/mine", "report_to": ["wandb"]},
    }
    series = {"loss": ([1.0, 2.0, 3.0], [2.0, 1.5, 1.0]), "num_tokens": ([3.0], [1234.0])}
    run = Run("mine", config | changes, {}, {"step": 20}, series, {}, {})
    return run


def front_matter(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)---\n", text, re.S)[1])


def test_a_card_says_what_was_trained_on_what_and_how(tmp_path):
    """As the hub reads it, with a picture, an evaluation table, flags and versions."""
    base = tmp_path / "base"
    base.mkdir()
    (base / CARD).write_text("---\nlicense: other\nlicense_name: mine\ntags: [a]\n---\n# Base\n")
    path = write_card(tmp_path, make_run(), {"eval_loss": 0.5, "exact_match": 0.75}, base)
    text = path.read_text()
    fields = ModelCard(text).data.to_dict()
    assert fields == front_matter(text) == {
        "base_model": "owner/base",
        "base_model_relation": "finetune",
        "datasets": ["owner/rows"],
        "license": "other",
        "license_name": "mine",
        "library_name": "transformers",
        "model_name": "mine",
        "pipeline_tag": "text-generation",
        "tags": ["relax", "jax", "sft"],
    }  # fmt: skip
    assert "| `eval_loss` | 0.5 |" in text and "| `exact_match` | 0.75 |" in text
    assert f"]({CURVES})" in text and "1,234" in text
    assert "--learning_rate 0.001" in text and "--max_steps 20" in text
    assert "owner/rows:0.7,b.jsonl:0.3" in text
    assert not re.search(r"/home|secret|wandb|output_dir", text)
    assert "| jax |" in text and "| transformers |" in text
    svg = (tmp_path / CURVES).read_text()
    import xml.etree.ElementTree as tree

    assert tree.fromstring(svg).tag.endswith("svg") and "Loss" in svg and "var(--c0)" in svg


def test_a_card_of_local_files_names_no_hub_and_no_licence(tmp_path):
    local = {"model": {"model_name_or_path": "/data/models/mine"}}
    run = make_run(**local, data={"dataset_name": "reasoning_gym/chain_sum"})
    fields = metadata(run, {})
    assert not {"base_model", "datasets", "license"} & set(fields)
    assert "--model_name_or_path mine" in command(run)
    (tmp_path / "adapter_config.json").write_text("{}")
    text = write_card(tmp_path, make_run(model={}), {}).read_text()
    assert front_matter(text)["library_name"] == "peft"
    assert "was not trained before" in text and "not evaluated" in text
    assert licence_of(tmp_path / "nowhere") == {}
    (tmp_path / CARD).write_text("---\nlicense: [a, {\n---\n")
    assert licence_of(tmp_path) == {}


def test_paths_passwords_and_tokens_do_not_enter_a_card():
    for text, expected in (
        ("/home/me/rows.jsonl", "rows.jsonl"),
        ("~/rows.jsonl", "rows.jsonl"),
        ("C:\\Users\\me\\rows.jsonl", "rows.jsonl"),
        ("rewards.py:short,/home/me/more.py:long", "rewards.py:short,more.py:long"),
        ('{"f": "/home/me/x"}', '{"f": "x"}'),
        ("https://me:pass@host/rows.jsonl", "https://***@host/rows.jsonl"),
        ("owner/model", "owner/model"),
        ("hf_abcdefghijklmnopqrst", "***"),
    ):
        assert plain(text) == expected


class Hub:
    """Takes the place of `HfApi`."""

    def __init__(self, error: Exception | None = None):
        self.error, self.calls = error, []

    def create_repo(self, repo, **options):
        if self.error is not None:
            raise self.error
        self.calls.append((repo, options))

    def create_commit(self, repo, operations, **options):
        self.files = {o.path_in_repo: o.path_or_fileobj for o in operations}
        return types.SimpleNamespace(commit_url=f"https://hub/{repo}/commit/1")


@pytest.fixture
def directory(tmp_path):
    """A model directory with a card, and with files that are no part of a model."""
    import grpo_runs

    path = Path(grpo_runs.make_job(tmp_path)["model_name_or_path"])
    write_card(path, make_run(), {})
    (path / "notes.log").write_text("private")
    (path / ".env").write_text("HF_TOKEN=hf_abcdefghijklmnopqrst")
    return path


def test_what_is_uploaded_is_said_before_and_is_the_model_with_its_card(directory):
    hub, said = Hub(), []
    model = find_source(str(directory))
    assert push(model, "me/mine", dry_run=True, say=said.append, api=hub) is None
    assert hub.calls == [] and "private repository me/mine" in said[0]
    assert any(line.startswith("  model.safetensors (") for line in said)
    assert said[-1] == "not uploaded, since no part of a model: .env, notes.log"
    address = push(model, "me/mine", say=said.append, api=hub)
    assert address == "https://hub/me/mine/commit/1"
    assert hub.calls == [("me/mine", {"private": True, "exist_ok": True})]
    assert {"config.json", "model.safetensors", "tokenizer.json", CARD, CURVES} <= set(hub.files)
    assert not {"notes.log", ".env"} & set(hub.files)


def test_the_command_uploads_nothing_in_a_dry_run(directory, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    config = ExportConfig().replace(
        model_name_or_path=str(directory), to="hub", repo="me/mine", dry_run=True
    )
    config.check()
    assert upload(config) is None
    assert "to the private repository me/mine" in capsys.readouterr().out


def test_an_upload_without_permission_is_one_sentence(directory):
    hub = Hub(PermissionError("401 Client Error for hf_abcdefghijklmnopqrst\nmore"))
    with pytest.raises(ModelLoadError, match="401 Client Error .* Log in") as caught:
        push(find_source(str(directory)), "me/mine", say=lambda line: None, api=hub)
    assert "hf_abc" not in str(caught.value) and "\n" not in str(caught.value)


def test_secrets_and_directories_of_the_machine_are_not_uploaded(directory):
    model = find_source(str(directory))
    card = directory / CARD
    before = card.read_text()
    for text, words in (
        ("key hf_abcdefghijklmnopqrst", "README.md:.* a password or an access token"),
        (f"see {Path.home()}/x", "README.md:.* of this machine"),
    ):
        card.write_text(f"{before}\n{text}\n")
        with pytest.raises(ConfigError, match=words):
            push(model, "me/mine", say=lambda line: None, api=Hub())


def test_an_adapter_of_a_local_base_needs_the_hub_name_of_its_base(directory):
    from relax.tools.export.hub import uploads

    (directory / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(directory)})
    )
    with pytest.raises(ConfigError, match="give its hub name with --base_model"):
        uploads(directory)
    files = {upload.name: upload.content for upload in uploads(directory, "owner/base")[0]}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "owner/base"


def test_weights_that_are_no_numbers_are_not_uploaded(directory):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(-1)[0] = np.nan
    save_file(tensors, file, metadata={"format": "pt"})
    hub = Hub()
    with pytest.raises(ModelLoadError, match="NaN|not finite") as caught:
        push(find_source(str(directory)), "me/mine", say=lambda line: None, api=hub)
    assert hub.calls == [] and "\n" not in str(caught.value)


def test_a_model_with_its_own_card_is_replaced_and_one_with_another_is_not(directory, tmp_path):
    from relax.errors import RelaxError
    from relax.models.huggingface.directories import new_directory

    for name in ("notes.log", ".env"):
        (directory / name).unlink()
    assert CARD_MARK in (directory / CARD).read_text()
    with new_directory(directory) as (temporary, _):
        (temporary / "config.json").write_text("{}")
    assert [p.name for p in directory.iterdir()] == ["config.json"]
    (directory / CARD).write_text("# Written by hand\n")
    with pytest.raises(RelaxError, match="holds more than a model"):
        with new_directory(directory):
            pass


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "hub"}, "repo must name a repository"),
        ({"to": "hub", "repo": "a/b/c"}, "repo must be OWNER/NAME"),
        ({"repo": "a/b"}, "repo has no effect"),
        ({"to": "hub", "repo": "a/b", "type": "q8_0"}, "type has no effect"),
    ],
)
def test_flags_of_the_other_target_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        ExportConfig().replace(model_name_or_path="m", **options).check()
