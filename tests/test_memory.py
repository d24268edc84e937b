"""The memory of an update: what is measured, what is kept for it, and what is advised."""

import dataclasses
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
from relax.engine import advice, memory
from relax.engine.advice import Remedy
from relax.engine.engine import TrainerEngine
from relax.engine.memory import Capacity, Sizes
from relax.errors import ConfigError
from relax.models import Transformer, TransformerConfig
from relax.optimizers.optimizers import OPTIMIZERS
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


def test_a_policy_without_checkpointing_is_refused():
    config = SFTConfig().replace(
        gradient_checkpointing=False, gradient_checkpointing_policy="nothing"
    )
    with pytest.raises(ConfigError, match="gradient_checkpointing_policy has no effect"):
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
    assert advice.check(SIZES, memory.capacity(), []) is None


# What is advised

SIZES = Sizes(parameters=100, frozen=0, gradients=100, optimizer=200, activations=600)


def less(flags, **fields):
    return Remedy(flags, lambda sizes: dataclasses.replace(sizes, **fields))


GROUPS = [
    [less("--rows 4", activations=500), less("--rows 2", activations=300)],
    [less("--optim sgd", optimizer=0)],
]


@pytest.mark.parametrize(
    "limit, said",
    [
        (950, "By estimate --rows 4 makes it fit (0.9 kB)."),
        (850, "By estimate --rows 2 makes it fit (0.7 kB)."),
        (700, "By estimate --rows 2 makes it fit (0.7 kB)."),
        (600, "By estimate no one flag is enough; together --rows 2 --optim sgd make it fit"),
        (400, "By estimate no flags make it fit (all together: 0.5 kB)"),
    ],
)
def test_the_first_flag_that_is_enough_is_named_or_else_those_that_are_together(limit, said):
    assert advice.advice(SIZES, limit, GROUPS).startswith(said)


def test_more_than_there_is_is_refused_and_more_than_is_free_is_warned_of():
    with pytest.raises(ConfigError, match=r"needs 1 kB, and cpu has 0.9 kB. By estimate"):
        advice.check(SIZES, Capacity(900, 900, "cpu"), GROUPS)
    warning = advice.check(SIZES, Capacity(2000, 900, "cpu"), GROUPS)
    assert "0.9 kB are free. Should memory run out: By estimate --rows 4" in warning
    assert advice.check(SIZES, Capacity(2000, 1100, "cpu"), GROUPS) is None


def test_an_accelerator_is_given_a_margin_of_a_twentieth():
    assert advice.check(SIZES, Capacity(960, None, "NVIDIA H100"), GROUPS) is None
    with pytest.raises(ConfigError, match="NVIDIA H100 has 0.95 kB"):
        advice.check(SIZES, Capacity(950, None, "NVIDIA H100"), GROUPS)


def advised(flags: str, **fields):
    """The remedies of a run whose flags begin so, and its sizes."""
    config = SFTConfig().replace(per_device_train_batch_size=ROWS, **fields)
    model = Transformer(
        DEEP,
        gradient_checkpointing=config.hyperparams.gradient_checkpointing,
        gradient_checkpointing_policy=config.hyperparams.gradient_checkpointing_policy,
    )
    sft = trainer(model, config.hyperparams.optim)
    groups = advice.advice_for(config, sft, template(sft), shapes())
    found = [remedy for group in groups for remedy in group if remedy.flags.startswith(flags)]
    return found, measured(model)


@pytest.mark.parametrize("optim", ["adafactor", "sgd"])
def test_the_estimate_for_another_optimizer_is_its_state(optim):
    (remedy,), sizes = advised(f"--optim {optim}")
    state = template(trainer(optim=optim))
    assert remedy.apply(sizes).optimizer == memory.state_sizes(state, 1).optimizer


def test_the_estimate_for_fewer_rows_is_near_what_they_take():
    found, sizes = advised("--per_device_train_batch_size")
    flags = [remedy.flags for remedy in found]
    assert flags[0] == "--per_device_train_batch_size 4 --gradient_accumulation_steps 2"
    assert flags[-1] == "--per_device_train_batch_size 1 --gradient_accumulation_steps 8"
    truth = measured(MODEL, 2)
    assert found[0].apply(sizes).total == pytest.approx(truth.total, rel=0.15)


def test_the_estimates_for_checkpointing_are_near_what_it_takes(by_policy):
    for policy, fields in (
        ("attention", {}),
        ("nothing", {}),
        ("nothing", {"gradient_checkpointing_policy": "attention"}),
    ):
        (remedy,), sizes = advised(f"--gradient_checkpointing_policy {policy}", **fields)
        truth = by_policy[policy].activations
        assert remedy.apply(sizes).activations == pytest.approx(truth, rel=0.3)
    first = advised("--gradient_checkpointing true", gradient_checkpointing=False)[0][0]
    estimate = first.apply(by_policy["none"]).activations
    assert estimate == pytest.approx(by_policy["matmuls"].activations, rel=0.5)


def test_what_a_run_does_already_is_not_advised():
    found, _ = advised(
        "--", gradient_checkpointing_policy="nothing", dtype="bfloat16", optim="sgd",
        param_dtype="bfloat16", use_peft=True,
    )  # fmt: skip
    names = {remedy.flags.split()[0] for remedy in found}
    assert names == {"--per_device_train_batch_size", "--max_length"}


def test_a_state_that_cannot_fit_is_refused_before_it_is_made():
    sft = trainer()
    state = template(sft)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state))
    sizes = memory.state_sizes(state, 1)
    groups = advice.advice_for(SFTConfig().replace(lora_r=1), sft, state)
    with pytest.raises(ConfigError, match="needs at least .* By estimate --use_peft makes it fit"):
        advice.check(sizes, Capacity(sizes.total // 2, None, "TPU v5"), groups)


def test_the_state_that_training_begins_with_has_the_shapes_it_was_judged_by():
    sft = trainer()
    made = sft.create_train_state(jax.random.key(0))
    assert isinstance(made, TrainState)
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, template(sft))


# In a job


def started(output_dir, **fields) -> str:
    """What a job of two rows per update prints before its first update."""
    config = SFTConfig().replace(
        **SFTConfig.embedded
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
    with pytest.raises(
        ConfigError, match=r"needs 5\.00 GB, and cpu has 4\.00 GB\. By estimate --per_dev"
    ):
        started(tmp_path / "run")


def test_a_job_whose_state_alone_cannot_fit_ends_before_that_is_made(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "capacity", lambda held=0: Capacity(9 * MB, 9 * MB, "cpu"))
    with pytest.raises(
        ConfigError, match=r"needs at least 13\.1 MB, and cpu has 9 MB\. By estimate"
    ):
        started(tmp_path / "run")


def test_a_job_tells_its_attention_and_the_memory_of_an_update(big_update, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "capacity", lambda held=0: Capacity(9000 * MB, 3000 * MB, "cpu"))
    said = started(tmp_path / "run")
    assert "attention: xla (cpu)\n" in said
    assert re.search(r"^memory of an update of 2 x \d+ tokens\n  parameters ", said, re.M)
    assert "  together            5.00 GB of 9.00 GB on cpu, 3.00 GB free\n" in said
    assert "warning: an update needs 5.00 GB, and 3.00 GB are free. Should memory run out: " in said


def test_a_kernel_that_is_asked_for_on_another_device_is_refused(tmp_path):
    for name in ("cudnn", "splash"):
        with pytest.raises(ConfigError, match=f"attn_implementation {name} cannot be taken: "):
            started(tmp_path / name, attn_implementation=name)
