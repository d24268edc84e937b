"""Every program in examples/ runs, and does what it says."""

import re
import subprocess
import sys

import pytest
from doc_code import ROOT
from runs import environment

pytestmark = pytest.mark.programs

PROGRAMS = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def printed(program: str, *args: str) -> str:
    """Runs a program of examples/ in a process of its own; what it printed."""
    command = [sys.executable, str(ROOT / "examples" / program), *args]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    "program",
    [
        *("own_reward.py", "own_trainer.py"),
        *(
            pytest.param(program, marks=pytest.mark.slow)  # minutes
            for program in ("guessing_game.py", "calculator_tool.py")
        ),
    ],
)
def test_an_example_learns(program):
    before, after = map(float, re.search(r": (\S+) -> (\S+)", printed(program)).groups())
    assert after > before + 0.1


@pytest.mark.slow
def test_an_agent_written_for_openais_api_learns():
    for package in ("openai", "starlette", "uvicorn"):
        pytest.importorskip(package)
    before, after = map(float, re.search(r": (\S+) -> (\S+)", printed("agent.py")).groups())
    assert after > before + 0.1


def test_merged_adapters_give_the_accuracy_of_the_adapters():
    told = printed("lora.py")
    adapters, merged = map(float, re.findall(r"accuracy .*: (\S+)", told))
    assert adapters > 0.3 and merged == adapters


def test_two_processes_make_one_run():
    assert "2 processes, 3 updates" in printed("several_processes.py", "--steps=3")


def test_all_examples_are_run_and_are_short():
    assert set(PROGRAMS) == {
        *("own_reward.py", "own_trainer.py", "guessing_game.py", "calculator_tool.py"),
        *("lora.py", "agent.py", "several_processes.py"),
    }
    for name in PROGRAMS:
        assert len((ROOT / "examples" / name).read_text(encoding="utf-8").splitlines()) <= 130
