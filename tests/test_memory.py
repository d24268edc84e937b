"""The memory of an update: what is measured, what is kept for it, and what is advised."""

import functools
import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring
from rich.console import Console
from runs import additions

from relax.config import SFTConfig
from relax.data import DataLoader
from relax.data.examples import Encoded
from relax.engine import TrainerEngine, advice, fitting, memory
from relax.engine.memory import Capacity, Sizes
from relax.errors import ConfigError
from relax.models import Transformer, TransformerConfig
from relax.optimizers import OPTIMIZERS
from relax.trainers import SFTTrainer, TrainState

DEEP = TransformerConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.2,
)
ROWS, LENGTH = 8, 128
MODEL = Transformer(DEEP, gradient_checkpointing=True)
MB = 10**6


def shapes(rows=ROWS, length=LENGTH):
    names = ("input_ids", "labels", "positions", "segment_ids")
    return {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in names}


def trainer(model=MODEL, optim="adamw", **options):
    return SFTTrainer(model, OPTIMIZERS[optim](1e-3), **options)


def template(trainer):
    return jax.eval_shape(trainer.create_train_state, jax.random.key(0))


@functools.cache
def measured(model, accumulation=1) -> Sizes:
    sft = trainer(model, gradient_accumulation_steps=accumulation)
    return memory.update_sizes(sft, template(sft), shapes())


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, DEEP.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    ones = np.ones_like(ids)
    return {"input_ids": ids, "labels": ids, "positions": positions, "segment_ids": ones}


# What is kept for the backward pass


@pytest.fixture(scope="module")
def by_policy():
    """Sizes by what layers keep, `none` being all."""
    plain = Transformer(DEEP)
    models = {"none": plain} | {
        policy: plain.clone(gradient_checkpointing=True, gradient_checkpointing_policy=policy)
        for policy in ("matmuls", "attention", "nothing")
    }
    return {name: measured(model) for name, model in models.items()}


def test_each_policy_keeps_measurably_less_than_the_one_before(by_policy):
    none, matmuls, attention, nothing = (sizes.activations for sizes in by_policy.values())
    assert none > 1.2 * matmuls
    assert matmuls > 1.4 * attention
    assert attention > nothing


def test_the_policies_give_the_same_gradients(batch):
    plain = Transformer(DEEP)
    params = jax.jit(plain.init)(jax.random.key(0), batch["input_ids"][:1, :8])["params"]

    def gradients(model):
        return jax.jit(jax.grad(lambda p: trainer(model).compute_loss(p, batch).loss))(params)

    expected = gradients(plain)
    for policy in ("matmuls", "attention", "nothing"):
        model = plain.clone(gradient_checkpointing=True, gradient_checkpointing_policy=policy)
        for ours, theirs in zip(*map(jax.tree.leaves, (gradients(model), expected)), strict=True):
            scale = float(jnp.abs(theirs).max())
            assert float(jnp.abs(ours - theirs).max()) <= 1e-5 * scale, policy


def test_a_policy_without_checkpointing_is_warned_of():
    config = SFTConfig().replace(
        gradient_checkpointing=False, gradient_checkpointing_policy="nothing"
    )
    with pytest.warns(UserWarning, match="gradient_checkpointing_policy has no effect"):
        config.validate()


# What is measured


def test_the_sizes_are_those_of_the_arrays_and_together_xlas_own():
    sft = trainer(gradient_accumulation_steps=2)
    state, sizes = template(sft), measured(MODEL, 2)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert sizes.parameters == 4 * count
    assert sizes.gradients == 8 * count  # of one micro-batch, and the sum over both
    assert 8 * count <= sizes.optimizer < 8 * count + 100  # two moments
    account = sft.train_step.lower(state, shapes()).compile().memory_analysis()
    assert sizes.total == (
        account.argument_size_in_bytes
        + account.output_size_in_bytes
        - account.alias_size_in_bytes
        + account.temp_size_in_bytes
    )


def test_the_step_whose_memory_was_looked_at_is_not_compiled_again(batch):
    sft = trainer()
    state = sft.create_train_state(jax.random.key(0))
    memory.update_sizes(sft, state, shapes())
    events = []
    monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    try:
        jax.block_until_ready(sft.train_step(state, batch))
        assert not [name for name in events if "compile" in name]
        jax.jit(lambda x: x + 1)(1.0)
        assert [name for name in events if "compile" in name]  # the listener does listen
    finally:
        monitoring.clear_event_listeners()


def loader(lengths, **options):
    examples = [Encoded([1] * n, [1] * n) for n in lengths]
    return DataLoader(examples, 2, shuffle=False, **options)


