"""Steps compiled for devices that are not there: memory that a division tells, and TPU kernels."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from families import config_of

from relax.tools.plan.flops import forward_flops
from relax.tools.plan.hlo import Traffic
from relax.tools.plan.plan import Program, described

pytestmark = [pytest.mark.timeout(960), pytest.mark.programs]
ROOT = Path(__file__).parents[1]
SHAPE = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
with_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the package libtpu"
)


def plan(tmp_path, *flags):
    """Exit code, output and errors of the command."""
    file = tmp_path / "shape.json"
    file.write_text(json.dumps(SHAPE))
    # A file of flags for devices that are there is none for those that are not.
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "relax", "plan", "--model_name_or_path", str(file)]
    run = subprocess.run(
        [*command, *flags], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900
    )
    return run.returncode, run.stdout, run.stderr


def megabytes(text: str, name: str) -> list[float]:
    return [float(n) for n in re.findall(rf"^  {name} +([\d.]+) MB", text, re.MULTILINE)]


def test_a_plan_cuts_weights_moments_and_cache_and_tells_deep_models_from_shallow_ones(tmp_path):
    code, out, err = plan(
        tmp_path, "--topology", "cpu:4", "--mesh", "fsdp=2,tensor=2", "--max_length", "64"
    )
    assert code == 0, err
    D, F, V, N, K, H, L = 128, 256, 512, 4, 2, 128, 6
    matrices = L * (2 * D * N * H + 2 * D * K * H + 3 * D * F) + 2 * V * D
    norms = L * (2 * D + 2 * H) + D
    # Matrices in four parts, norms whole; the update's in float32, decoding in bfloat16, in two.
    training, decoding = megabytes(out, "parameters")
    assert training == pytest.approx(4 * (matrices / 4 + norms) / 1e6, rel=1e-2)
    assert decoding == pytest.approx((2 * matrices / 2 + 4 * norms) / 1e6, rel=1e-2)
    assert megabytes(out, "optimizer")[0] == pytest.approx(2 * training, rel=1e-2)
    # Eight slots on each of two parts, one of two heads: keys and values in bfloat16.
    assert megabytes(out, "cache") == [pytest.approx(2 * 2 * L * 8 * 1 * H * 64 / 1e6, rel=1e-2)]
    assert "all-gather" in out and "extrapolated from 2 and 4 layers" in out


def test_flops_are_those_of_weights_windows_shared_keys_and_delta_rules():
    D, F, V, N, K = 36, 20, 61, 6, 2
    # Gemma 4: windows of 5 with heads of 10, full layers with heads of 16; the last two layers have
    # no keys and values, and twice the width; inputs of 8 for each layer.
    own = {H: 2 * D * N * H + 2 * D * K * H for H in (10, 16)}
    shared = {H: 2 * D * N * H for H in (10, 16)}
    weights = 2 * own[10] + own[16] + shared[10] + shared[16]
    weights += 3 * D * F * (3 + 2 * 2) + 5 * 2 * D * 8 + D * 5 * 8 + V * D
    seen = 3 * 10 * 4.375 + 2 * 16 * 10  # on average of 20 tokens: 5 - 5² / 40, and half
    expected = 3 * (2 * weights + 4 * N * seen)
    assert forward_flops(config_of("gemma4_text"), 3, 20) == pytest.approx(expected)
    # Qwen 3.5: two delta rules, of 62 channels and 6 states of 8 x 5, around gated attention.
    delta = D * 62 + 2 * D * 30 + 2 * D * 6 + 62 * 3
    weights = 2 * delta + 3 * D * N * 10 + 2 * D * K * 10 + 3 * 3 * D * F + V * D
    expected = 3 * (2 * weights + 4 * N * 10 * 10 + 2 * 7 * 6 * 8 * 5)
    assert forward_flops(config_of("qwen3_5_text"), 3, 20) == pytest.approx(expected)


def test_the_least_time_of_a_step_is_that_of_its_narrowest_resource():
    """A v5e does 197 TFLOP/s, reads 810 GB/s and sends 90 GB/s; XLA's account does not count."""
    program = Program({"cache": 1.62e9}, 0.0, 5e12, {"all-gather": Traffic(3, 4.5e8)})
    for flops, said in ((1.97e12, "10 ms, by arithmetic"), (1.97e11, "5 ms, by links")):
        last = described(program, "v5e:2x2", flops)[-1]
        assert f"at least {said}" in last and "memory 2, links 5" in last


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--topology", "v5e:4x4", "--mesh", "fsdp=8"], "must multiply to the number of devices"),
        (["--topology", "eight"], "topology must be such as v5e:4x4"),
        (["--topology", "cpu:8", "--quick"], "quick has no effect"),
    ],
)
def test_devices_that_cannot_be_meant_are_refused(tmp_path, flags, said):
    code, out, err = plan(tmp_path, *flags)
    assert code == 2 and said in err and out == ""


@pytest.mark.slow
@with_libtpu
def test_an_update_with_splash_attention_compiles_for_a_tpu_that_is_not_there(tmp_path):
    code, out, err = plan(
        tmp_path, "--topology", "v5e:2x2", "--mesh", "fsdp=2,tensor=2", "--max_length", "256"
    )
    assert code == 0, err
    assert "fits" in out and out.count(" at least ") == 2
    assert "attention: splash (tpu)" in out
