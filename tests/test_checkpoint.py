"""Checkpoints: what is saved comes back bit by bit, and no kill, full disk or rot is silent."""

import gc
import json
import os
import shutil
import sys
import threading
import warnings
import zlib
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from faults import meet

from relax.checkpoint import checkpointer as checkpoints
from relax.checkpoint.checkpointer import (
    Checkpointer,
    check_space,
    fingerprint,
    read_info,
    tree_bytes,
)
from relax.checkpoint.storage import _seal
from relax.errors import CheckpointError, ConfigError


@flax.struct.dataclass
class State:
    """The shape of a training state, without a trainer."""

    step: Any
    params: Any
    opt_state: Any
    rng: Any
    frozen: Any


def make_state(seed=0, width=4):
    key = jax.random.key(seed)
    params = {
        "layer_0": {"kernel": jax.random.normal(key, (width, 3))},
        "bf16": jax.random.normal(key, (5,)).astype(jnp.bfloat16),
        "no_elements": jnp.zeros((0, 3)),
    }
    return State(jnp.int32(seed), params, optax.adamw(1e-3).init(params), key, {})


def assert_same(left, right):
    """Same structure, dtypes and bytes."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# Saving and restoring.


def test_every_leaf_and_float_comes_back_bit_by_bit(tmp_path):
    checkpointer, state = Checkpointer(tmp_path), make_state(7)
    progress = {"epoch": 1, "best": float("inf"), "x": 0.1 + 0.2, "nested": [1, None, "é"]}
    assert checkpointer.save(7, state, progress) == tmp_path / "7"
    for template in (make_state(0), jax.eval_shape(make_state)):
        restored, got, step = checkpointer.restore(template)
        assert_same(restored, state)
        assert (got, step) == (progress, 7)
    assert read_info(tmp_path / "7")["progress"] == progress


@pytest.mark.parametrize("impl", ["rbg", "threefry2x32"])
def test_typed_keys_of_any_kind_and_shape_come_back(tmp_path, impl):
    state = {"keys": jax.random.split(jax.random.key(1, impl=impl), 3), "n": 3, "x": 0.1}
    Checkpointer(tmp_path).save(0, state, {})
    restored = Checkpointer(tmp_path).restore({"keys": state["keys"], "n": 0, "x": 0.0})[0]
    assert_same(restored["keys"], state["keys"])
    assert (restored["n"], restored["x"]) == (3, 0.1)


def test_an_empty_frozen_part_is_not_stored(tmp_path):
    Checkpointer(tmp_path).save(1, make_state(), {})
    sums = json.loads((tmp_path / "1" / "checksums.json").read_bytes())
    assert not [name for name in sums["leaves"] if name.startswith("frozen")]
    assert "opt_state/0/mu/layer_0/kernel" in sums["leaves"]


def test_a_sharded_template_gets_its_leaves_sharded(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    state = {"w": jax.device_put(jnp.arange(8.0), sharding)}
    Checkpointer(tmp_path).save(1, state, {})
    restored = Checkpointer(tmp_path).restore(jax.eval_shape(lambda: state))[0]
    assert_same(restored, state)
    assert Checkpointer(tmp_path).restore(state)[0]["w"].sharding == sharding


def test_an_asynchronous_save_is_of_the_state_it_was_given_whatever_becomes_of_it(
    tmp_path, monkeypatch
):
    """It returns before anything is written; the state is donated meanwhile."""
    begin, write = threading.Event(), checkpoints.write

    def late(directory, taken):
        assert begin.wait(60)
        write(directory, taken)

    monkeypatch.setattr(checkpoints, "write", late)
    state, host = make_state(3), {"count": np.arange(3)}
    checkpointer = Checkpointer(tmp_path, asynchronous=True)
    checkpointer.save(1, {"state": state, "host": host}, {"epoch": 2})
    assert checkpointer.steps() == []
    gone = jax.jit(lambda x: jax.tree.map(jnp.negative, x), donate_argnums=0)(state.params)
    host["count"][:] = 9
    jax.block_until_ready(gone)
    begin.set()
    checkpointer.wait()
    template = {"state": make_state(0), "host": {"count": np.zeros(3, int)}}
    restored, progress, step = Checkpointer(tmp_path).restore(template)
    assert_same(restored, {"state": make_state(3), "host": {"count": np.arange(3)}})
    assert (progress, step) == ({"epoch": 2}, 1)


@pytest.mark.parametrize("then", ["save", "wait"])
def test_what_an_asynchronous_save_met_is_raised_by_what_comes_next(tmp_path, monkeypatch, then):
    checkpointer = Checkpointer(tmp_path, asynchronous=True)
    checkpointer.save(1, make_state(), {})
    checkpointer.wait()
    meet("mid_write:1:enospc", monkeypatch)
    checkpointer.save(2, make_state(), {})
    with pytest.raises(
        CheckpointError, match="checkpoint 2 does not fit .* checkpoint 1 is intact"
    ):
        checkpointer.wait() if then == "wait" else checkpointer.save(3, make_state(), {})
    checkpointer.save(4, make_state(), {})
    checkpointer.wait()
    assert checkpointer.steps() == [1, 4]


def test_another_structure_shape_or_dtype_is_refused_leaf_by_leaf(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}, {})
    template = {"a": jnp.ones(3), "b": jnp.ones(2, jnp.int32), "d": jnp.ones(2)}
    with pytest.raises(CheckpointError) as error:
        checkpointer.restore(template)
    for words in (
        "a is float32[2] in the checkpoint, float32[3] in this state",
        "b is float32[2] in the checkpoint, int32[2] in this state",
        "not in this state: c",
        "missing in the checkpoint: d",
    ):
        assert words in str(error.value)


def test_a_key_of_another_implementation_is_refused(tmp_path):
    Checkpointer(tmp_path).save(1, {"rng": jax.random.key(1, impl="rbg")}, {})
    with pytest.raises(CheckpointError, match="key of rbg.*key of unsafe_rbg"):
        Checkpointer(tmp_path).restore({"rng": jax.random.key(1, impl="unsafe_rbg")})


def test_progress_that_json_cannot_hold_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="must be JSON"):
        Checkpointer(tmp_path).save(1, make_state(), {"x": jnp.ones(1)})
    assert os.listdir(tmp_path) == []


def test_missing_checkpoints_are_named_with_those_that_exist(tmp_path):
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        Checkpointer(tmp_path / "none").restore(make_state())
    Checkpointer(tmp_path).save(3, make_state(), {})
    with pytest.raises(CheckpointError, match=r"no checkpoint .*4'. Saved steps: \[3\]"):
        Checkpointer(tmp_path).restore(make_state(), step=4)


def test_another_machine_or_version_is_told_when_restoring(tmp_path):
    said = []
    checkpointer = Checkpointer(tmp_path, warn=said.append)
    checkpointer.save(1, make_state(), {})
    checkpointer.restore(make_state())
    assert said == []
    change_info(tmp_path / "1", fingerprint=fingerprint() | {"cpu_threads": 999})
    checkpointer.restore(make_state())
    threads = fingerprint()["cpu_threads"]
    assert said[0].endswith(f"is not promised: cpu_threads 999 -> {threads}")


@pytest.mark.parametrize("other", [1, 99])
def test_another_format_is_refused_with_what_to_do(other, tmp_path):
    Checkpointer(tmp_path).save(1, make_state(), {})
    change_info(tmp_path / "1", format=other)
    match = f"has format {other}, this version of ReLax reads 2. Resume it with the version that"
    with pytest.raises(CheckpointError, match=match):
        Checkpointer(tmp_path).restore(make_state())


def change_info(path, **fields):
    """Rewrites relax_state.json as another version or machine would have written it."""
    info = json.dumps(json.loads((path / "relax_state.json").read_bytes()) | fields).encode()
    (path / "relax_state.json").write_bytes(info)
    sums = json.loads((path / "checksums.json").read_bytes())
    del sums["crc32"]
    sums["files"]["relax_state.json"] = zlib.crc32(info)
    (path / "checksums.json").write_bytes(_seal(sums))


def test_saves_leave_nothing_in_memory(tmp_path):
    """A library under them that keeps a few objects of every array grows a long run for ever.

    There are many arrays, so that what else the process allocates meanwhile is small beside them.
    """
    checkpointer = Checkpointer(tmp_path, save_total_limit=1)
    state = {f"array_{number}": np.full(3, number) for number in range(200)}

    def blocks_after(steps):
        for step in steps:
            checkpointer.save(step, state, {})
        gc.collect()
        return sys.getallocatedblocks()

    before = blocks_after(range(20))
    assert blocks_after(range(20, 60)) - before < 40 * len(state)


def test_each_kind_of_number_comes_back_bit_by_bit(tmp_path):
    """Zeros with a sign, not-a-number with a payload, the largest and smallest."""
    words = np.array([0, 1 << 31, 0x7FC00001, 0xFFC12345, 1, 0x7F7FFFFF, 0xFF800000], np.uint32)
    state = {"float32": words.view(np.float32), "zeros": np.zeros(3), "scalar": np.float32(-0.0)}
    for dtype in (jnp.bfloat16, jnp.float8_e4m3fn, np.int8, np.bool_, np.float16, np.int64):
        state[jnp.dtype(dtype).name] = np.arange(2).astype(dtype)
    Checkpointer(tmp_path).save(1, state, {})
    assert_same(Checkpointer(tmp_path).restore(state)[0], jax.tree.map(np.asarray, state))


# Which checkpoints are kept.


def test_the_newest_are_kept_and_steps_are_read_from_the_disk(tmp_path):
    checkpointer = Checkpointer(tmp_path, save_total_limit=2)
    for step in (5, 10, 20):
        checkpointer.save(step, {"w": jnp.full(2, step)}, {})
    assert checkpointer.steps() == [10, 20]
    shutil.rmtree(tmp_path / "20")
    (tmp_path / "30").write_text("a file is no checkpoint")
    (tmp_path / "best").mkdir()
    assert checkpointer.steps() == [10]


def test_a_run_that_went_back_removes_later_steps_and_replaces_its_own(tmp_path):
    said = []
    checkpointer = Checkpointer(tmp_path, save_total_limit=2, warn=said.append)
    for step in (10, 20):
        checkpointer.save(step, {"w": jnp.float32(step)}, {})
    checkpointer.save(10, {"w": jnp.float32(11)}, {})
    assert checkpointer.steps() == [10] and os.listdir(tmp_path) == ["10"]
    assert float(checkpointer.restore({"w": jnp.float32(0)})[0]["w"]) == 11
    assert said == ["saving step 10: removed [20], of a run that had continued further"]


def test_only_stale_temporary_directories_of_ours_are_swept(tmp_path):
    for name in ("tmp-4", "tmp-3-removed", "tmp-mine", "7"):
        (tmp_path / name / "inside").mkdir(parents=True)
    Checkpointer(tmp_path).sweep()
    assert sorted(os.listdir(tmp_path)) == ["7", "tmp-mine"]


def test_a_limit_below_one_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="at least 1, got 0"):
        Checkpointer(tmp_path, save_total_limit=0)


# Rot: every file, flipped, cut and removed.


def damages(path, rng):
    """Pairs of what was done to a file and its bytes afterwards; None removes it."""
    good = path.read_bytes()
    yield "remove", None
    yield "cut", good[: int(rng.integers(len(good)))]
    yield "append", good + b"\0"
    for bit in rng.integers(8 * len(good), size=80):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << (bit % 8)
        yield f"flip {bit}", bytes(bad)


def test_no_flipped_bit_cut_or_missing_file_is_silent(tmp_path):
    checkpointer, state, rng = Checkpointer(tmp_path), make_state(1), np.random.default_rng(0)
    checkpointer.save(1, state, {"epoch": 0})
    template = jax.eval_shape(make_state)
    silent, cases, leaves_named = [], 0, 0
    for file in sorted(p for p in (tmp_path / "1").rglob("*") if p.is_file()):
        good = file.read_bytes()
        for what, bad in damages(file, rng):
            cases += 1
            file.unlink() if bad is None else file.write_bytes(bad)
            try:
                checkpointer.restore(template, step=1)
                silent.append((file.name, what))
            except CheckpointError as error:
                assert file.name in str(error) and "damaged" in str(error), (what, error)
                leaves_named += "leaf " in str(error)
            file.write_bytes(good)
    assert silent == []
    assert cases >= 300 and leaves_named >= 20
    assert_same(checkpointer.restore(template)[0], state)


def test_the_leaf_that_a_damaged_file_holds_is_named(tmp_path):
    """Only the bytes of `b` are long enough to lie in a file of their own."""
    state = {"a": jnp.arange(5), "b": jax.random.normal(jax.random.key(0), (2000,))}
    Checkpointer(tmp_path).save(1, state, {})
    file = max((p for p in (tmp_path / "1").rglob("*") if p.is_file()), key=os.path.getsize)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"damaged: file .*{file.name}, leaf b.$"):
        Checkpointer(tmp_path).restore(state, step=1)


def test_a_leaf_that_reads_wrong_is_named_even_if_its_file_is_as_written(tmp_path):
    Checkpointer(tmp_path).save(1, {"a": jnp.ones(2), "b": jnp.ones(2)}, {})
    path = tmp_path / "1" / "checksums.json"
    sums = json.loads(path.read_bytes())
    del sums["crc32"]
    sums["leaves"]["b"]["crc32"] += 1
    path.write_bytes(_seal(sums))
    with pytest.raises(CheckpointError, match="damaged: leaf b."):
        Checkpointer(tmp_path).restore({"a": jnp.ones(2), "b": jnp.ones(2)}, step=1)


def test_without_a_step_the_newest_intact_one_is_taken_with_a_warning(tmp_path):
    said = []
    checkpointer = Checkpointer(tmp_path, warn=said.append)
    for step in (1, 2, 3):
        checkpointer.save(step, {"w": jnp.float32(step)}, {"at": step})
    (tmp_path / "3" / "arrays" / "manifest.ocdbt").unlink()
    shutil.rmtree(tmp_path / "2" / "arrays")
    state, progress, step = checkpointer.restore({"w": jnp.float32(0)})
    assert (float(state["w"]), progress, step) == (1.0, {"at": 1}, 1)
    assert "3' is damaged" in said[0] and "manifest.ocdbt" in said[0] and "2' is damaged" in said[1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Checkpointer(tmp_path).restore({"w": jnp.float32(0)})
    assert "is damaged" in str(caught[0].message)


def test_another_model_is_not_taken_for_damage(tmp_path):
    checkpointer = Checkpointer(tmp_path, warn=lambda line: pytest.fail(line))
    for step in (1, 2):
        checkpointer.save(step, make_state(), {})
    with pytest.raises(CheckpointError, match="Check that it has the same model"):
        checkpointer.restore(make_state(width=9))


def test_space_is_refused_before_the_run_and_with_the_numbers(tmp_path):
    check_space(tmp_path / "not" / "made", nbytes=1000, copies=3)
    with pytest.raises(ConfigError, match=r"3 checkpoints of 1000000000.00 GB need 3000000000"):
        check_space(tmp_path / "not" / "made", nbytes=10**18, copies=3)


def test_the_size_of_a_state_is_known_from_its_shapes():
    state = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4, jnp.bfloat16), "k": jax.random.key(0)}
    assert tree_bytes(state) == tree_bytes(jax.eval_shape(lambda: state)) == 24 + 8 + 8