def test_the_largest_batch_is_the_largest_of_those_that_will_be_met():
    rows = loader([10] * 4 + [60, 10])
    assert memory.rows_of(memory.largest_batch(rows, steps=3)) == (2, 64)
    assert memory.rows_of(memory.largest_batch(rows, steps=2)) == (2, 16)
    assert memory.rows_of(memory.largest_batch(rows, steps=99)) == (2, 64)
    for item in rows:
        assert set(item) == set(memory.largest_batch(rows, steps=3))
    assert memory.largest_batch([{}], steps=3) is None


MEMINFO = "MemTotal: 8000 kB\nMemAvailable: 5000 kB\nSwapTotal: 1000 kB\nHugePages_Total: 0\n"


@pytest.mark.parametrize(
    "cgroup, files, total, free",
    [
        ("0::/", {}, 9000 * 1024, 5000 * 1024),
        ("0::/a/b", {"a/memory.max": "max", "a/b/memory.max": "max"}, 9000 * 1024, 5000 * 1024),
        ("0::/a/b", {"a/memory.max": 4 * MB, "a/memory.current": MB}, 4 * MB, 3 * MB),
        (
            "3:cpu:/a\n4:memory:/a",
            {"memory/memory.limit_in_bytes": 2 * MB, "memory/memory.usage_in_bytes": MB},
            2 * MB,
            MB,
        ),
    ],
)
def test_a_cpu_has_what_the_machine_and_the_control_groups_leave(
    tmp_path, monkeypatch, cgroup, files, total, free
):
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text(MEMINFO)
    (tmp_path / "self" / "cgroup").write_text(cgroup + "\n")
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    monkeypatch.setattr(memory, "PROC", tmp_path)
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    assert memory.capacity(held=7) == Capacity(total, free + 7, "cpu")


