"""Rollouts that are drawn ahead of their updates: from which weights, and after an interruption."""

import json
import os
import signal

import jax
import numpy as np
import pytest
from conftest import bits
from rl import TableTrainer, items_of

from relax import parallel
from relax.trainers.interrupt import Interrupt
from relax.trainers.rl.ahead import rollout_of, state_of

KEY = jax.random.key(4)
ITEMS = 6


class Loader:
    """Items of two prompts with two spare ones, in another order in every epoch."""

    def __len__(self):
        return ITEMS

    def batches(self, epoch, start=0):
        items = items_of(2 * ITEMS)
        for position in range(start, ITEMS):
            n = (position + epoch) % ITEMS
            yield items[n] | {"extra_prompts": items[ITEMS + n]}


class Memory:
    """A checkpointer that keeps the bytes of states, and the progress as JSON."""

    def __init__(self):
        self.saved = {}

    def save(self, step, state, progress):
        self.saved[step] = jax.tree.map(lambda x: x.copy(), state), json.dumps(progress)

    def wait(self):
        pass


def short(completions):
    """Rewards of few values, so that some groups have equal ones."""
    return [float(len(c) > 4) for c in completions]


def noted(completions, log_extra=None, **columns):
    log_extra("words", [c[:1] for c in completions])
    return [0.1 * len(c) for c in completions]


def trainer(ahead=2, kind=TableTrainer, **options):
    return kind(
        reward_funcs=[short, noted],
        async_rollouts=ahead,
        max_resample_rounds=1,
        prompts_per_item=2,
        **options,
    )


@pytest.fixture(scope="module")
def unbroken():
    made, memory = trainer(), Memory()
    state = made.train(Loader(), num_epochs=2, key=KEY, checkpointer=memory, save_steps=1)
    return bits(state), memory


@pytest.mark.parametrize("updates", [1, 2])
def test_a_rollout_is_drawn_with_the_weights_of_so_many_items_before(updates):
    options = {"completions_per_update": 8 // updates}
    made, alone = trainer(2, **options), trainer(0, **options)
    alone.correction, alone.recomputes_old_logprobs = made.correction, True
    items = [item for epoch in range(2) for item in Loader().batches(epoch)]
    states, staleness = [alone.create_train_state(KEY)], []
    for i, item in enumerate(items):
        drawn = max(i - 2, 0)
        found = alone.collect_item(states[drawn], item, i - drawn)
        experience = alone.timed_experience(states[i], found)
        state = jax.tree.map(lambda x: x.copy(), states[i])
        for logged in alone.split_updates(states[i], found, *experience):
            state, _ = alone.train_step(state, logged.batch)
        states.append(state)
        staleness.append(updates * (i - drawn))
    assert staleness[:4] == [0, updates, 2 * updates, 2 * updates]
    assert bits(made.train(Loader(), num_epochs=2, key=KEY)) == bits(states[-1])


def test_a_run_that_goes_on_from_any_checkpoint_ends_with_the_same_bits(unbroken):
    for step in (1, 5, 6, 11):
        state, progress = unbroken[1].saved[step]
        state = jax.tree.map(lambda x: x.copy(), state)
        ended = trainer().train(Loader(), 2, state=state, progress=json.loads(progress))
        assert bits(ended) == unbroken[0]


def test_a_signal_while_a_rollout_is_drawn_changes_no_bit(unbroken):
    class Stopped(TableTrainer):
        drawn = 0

        def collect_item(self, state, item, lag=0):
            self.drawn += 1
            if self.drawn == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().collect_item(state, item, lag)

    memory, made = Memory(), trainer(kind=Stopped)
    with Interrupt():  # notebooks, and pytest, leave SIGTERM alone
        made.train(Loader(), 2, key=KEY, checkpointer=memory)
    (step,) = memory.saved
    assert step < 2 * ITEMS
    state, progress = memory.saved[step]
    ended = trainer().train(Loader(), 2, state=state, progress=json.loads(progress))
    assert bits(ended) == unbroken[0]


def test_no_rollout_is_drawn_for_updates_behind_the_end():
    class Counted(TableTrainer):
        drawn = 0

        def collect_item(self, state, item, lag=0):
            self.drawn += 1
            return super().collect_item(state, item, lag)

    made = trainer(3, kind=Counted)
    made.train(Loader(), 2, key=KEY, max_steps=5)
    assert made.drawn == 5
    assert made.ahead.state_dict() == {"pending": []}


def test_a_rollout_comes_back_from_json_bit_for_bit():
    made, item = trainer(0), next(Loader().batches(0))
    found = made.collect_item(made.create_train_state(KEY), item)
    again = rollout_of(json.loads(json.dumps(state_of(found, item))), item)
    for name, value in vars(found.rollout).items():
        got = getattr(again.rollout, name)
        if isinstance(value, np.ndarray):
            assert (got.dtype, got.shape) == (value.dtype, value.shape)
            np.testing.assert_array_equal(got, value)
        else:
            assert got == value
    assert all(a is b for a, b in zip(again.rollout.rows, found.rollout.rows, strict=True))
    np.testing.assert_array_equal(again.by_function, found.by_function)
    assert again.extras["words"].tolist() == found.extras["words"].tolist()
    assert again.metrics == found.metrics


def test_devices_of_their_own_give_the_same_completions(unbroken):
    mesh = parallel.make_mesh("data=1", jax.devices()[:1])
    assert bits(trainer(rollout_mesh=mesh).train(Loader(), 2, key=KEY)) == unbroken[0]


def test_a_loader_without_an_order_is_refused():
    with pytest.raises(ValueError, match="need a loader with `batches"):
        trainer().train(items_of(3), key=KEY)
