"""One program on eight devices: what one computes, cut by the rules, moved between meshes.

Eight forced CPU devices need a process of their own, which makes all checks: `parallel_checks.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jax.sharding import PartitionSpec as P

from relax.config import SFTConfig
from relax.config.mesh import parse_mesh
from relax.errors import ConfigError
from relax.parallel import RULES, read_rules
from relax.parallel.rules import spec_of
from relax.tools.plan.hlo import collectives

pytestmark = [pytest.mark.timeout(1560), pytest.mark.programs]
ROOT = Path(__file__).parents[1]
SIZES = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def told():
    """What each check told, by its name."""
    return checked()


def checked(*flags):
    given = os.environ.get("XLA_FLAGS", "")
    xla_flags = f"{given} --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": xla_flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    # Programs for eight devices take minutes to optimise, and are compared with one compiled alike.
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "parallel_checks.py"), *flags],
        env=env, cwd=ROOT, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return {line["check"]: line for line in map(json.loads, run.stdout.splitlines())}


def found(told, name):
    assert "error" not in told[name], told[name]["error"]
    return told[name]["told"]


def test_sft_is_the_same_to_1e_5_on_one_four_and_eight_devices(told):
    """Losses and parameters after three updates, heads that tensor does not divide included."""
    assert len(found(told, "sft")) == 5


@pytest.mark.slow
def test_quantised_weights_are_read_trained_and_sampled_in_parts_as_in_one():
    specs = found(checked("quantised_weights"), "quantised_weights")
    assert "fsdp" in specs[1] and "fsdp" in specs[3]


def test_moments_in_8_bits_are_cut_like_their_weights(told):
    assert "'fsdp', 'tensor'" in found(told, "moments_in_8_bits")


def test_dpo_is_the_same_to_1e_5_in_both_layouts(told):
    found(told, "dpo")


def test_grpo_draws_the_same_texts_and_makes_the_same_updates(told):
    found(told, "grpo")


@pytest.mark.slow
def test_ppo_draws_the_same_texts_and_makes_the_same_updates():
    found(checked("ppo"), "ppo")


def test_distillation_draws_the_same_texts_and_makes_the_same_updates(told):
    found(told, "distillation")


def test_every_loss_of_rows_on_eight_devices_is_that_of_one_to_rounding(told):
    assert {"vespo", "kl_cov", "aot", "discopop"} < found(told, "losses").keys()


def test_convolutions_and_delta_rules_are_cut_along_tensor_and_the_same_to_1e_5(told):
    """Training and sampling."""
    found(told, "mixers")


def test_experts_and_adapters_are_the_same_to_1e_5(told):
    found(told, "experts")
    found(told, "adapters")


@pytest.mark.slow
def test_shared_keys_and_values_are_the_same_to_1e_5():
    """In updates and in generation; and inputs of each layer."""
    found(checked("shared_keys"), "shared_keys")


def test_the_sampler_draws_the_same_tokens(told):
    found(told, "sampler")


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_every_algorithm_is_the_same_on_every_mesh():
    told = checked("--all")
    for name in told:
        found(told, name)


def test_a_weight_and_its_moments_are_cut_alike(told):
    found(told, "weights_are_cut")


def test_checkpoints_move_between_meshes_byte_for_byte(told):
    found(told, "checkpoints_move")


def test_weights_are_read_in_parts_and_are_those_that_were_written(told):
    found(told, "weights_are_read_in_parts")
    assert "tensor" in found(told, "experts_in_mxfp4_are_read_in_parts")


def test_a_job_on_a_mesh_has_the_losses_of_one_device_and_goes_on_on_another_mesh(told):
    assert found(told, "a_job_on_a_mesh")[-1] == 4


def test_a_batch_that_the_mesh_does_not_divide_is_refused(told):
    line = found(told, "a_batch_that_does_not_divide_is_refused")
    assert "got 12 rows for 8 x 1" in line


@pytest.mark.parametrize(
    "path, shape, spec",
    [
        ("params/layers_3/q_proj/kernel", (8, 16), P("fsdp", "tensor")),
        ("opt_state/inner_state/0/mu/layers_3/down_proj/kernel", (8, 16), P("tensor", "fsdp")),
        ("frozen/ref/embed_tokens", (24, 16), P("tensor", "fsdp")),
        ("params/embed_tokens", (23, 16), P(None, "fsdp")),  # 23 tokens stay together
        ("params/layers_0/experts/down_proj", (4, 8, 16), P(None, "tensor", "fsdp")),
        ("params/layers_0/mlp_norm/scale", (16,), P()),
        ("opt_state/v_row/layers_0/q_proj/kernel", (8,), P()),  # adafactor's rows
        ("step", (), P()),
    ],
)
def test_a_leaf_is_cut_by_the_first_rule_that_fits_its_path(path, shape, spec):
    assert spec_of(path, shape, RULES, SIZES) == spec


def test_weights_of_attention_are_whole_along_tensor_where_it_does_not_divide_the_heads():
    assert spec_of("layers_0/q_proj/kernel", (8, 24), RULES, SIZES, heads=3) == P("fsdp")
    assert spec_of("layers_0/up_proj/kernel", (8, 24), RULES, SIZES, heads=3) == P("fsdp", "tensor")


def test_rules_of_a_file_come_before_the_built_in_ones(tmp_path):
    file = tmp_path / "rules.txt"
    file.write_text("# pattern  axes\nlayers_0/q_proj/kernel  -  fsdp+tensor  # columns\n")
    rules = read_rules(file)
    assert spec_of("layers_0/q_proj/kernel", (8, 16), rules, SIZES) == P(None, ("fsdp", "tensor"))
    assert spec_of("layers_1/q_proj/kernel", (8, 16), rules, SIZES) == P("fsdp", "tensor")


@pytest.mark.parametrize(
    "line, said",
    [("kernel fsdp rows", "rules.txt:1: a rule is"), ("( fsdp", "no regular expression")],
)
def test_a_line_that_is_no_rule_is_refused_with_its_number(line, said, tmp_path):
    file = tmp_path / "rules.txt"
    file.write_text(line)
    with pytest.raises(ConfigError, match=said):
        read_rules(file)


@pytest.mark.parametrize(
    "text, devices, said",
    [
        ("data=3", 8, "got data=3,fsdp=1,tensor=1 for 8"),
        ("data=2,data=4", 8, "each at most once"),
        ("pipeline=2", None, "sizes of data, fsdp, tensor"),
        ("fsdp=0", None, "at least 1"),
    ],
)
def test_a_mesh_that_is_none_or_does_not_fit_the_devices_is_refused(text, devices, said):
    with pytest.raises(ConfigError, match=said):
        parse_mesh(text, devices)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"sharding_rules": "x"}, "sharding_rules has no effect"),
        ({"num_processes": 2}, "num_processes has no effect"),
        ({"coordinator": "h:1"}, "coordinator needs mesh"),
        ({"coordinator": "h:1", "mesh": "auto"}, "needs num_processes and process_id"),
        (
            {"coordinator": "h:1", "mesh": "auto", "num_processes": 2, "process_id": 2},
            "process_id must be below num_processes, got 2 of 2",
        ),
        ({"coordinator": "h", "mesh": "auto"}, "HOST:PORT"),
    ],
)
def test_options_of_devices_without_effect_or_sense_are_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        SFTConfig().replace(**fields).validate()


def test_the_traffic_of_a_program_is_read_from_its_text_loops_included():
    text = """
