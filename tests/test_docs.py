"""Every snippet, command and cell of README, docs and the notebook works as it stands there."""

import contextlib
import json
import os
import re
import subprocess
import sys

import doc_code
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_layering
from doc_code import PAGES, ROOT, commands, snippets
from runs import environment

from relax.__main__ import CONFIGURED, PROGRAMS
from relax.config import (
    DistillConfig,
    DPOConfig,
    GRPOConfig,
    OnlineDPOConfig,
    PPOConfig,
    RewardModelConfig,
    SFTConfig,
    cli,
)
from relax.models import Transformer, TransformerConfig, save_pretrained
from relax.models.heads import init_head, with_head
from relax.models.huggingface.classifiers import save_classifier

SCRIPTS = {
    "run_sft.py": SFTConfig,
    "run_dpo.py": DPOConfig,
    "run_reward.py": RewardModelConfig,
    "run_grpo.py": GRPOConfig,
    "run_rl.py": PPOConfig,
    "run_distill.py": DistillConfig,
    "run_online_dpo.py": OnlineDPOConfig,
}
WITH_CODE = [page for page in PAGES if snippets(page)]
WRITTEN = sorted({tuple(command) for page in PAGES for command in commands(page)})
TRAINER = """\
class MyTrainer(Trainer):
    def create_train_state(self, key):
        params = self.model.init(key, jnp.zeros((1, 8), jnp.int32))["params"]
        return TrainState.create(params=params, optimizer=self.optimizer, rng=key)

    def compute_loss(self, params, batch):
        logits = self.model.apply({"params": params}, batch["input_ids"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


trainer = MyTrainer(model, optax.adamw(1e-3))
state = trainer.train(train_loader, num_epochs=3, key=jax.random.key(0))
metrics = trainer.validate(state, eval_loader)
"""
SHORT = {  # of runs that go on for minutes as they stand
    "run_grpo.py": ["--max_steps=2"],
    "run_rl.py": ["--max_steps=8"],
}


