"""What lies in the host's memory: optimizer state, and activations kept for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import bits, packed_batch
from rich.console import Console

from relax import parallel
from relax.checkpoint import Checkpointer
from relax.config import SFTConfig
from relax.engine.devices import check_host_memory
from relax.errors import ConfigError
from relax.models import Transformer, TransformerConfig
from relax.optimizers import OPTIMIZERS, eval_params, freeze_for, learning_rate, offload
from relax.optimizers.stochastic_rounding import stochastic_rounding
from relax.trainers import SFTTrainer

CONFIG = TransformerConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.2,
)
MODEL = Transformer(CONFIG)
# With Adam's usual eps the step of a gradient near 0 is as long as any other, and turns with its
# rounding, which two compiled programs need not share.
ADAMW = OPTIMIZERS["adamw"](optax.linear_schedule(1e-2, 0.0, 9), eps=1e-3)
TEXTS = [[([1, 2, 3], [4, 5, 6, 7])], [([8, 9], [10, 11, 12])]] * 2


def kinds(tree) -> dict[str, str]:
    """The memory of each array of a state."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x.sharding.memory_kind
            for p, x in leaves}  # fmt: skip


def trained(optimizer, steps=3, model=MODEL):
    """The state after some updates."""
    trainer = SFTTrainer(model, optimizer, max_grad_norm=1.0)
    state = trainer.create_train_state(jax.random.key(0))
    batch = parallel.shard_batch(packed_batch(TEXTS, 8))
    for _ in range(steps):
        state, metrics = trainer.train_step(state, batch)
    return state, metrics


def assert_on_host(opt_state):
    found = kinds(opt_state)
    moments = [name for name in found if name.endswith("gate_proj/kernel")]
    assert len(moments) == 2
    assert {found[name] for name in moments} == {"pinned_host"}
    assert found[moments[0].split("/")[0] + "/layers_0/count"] != "pinned_host"


@pytest.fixture(scope="module")
def whole():
    return trained(ADAMW)


def close(ours, theirs):
    for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_state_on_the_host_gives_the_same_weights_and_stays_there(whole, tmp_path):
    state, metrics = trained(offload(ADAMW))
    assert_on_host(state.opt_state)
    close(state.params, whole[0].params)
    rates = (metrics["learning_rate"], learning_rate(state.opt_state))
    assert rates == (whole[1]["learning_rate"],) * 2 and rates[0] > 0
    # A checkpoint is read back to the same place.
    Checkpointer(tmp_path).save(3, state, {})
    template = parallel.sharded_shapes(jax.eval_shape(lambda: state))
    restored = Checkpointer(tmp_path).restore(template)[0]
    assert bits(restored) == bits(state)
    assert_on_host(restored.opt_state)


def test_so_it_does_on_a_mesh(whole):
    with parallel.use(parallel.make_mesh("fsdp=1,data=1", jax.devices()[:1])):
        state, _ = trained(offload(ADAMW))
    assert_on_host(state.opt_state)
    close(state.params, whole[0].params)


GRADIENTS = {"a": jnp.ones((64, 64)), "b": {"c": jnp.full((3,), 2.0)}}


@pytest.mark.parametrize("name", ["adamw_8bit", "muon", "schedule_free_adamw"])
def test_every_optimizer_moves_as_it_does_on_the_device(name):
    params = jax.tree.map(jnp.zeros_like, GRADIENTS)
    moves = []
    for wrap in (lambda optimizer: optimizer, offload):
        optimizer = stochastic_rounding(freeze_for(wrap(OPTIMIZERS[name](0.1)), 1))
        state, now = optimizer.init(params), params
        for _ in range(3):
            updates, state = jax.jit(optimizer.update)(GRADIENTS, state, now)
            now = optax.apply_updates(now, updates)
        moves.append((now, eval_params(state, now)))
    close(*moves)


def test_a_gradient_that_is_not_finite_leaves_the_state_on_the_host_as_it_is():
    params = jax.tree.map(jnp.zeros_like, GRADIENTS)
    optimizer = offload(OPTIMIZERS["adamw"](0.1))
    _, state = optimizer.update(GRADIENTS, optimizer.init(params), params)
    before = bits(state)
    nan = jax.tree.map(lambda g: g * jnp.nan, GRADIENTS)
    updates, state = jax.jit(optimizer.update)(nan, state, params)
    assert bits(state) == before
    assert all(not leaf.any() for leaf in jax.tree.leaves(updates))


class Apart:
    """A device that does not read the host's memory."""

    platform, device_kind = "gpu", "GPU of old"

    def addressable_memories(self):
        return [Apart]

    kind = "device"


def test_devices_that_do_not_read_the_hosts_memory_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [Apart()])
    with pytest.raises(ConfigError, match=r"pinned_host\), and GPU of old has only device"):
        check_host_memory(SFTConfig().replace(offload_optimizer=True), Console(quiet=True))
    check_host_memory(SFTConfig(), Console(quiet=True))


def test_a_cpu_is_said_to_save_nothing(capsys):
    check_host_memory(SFTConfig().replace(offload_optimizer=True), Console())
    assert "offload_optimizer saves nothing on a CPU" in capsys.readouterr().out