%body (p: f32[8]) -> f32[8] {
  ROOT %r = f32[8]{0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
}
%cond (p: f32[8]) -> pred[] {
  ROOT %c = pred[] constant(true)
}
ENTRY %main (a: bf16[4,2]) -> f32[8] {
  %s = (bf16[4,2]{1,0}, bf16[16,2]{1,0}) all-gather-start(%a), replica_groups=[2,4]<=[8]
  %g = bf16[16,2]{1,0} all-gather-done(%s)
  ROOT %w = f32[8]{0} while(%x), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
}"""
    # 64 bytes among four: each gets the 48 of the others. Five times 32 bytes, both ways.
    assert collectives(text) == {"all-gather": (1, 48.0), "all-reduce": (5, 5 * 2 * 0.75 * 32)}


def test_the_traffic_of_a_program_for_tpus_is_read_from_its_text():
    """A condition tells trips; parts of one collective have one channel; notes have braces."""
    text = """
%cond (p: (u32[], bf16[4,2])) -> pred[] {
  %n = u32[]{:T(128)} constant(8), metadata={op_name="lt"}
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}
%body (p: (u32[], bf16[4,2])) -> (u32[], bf16[4,2]) {
  %s = (bf16[4,2]{1,0:T(8,128)(2,1)}, bf16[4,2]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
}
%begin (p: f32[8]) -> f32[32] {
  %a = f32[32]{0:T(128)} all-gather(%p), channel_id=2, replica_groups=mesh['x'=2,'y'=4] {'y'}
}
%end (p: f32[8]) -> f32[32] {
  %b = f32[32]{0:T(128)} all-gather(%p), channel_id=2, replica_groups=mesh['x'=2,'y'=4] {'y'}
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %k = f32[8]{0} custom-call(%p), frontend_attributes={kernel_metadata={
 "note":"{}"
}}, metadata={op_name="kernel"}
  %w = (u32[], bf16[4,2]{1,0:T(8,128)(2,1)}) while(%t), condition=%cond, body=%body
  %f = f32[32]{0:T(128)} fusion(%p), kind=kCustom, calls=%begin
  %g = f32[32]{0:T(128)} fusion(%f), kind=kCustom, calls=%end
}"""
    # Eight times 16 bytes to a neighbour; 128 bytes among four.
    assert collectives(text) == {"all-gather": (1, 96.0), "collective-permute": (8, 128.0)}