@pytest.fixture(scope="module")
def given(arithmetic_tokenizer):
    """The names that snippets assume: a model, its tokenizer, data, rewards."""
    config = TransformerConfig(
        vocab_size=len(arithmetic_tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
    )
    model = Transformer(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    ids = np.arange(16, dtype=np.int32).reshape(2, 8)
    prompts = [list(b"2+2="), list(b"1+2=")]
    rows = [{"prompt": "2+2=", "answer": "4"}, {"prompt": "1+2=", "answer": "3"}]
    return {
        **{"jax": jax, "jnp": jnp, "np": np, "optax": optax},
        **{"model": model, "params": params, "tokenizer": arithmetic_tokenizer},
        "optimizer": optax.adam(1e-3),
        "train_loader": [{"input_ids": ids, "labels": ids}],
        "eval_loader": [{"input_ids": ids, "labels": ids}],
        "loader": [{"prompt_ids": prompts, "rows": rows}],
        "text": "2+2=",
        "f": lambda completions, **columns: [float(len(text)) for text in completions],
        "short": lambda completions, **columns: [-float(len(text)) for text in completions],
        "rows": rows,
        "prompts": [row["prompt"] for row in rows],
        "completions": ["4", "5"],
        "completion_ids": [[1], [2]],
        "columns": {"answer": ["4", "3"]},
    }


@pytest.fixture(scope="module")
def folder(given, tmp_path_factory):
    """The files and directories that pages name."""
    path = tmp_path_factory.mktemp("docs")
    doc_code.write_files(path)
    doc_code.write_runs(path)
    model, params, tokenizer = (given[name] for name in ("model", "params", "tokenizer"))
    for name in ("DIR", "DIR_B", "DIR_0"):
        save_pretrained(path / name, model, params, tokenizer)
    head = init_head(jax.random.key(1), model.config)
    save_classifier(path / "outputs/mine/final", model, with_head(params, head), tokenizer)
    return path


@pytest.mark.parametrize("page", [p for p in WITH_CODE if p.stem != "scale"], ids=lambda p: p.stem)
def test_the_python_of_a_page_runs(page, given, folder, monkeypatch):
    here = folder if page.stem == "reward_models" else folder / page.stem
    here.mkdir(exist_ok=True)
    doc_code.write_files(here)
    monkeypatch.chdir(here)
    names = dict(given)
    for code in snippets(page):
        code = code.replace('"DIR"', f"{str(folder / 'DIR')!r}")
        code = code.replace(
            "packing=True\n", "packing=True, max_steps=2, overwrite_output_dir=True"
        )
        with jax.numpy_rank_promotion("allow"):  # as a reader has it
            exec(compile(code, page.name, "exec"), names)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_notebook_runs_and_learns():
    with jax.numpy_rank_promotion("allow"):
        printed = doc_code.run_notebook({})
    told = "".join(printed)
    before, after = map(float, re.search(r"mean reward (\S+) -> (\S+)", told).groups())
    assert after > before + 0.05
    kept = [
        "".join("".join(output["text"]) for output in cell["outputs"])
        for cell in json.loads(doc_code.NOTEBOOK.read_text())["cells"]
        if cell["cell_type"] == "code"
    ]
    # Numbers may differ in the last digits between machines, words and lines may not.
    assert [re.sub(r"[\d.]+", "#", text) for text in printed] == [
        re.sub(r"[\d.]+", "#", text) for text in kept
    ]


@pytest.mark.parametrize("command", WRITTEN, ids=" ".join)
def test_a_command_of_the_pages_is_a_valid_one(command, folder, monkeypatch):
    monkeypatch.chdir(folder)
    program, *args = command
    if program == "pip":
        named = set(re.findall(r"(?:\.|relax-trainers)\[(.*?)\]", " ".join(args)))
        named = {extra for group in named for extra in group.split(",")}
        extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
        assert all(re.search(rf"^{extra} = ", extras, re.MULTILINE) for extra in named)
        return
    if program == "relax" and args[0] in (*PROGRAMS, "--version", "--help"):
        return
    assert program in ("python", "relax")
    if program == "relax" or args[0] in SCRIPTS:
        known = CONFIGURED[args[0]][0] if program == "relax" else SCRIPTS[args[0]]
        found, words = [], [word for word in args[1:] if word != "prepare"]
        if {"--help", "--print_config"} & set(words):
            with contextlib.suppress(SystemExit):
                cli.run(known, found.append, words)
            assert found == []
        else:
            cli.run(known, found.append, words)
            assert isinstance(found[0], known)
    elif args[0] == "-m":
        name = args[1].replace(".", "/")
        is_ours = (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file()
        assert is_ours or args[1] == "pytest"
    else:
        assert (ROOT / args[0]).is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "command",
    [
        c
        for c in WRITTEN
        if c[0] in ("python", "relax") and not {"pytest", "export", "serve"} & {*c}
    ],
    ids=" ".join,
)
def test_a_command_of_the_pages_runs(command, folder, tmp_path):
    with contextlib.suppress(FileExistsError):
        for name in ("benchmarks", "relax"):
            os.symlink(ROOT / name, folder / name)
    args = [str(ROOT / word) if word in SCRIPTS else word for word in command[1:]]
    if command[0] == "relax":
        args = ["-m", "relax", *args]
    if command[1] in SCRIPTS:
        if not any(word.startswith("--max_steps") for word in args):
            args += SHORT.get(command[1], ["--max_steps=2"])
        if "--output_dir" in args:  # other commands read from there
            at = args.index("--output_dir")
            del args[at : at + 2]
        args += ["--overwrite_output_dir", f"--output_dir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, *args], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_links_between_pages_lead_somewhere():
    for page in [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_can_be_reached_from_the_index_and_is_in_the_navigation():
    pages = {page for page in PAGES if page.parent != ROOT}
    reached, new = set(), [ROOT / "docs" / "index.md"]
    while new:
        page = new.pop()
        if page.suffix == ".md" and page not in reached:
            reached.add(page)
            links = re.findall(r"\]\(([^)#:]+)", page.read_text(encoding="utf-8"))
            new += [(page.parent / link).resolve() for link in links]
    assert pages <= reached, pages - reached
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    named = {ROOT / "docs" / name for name in re.findall(r"- (\S+\.md)$", navigation, re.MULTILINE)}
    assert named == pages


def test_the_readme_has_at_most_130_lines_and_the_trainer_of_twelve():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    assert TRAINER in text


def test_the_architecture_page_has_the_layers_that_are_tested():
    blocks = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```")
    assert blocks[1].strip() == test_layering.LAYERS.strip()
    drawn = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    assert all(name in drawn for name in test_layering.LAYERS.split())
