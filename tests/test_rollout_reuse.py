"""Runs whose rollouts reuse the last ones: the same completions, and the same bytes on resume."""

import json

import jax
import numpy as np
import optax
import pytest
from conftest import bits
from rl import Letters

from relax.errors import ConfigError
from relax.sampling import SamplingConfig
from relax.trainers import GRPOTrainer
from relax.trainers.callback import Callback
from relax.trainers.rl import drafts

KEY = jax.random.key(4)
EPOCHS = 3


class Loader:
    """Two items of two prompts, whose first one comes twice in its item."""

    prompts = [[[1, 2, 3], [1, 2, 3]], [[5], [7, 8, 9, 10]]]

    def __len__(self):
        return len(self.prompts)

    def batches(self, epoch, start=0):
        for position in range(start, len(self)):
            ids = self.prompts[(position + epoch) % len(self)]
            yield {"prompt_ids": ids, "rows": [{"prompt": str(one)} for one in ids]}


class Memory:
    """A checkpointer that keeps copies of states, and the progress as JSON."""

    def __init__(self):
        self.saved = {}

    def save(self, step, state, progress):
        self.saved[step] = jax.tree.map(lambda x: x.copy(), state), json.dumps(progress)

    def wait(self):
        pass


class Log(Callback):
    """Completions and metrics of every update."""

    def __init__(self):
        self.texts, self.shares = [], []

    def on_batch_end(self, event):
        self.texts.append([record["completion"] for record in event.records])
        self.shares.append(event.metrics.get("sampling/reused_tokens"))


def letters_before_m(completions):
    return [float(sum(c < "m" for c in text)) for text in completions]


def run(tiny_model, tiny_params, *, memory=None, state=None, progress=None, **options):
    log = Log()
    trainer = GRPOTrainer(
        tiny_model,
        optax.adam(0.02),
        reward_funcs=[letters_before_m],
        tokenizer=Letters(),
        params=tiny_params,
        num_generations=4,
        prompts_per_item=2,
        sampling=SamplingConfig(max_new_tokens=7),
        rollout_reuse=True,
        callbacks=(log,),
        **options,
    )
    memory = memory or Memory()
    start = {"key": KEY} if state is None else {"state": state, "progress": progress}
    ended = trainer.train(Loader(), EPOCHS, checkpointer=memory, save_steps=1, **start)
    return ended, log


@pytest.fixture(scope="module")
def unbroken(tiny_model, tiny_params):
    memory = Memory()
    ended, log = run(tiny_model, tiny_params, memory=memory)
    return bits(ended), log, memory, ended


def test_a_run_has_the_completions_that_it_has_without_drafts(
    tiny_model, tiny_params, unbroken, monkeypatch
):
    _, log, _, ended = unbroken
    assert log.shares[:2] == [0, 0] and all(0.1 < share < 1 for share in log.shares[2:])
    monkeypatch.setattr(drafts, "_draft", lambda group, place: ())
    plain, other = run(tiny_model, tiny_params)
    assert other.texts == log.texts and other.shares == [0] * len(log.shares)
    for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(ended.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_equal_prompts_of_an_item_have_completions_of_their_own(unbroken):
    for texts in unbroken[1].texts:
        assert texts[:4] != texts[4:]


def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_bits(
    tiny_model, tiny_params, unbroken
):
    """From the middle of the second epoch: one item's drafts are new, the other's are old."""
    state, progress = unbroken[2].saved[3]
    state = jax.tree.map(lambda x: x.copy(), state)
    ended, log = run(tiny_model, tiny_params, state=state, progress=json.loads(progress))
    assert bits(ended) == unbroken[0]
    assert log.texts == unbroken[1].texts[3:] and log.shares == unbroken[1].shares[3:]


def test_a_rollout_that_was_not_trained_on_is_no_draft(tiny_model, tiny_params):
    held = drafts.Drafts()
    item = {"prompts": [[1, 2]], "config": SamplingConfig(max_new_tokens=4, n=2)}
    draw = [
        held.sample(tiny_model, tiny_params, key=jax.random.key(n), decode=None, **item)
        for n in (1, 1)
    ]
    held.on_train_begin(None)  # an interrupted item is drawn again
    assert held.state_dict() == {"groups": []}
    again = held.sample(tiny_model, tiny_params, key=jax.random.key(1), decode=None, **item)
    assert again.completions == draw[0].completions
    held.on_batch_end(None)
    last = held.sample(tiny_model, tiny_params, key=jax.random.key(9), decode=None, **item)
    assert last.completions == again.completions and last.reused == last.lengths.sum()
    assert held.metrics() == {"sampling/reused_tokens": 1.0}


def test_what_cannot_be_reused_is_refused(tiny_model, tiny_params):
    with pytest.raises(ConfigError, match="drop one, got async_rollouts 1"):
        run(tiny_model, tiny_params, async_rollouts=1)
    with pytest.raises(ConfigError, match="completions of one turn"):
        drafts.Drafts.make(object(), 0)
