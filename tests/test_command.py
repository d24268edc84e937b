"""The command `relax`: its list, its commands, its messages, and that a wheel installs it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from doc_code import ROOT

from relax import __version__
from relax.__main__ import CONFIGURED, PROGRAMS, main
from relax.config import PPOConfig, SFTConfig
from relax.config import cli as command_line
from relax.config.cli import program_words
from relax.tools import reference

NAMES = """
sft dpo reward grpo ppo distill online_dpo sample serve plan eval merge export data gguf report
monitor lm_eval
""".split()


def test_without_arguments_and_with_help_all_commands_are_listed(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == out
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == NAMES
    assert all(len(line) <= 80 for line in out.splitlines())
    assert [*CONFIGURED, *PROGRAMS] == NAMES


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"relax {__version__}\n"


@pytest.mark.parametrize(
    ("typed", "meant"), [("stf", "sft"), ("gropo", "grpo"), ("samples", "sample"), ("dpoo", "dpo")]
)
def test_an_unknown_command_is_refused_with_the_nearest(capsys, typed, meant):
    assert main([typed, "--seed=1"]) == 2
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert out == "" and second.startswith("The commands are sft, dpo, ")
    assert first == f"error: there is no command {typed!r}. Did you mean relax {meant}?"


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_help_that_names_it(capsys, name):
    if name == "lm_eval":  # its help is that of the package
        pytest.importorskip("lm_eval")
    try:
        code = main([name, "--help"])
    except SystemExit as stop:  # argparse
        code = stop.code
    assert not code
    assert capsys.readouterr().out.startswith("usage: ")


def test_a_command_takes_the_flags_of_its_configuration(monkeypatch, capsys):
    found = []
    monkeypatch.setitem(CONFIGURED, "sft", (SFTConfig, found.append))
    assert main(["sft", "--max_steps", "7"]) == 0
    assert found[0].hyperparams.max_steps == 7
    with pytest.raises(SystemExit) as caught:
        main(["sft", "--max_stpes", "7"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: unknown flag --max_stpes. Did you mean --max_steps?",
        "see --help: relax sft --help",
    ]


def test_help_and_version_import_neither_jax_nor_numpy():
    code = (
        "import sys; from relax.__main__ import main\n"
        "for words in ([], ['--version'], ['grpo', '--help'], ['sample', '--help']): main(words)\n"
        "heavy = {'jax', 'numpy', 'flax', 'transformers'} & set(sys.modules)\n"
        "print(heavy or 'light', file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stderr == "light\n"


def test_a_reader_that_goes_away_is_no_error():
    words = [sys.executable, "-m", "relax", "sft", "--help"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        run.stdout.close()
        assert run.stderr.read() == b""
    assert run.returncode == 0


@pytest.mark.parametrize(
    ("running", "on_path", "words"),
    [
        ("run_sft.py", None, ["{python}", "run_sft.py"]),
        ("../there/run_sft.py", None, ["{python}", "../there/run_sft.py"]),
        ("/env/bin/relax", "/env/bin/relax", ["relax", "sft"]),
        ("/env/bin/relax", "/other/bin/relax", ["{python}", "-m", "relax", "sft"]),
        ("/env/bin/relax", None, ["{python}", "-m", "relax", "sft"]),
        ("/site-packages/relax/__main__.py", None, ["{python}", "-m", "relax", "sft"]),
        ("notebook_launcher.py", None, ["{python}", "-m", "relax", "sft"]),
    ],
)
def test_the_words_that_start_a_run_again(monkeypatch, running, on_path, words):
    monkeypatch.setattr(sys, "argv", [running, "--seed=1"])
    monkeypatch.setattr(command_line.shutil, "which", lambda name: on_path)
    assert program_words(SFTConfig) == [word.format(python=sys.executable) for word in words]


def test_ppo_has_a_script_of_another_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_rl.py"])
    assert program_words(PPOConfig)[-1] == "run_rl.py"
    monkeypatch.setattr(sys, "argv", ["x.py"])
    assert program_words(PPOConfig)[1:] == ["-m", "relax", "ppo"]


def test_the_page_of_all_flags_is_current():
    """python -m relax.tools.reference docs/cli.md"""
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert reference.MARK in page
    assert page == reference.updated(page)


def test_a_report_is_written_of_one_run_and_of_several(tmp_path, capsys):
    for name in ("a", "b"):
        run = tmp_path / name
        run.mkdir()
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert main(["report", a]) == 0
    assert (tmp_path / "a" / "report.html").is_file()
    assert main(["report", a, b, "-o", str(tmp_path / "both.html")]) == 0
    assert (tmp_path / "both.html").is_file()
    assert str(tmp_path / "both.html") in capsys.readouterr().out
    assert main(["report", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.programs
def installed(wheel: Path, folder: Path) -> Path:
    """The programs of a fresh environment with the wheel; it borrows the dependencies."""
    venv.create(folder, symlinks=os.name != "nt")
    programs = folder / "bin"
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install"]
    subprocess.run([*pip, "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    return programs


def test_the_wheel_installs_a_command_that_trains_outside_the_checkout(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("pip")
    source = tmp_path / "source"
    shutil.copytree(ROOT / "relax", source / "relax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", str(tmp_path), str(source)], check=True, capture_output=True)
    [wheel] = tmp_path.glob("relax_trainers-*.whl")
    programs, here = installed(wheel, tmp_path / "env"), tmp_path / "here"
    here.mkdir()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["PATH"] = f"{programs}{os.pathsep}{env['PATH']}"

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=here, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    where = run(str(programs / "python"), "-c", "import relax; print(relax.__file__)")
    assert Path(where.strip()).is_relative_to(tmp_path / "env")
    assert run("relax", "--version") == f"relax {__version__}\n"
    run("relax", "sft", "--max_steps", "5", "--per_device_train_batch_size", "2")
    assert (here / "outputs" / "sft" / "final" / "model.safetensors").is_file()
    assert (here / "outputs" / "sft" / "report.html").is_file()