def test_a_machine_that_tells_nothing_is_no_reason_to_refuse(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PROC", tmp_path)
    assert memory.capacity() == Capacity(None, None, "cpu")
    assert advice.check(SIZES, memory.capacity(), SFTConfig()) is None


# What is advised

SIZES = Sizes(parameters=100, frozen=0, gradients=100, optimizer=200, activations=600)


def test_more_than_there_is_is_refused_and_more_than_is_free_is_warned_of():
    config = SFTConfig()
    with pytest.raises(ConfigError, match=r"needs 1 kB, and cpu has 0.9 kB. These lower it, in"):
        advice.check(SIZES, Capacity(900, 900, "cpu"), config)
    warning = advice.check(SIZES, Capacity(2000, 900, "cpu"), config)
    assert "0.9 kB are free. If memory runs out: These lower it" in warning
    assert advice.check(SIZES, Capacity(2000, 1100, "cpu"), config) is None


def test_an_accelerator_is_given_a_margin_of_a_twentieth():
    assert advice.check(SIZES, Capacity(960, None, "NVIDIA H100"), SFTConfig()) is None
    with pytest.raises(ConfigError, match="NVIDIA H100 has 0.95 kB"):
        advice.check(SIZES, Capacity(950, None, "NVIDIA H100"), SFTConfig())


def test_the_flags_that_are_left_are_named_first_those_that_leave_the_result_as_it_is():
    fields = {"gradient_checkpointing": False, "per_device_train_batch_size": 8}
    said = advice.advice(SFTConfig().replace(**fields))
    flags = re.findall(r"--[a-z_]+(?: [a-z0-9_]+)?", said)
    assert flags == [
        "--gradient_checkpointing true",
        "--per_device_train_batch_size with",
        "--gradient_accumulation_steps",
        "--dtype bfloat16",
        "--use_peft",
        "--optim adamw_8bit",
        "--param_dtype bfloat16",
        "--max_length",
        "--dry_run shows",
    ]


def test_what_a_run_does_already_is_not_advised():
    fields = {
        "gradient_checkpointing": True,
        "dtype": "bfloat16",
        "optim": "sgd",
        "param_dtype": "bfloat16",
        "use_peft": True,
        "max_length": None,
        "per_device_train_batch_size": 1,
    }
    said = advice.advice(SFTConfig().replace(**fields))
    assert said == "No flag lowers it: use a smaller model or a larger device."


@pytest.mark.parametrize("optim", ["adafactor", "sgd"])
def test_the_optimizers_that_are_advised_hold_less(optim):
    of = {name: template(trainer(optim=name)) for name in ("adamw", optim)}
    sizes = {name: memory.state_sizes(state, 1).optimizer for name, state in of.items()}
    assert sizes[optim] < 0.6 * sizes["adamw"]


def test_a_state_that_cannot_fit_is_refused_before_it_is_made():
    sft = trainer()
    state = template(sft)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state))
    sizes = memory.state_sizes(state, 1)
    with pytest.raises(ConfigError, match="needs at least .* These lower it.* --use_peft"):
        advice.check(sizes, Capacity(sizes.total // 2, None, "TPU v5"), SFTConfig())


def test_the_state_that_training_begins_with_has_the_shapes_it_was_judged_by():
    sft = trainer()
    made = sft.create_train_state(jax.random.key(0))
    assert isinstance(made, TrainState)
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, template(sft))


# What makes it fit


def test_the_flags_named_are_the_first_whose_compiled_update_fits(by_policy):
    config = SFTConfig().replace(dtype="float32", per_device_train_batch_size=ROWS)
    most, said = (by_policy["matmuls"].total + by_policy["attention"].total) / 2, []
    found = fitting.cheapest(trainer(), config, shapes(), most, said.append)
    assert found.endswith(" update: --gradient_checkpointing_policy attention.")
    assert len(said) == 2 and said[0].startswith("looking for flags")


NEEDED = {"optim": 4, "dtype": 2, "use_peft": 8}  # what each of these flags saves


@pytest.mark.parametrize(
    "most, flags",
    [
        (29, "--per_device_train_batch_size 1 --gradient_accumulation_steps 2"),
        (25, "--optim adamw_8bit"),
        (18, "--optim adamw_8bit --use_peft"),
        (14, "Even .*--optim adamw_8bit .*: use a smaller model"),
    ],
)
def test_flags_that_the_others_make_needless_are_left_out(monkeypatch, most, flags):
    def sizes(trainer, state, batch):
        used = {"optim": "8bit" in str(jax.tree.structure(state.opt_state)).lower()}
        used |= {"dtype": trainer.model.dtype == jnp.bfloat16, "use_peft": bool(trainer.model.lora)}
        total = 30 - sum(NEEDED[name] for name, is_set in used.items() if is_set)
        return Sizes(total - (trainer.gradient_accumulation_steps > 1), 0, 0, 0)

    monkeypatch.setattr(memory, "update_sizes", sizes)
    config = SFTConfig().replace(
        dtype="float32", per_device_train_batch_size=2, gradient_checkpointing_policy="nothing"
    )
    found = fitting.cheapest(trainer(), config, shapes(2), most, lambda text: None)
    assert re.search(flags, found)


# In a job


def started(output_dir, **fields) -> str:
    """What a job of two rows per update prints before its first update."""
    config = SFTConfig().replace(
        **SFTConfig.demo
        | {"output_dir": str(output_dir), "per_device_train_batch_size": 2, "max_steps": 1}
        | fields
    )
    console = Console(file=io.StringIO(), width=120)
    try:
        TrainerEngine(console=console).run_job(config, additions(4))
    except Reached:
        pass
    return console.file.getvalue()


class Reached(Exception):
    """The first update is about to be made."""


@pytest.fixture
def big_update(monkeypatch):
    """Updates need 5 GB and the machine has 4 GB, 3 of them free; training never begins."""
    sizes = Sizes(MB, 0, MB, MB, 5000 * MB)
    monkeypatch.setattr(memory, "update_sizes", lambda *_: sizes)
    monkeypatch.setattr(memory, "capacity", lambda held=0: Capacity(4000 * MB, 3000 * MB, "cpu"))

    def train(*_, **__):
        raise Reached

    monkeypatch.setattr(SFTTrainer, "train", train)


def test_a_job_that_cannot_fit_ends_before_its_first_update_with_the_flag_that_helps(
    big_update, tmp_path
):
    with pytest.raises(ConfigError, match=r"needs 5\.00 GB, and cpu has 4\.00 GB\. Even .* 5\.00"):
        started(tmp_path / "run")


def test_a_job_whose_state_alone_cannot_fit_ends_before_that_is_made(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "capacity", lambda held=0: Capacity(9 * MB, 9 * MB, "cpu"))
    sizes = Sizes(MB, 0, MB, MB, 5 * MB)
    monkeypatch.setattr(memory, "update_sizes", lambda *_: sizes)
    with pytest.raises(
        ConfigError,
        match=r"at least 13\.1 MB, and cpu has 9 MB\. These flags make it fit, with 8 MB by "
        r"the compiled update: --gradient_checkpointing_policy attention\.",
    ):
        started(tmp_path / "run")


def test_a_job_tells_its_attention_and_the_memory_of_an_update(big_update, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "capacity", lambda held=0: Capacity(9000 * MB, 3000 * MB, "cpu"))
    said = started(tmp_path / "run")
    assert "attention: xla (cpu)\n" in said
    assert re.search(r"^memory of an update of 2 x \d+ tokens\n  parameters ", said, re.M)
    assert "  together            5.00 GB of 9.00 GB on cpu, 3.00 GB free\n" in said
    assert "warning: an update needs 5.00 GB, and 3.00 GB are free. If memory runs out: " in said


def test_a_kernel_that_is_asked_for_on_another_device_is_refused(tmp_path):
    for name in ("cudnn", "splash"):
        with pytest.raises(ConfigError, match=f"attn_implementation {name} cannot be taken: "):
            started(tmp_path / name, attn_implementation=name)
