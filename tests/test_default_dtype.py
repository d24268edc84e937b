"""The precision of the computation where no flag says it."""

import io
import json

import pytest
from rich.console import Console
from runs import additions

from relax import parallel
from relax.config import GRPOConfig, SFTConfig
from relax.engine import TrainerEngine, devices


def chosen(config):
    console = Console(file=io.StringIO(), width=200)
    return devices.with_dtype(config, console).model.dtype, console.file.getvalue()


def test_it_is_bfloat16_on_accelerators_and_float32_on_cpus(monkeypatch):
    assert chosen(SFTConfig()) == (
        "float32",
        "precision: float32, the default on cpu; --dtype changes it\n",
    )
    monkeypatch.setattr(parallel, "platform", lambda: "tpu")
    assert chosen(SFTConfig())[0] == "bfloat16"
    given = chosen(SFTConfig().replace(dtype="float32"))
    assert given == ("float32", "precision: float32, as --dtype says\n")


def test_what_has_no_effect_with_the_chosen_precision_is_warned_of():
    config = GRPOConfig().replace(epsilon=0.1, reward_funcs=["exact_match"])
    assert config.warnings() == []
    with pytest.warns(UserWarning, match="epsilon has no effect: a rollout is one step"):
        chosen(config)


def test_a_run_tells_it_in_its_first_line_and_keeps_it_in_its_configuration(tmp_path):
    config = SFTConfig().replace(max_steps=1, output_dir=str(tmp_path / "run"), save_strategy="no")
    console = Console(file=io.StringIO(), width=200)
    result = TrainerEngine(console=console).run_job(config, additions(8))
    assert console.file.getvalue().startswith("precision: float32, the default on cpu")
    fields = json.loads((result.output_dir / "config.json").read_text())
    assert fields["model"]["dtype"] == "float32"
