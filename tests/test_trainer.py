"""The trainer's contract: twelve lines make an algorithm, the loop keeps its order, runs resume."""

import itertools
import json
import os
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import Regression, bits, regression_batches

from relax.callbacks import MetricsLog
from relax.callbacks.metrics import CLOCK_FIELDS
from relax.checkpoint.checkpointer import Checkpointer
from relax.trainers import Callback, StopTraining, Trainer, TrainState

KEY = jax.random.key(5)
HOOKS = [
    *("on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end", "on_batch_begin"),
    *("on_batch_end", "on_validation_begin", "on_validation_end", "on_save"),
]


class Recorder(Callback):
    """Writes down every hook with the step and `epoch.position`; may do something at one of them.

    Args:
      at: `(hook, step)` where `act` is called.
    """

    def __init__(self, at=(None, None), act=None):
        self.seen, self.at, self.act = [], at, act

    def note(self, hook, event):
        self.seen.append(f"{hook[3:]} {event.step} {event.epoch}.{event.position}")
        if (hook, event.step) == self.at:
            self.act()


for _hook in HOOKS:
    setattr(Recorder, _hook, lambda self, event, hook=_hook: self.note(hook, event))


class Memory:
    """A checkpointer that keeps deep copies, as JSON would hand the progress back."""

    def __init__(self):
        self.saved = {}

    def save(self, step, state, progress):
        copy = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)
        self.saved[step] = (copy, json.loads(json.dumps(progress)))

    def wait(self):
        pass


def stop_training():
    raise StopTraining


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


# A new algorithm.


class MyTrainer(Trainer):  # a whole new algorithm
    def create_train_state(self, key):
        params = self.model.init(key, jnp.zeros((1, 8), jnp.int32))["params"]
        return TrainState.create(params=params, optimizer=self.optimizer, rng=key)

    def compute_loss(self, params, batch):
        logits = self.model.apply({"params": params}, batch["input_ids"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


class MLP(nn.Module):
    @nn.compact
    def __call__(self, input_ids):
        hidden = nn.relu(nn.Dense(16)(nn.Embed(23, 8)(input_ids)))
        return nn.Dense(23)(hidden)


@pytest.mark.parametrize("kind", ["MLP", "Transformer"])
def test_twelve_lines_make_a_trainer_of_any_flax_model(kind, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = MLP() if kind == "MLP" else tiny_model
    tokens = np.arange(64, dtype=np.int32).reshape(8, 8) % 23  # the next token is this one plus 1
    train_loader = [{"input_ids": tokens, "labels": (tokens + 1) % 23}] * 6
    eval_loader = train_loader[:1]

    trainer = MyTrainer(model, optax.adamw(1e-2))
    before = trainer.validate(trainer.create_train_state(jax.random.key(0)), eval_loader)
    state = trainer.train(train_loader, num_epochs=3, key=jax.random.key(0))
    metrics = trainer.validate(state, eval_loader)

    assert isinstance(metrics["loss"], float)
    assert metrics["loss"] < 0.8 * before["loss"]
    assert trainer.test(state, eval_loader) == metrics
    assert int(state.step) == 18
    assert list(tmp_path.iterdir()) == []  # nothing was written


def test_the_contract_has_two_abstract_methods_and_nine_hooks():
    assert Trainer.__abstractmethods__ == {"create_train_state", "compute_loss"}
    # Those of `train`, and one that trainers call whose completions are scored.
    assert {*HOOKS, "on_scored"} == {name for name in vars(Callback) if name.startswith("on_")}


def test_no_attribute_of_a_trainer_changes_while_it_trains():
    trainer = Regression()
    before = dict(vars(trainer))
    trainer.train(regression_batches(2), key=KEY, eval_loader=regression_batches(1))
    assert vars(trainer) == before


@pytest.mark.parametrize("both", [False, True])
def test_a_run_begins_with_a_key_or_goes_on_from_a_state(both):
    trainer = Regression()
    start = {"key": KEY, "state": trainer.create_train_state(KEY)} if both else {}
    with pytest.raises(ValueError, match=f"got {'both' if both else 'neither'}"):
        trainer.train(regression_batches(1), **start)


# The order of the loop.


def test_the_hooks_come_in_their_order_over_two_epochs_of_three_items():
    recorder = Recorder()
    trainer = Regression(callbacks=[recorder])
    checkpointer = Memory()
    trainer.train(
        regression_batches(3),
        num_epochs=2,
        key=KEY,
        eval_loader=regression_batches(1),
        eval_on_start=True,
        checkpointer=checkpointer,
        save_steps=2,
    )
    assert recorder.seen == [
        *("train_begin 0 0.0", "validation_begin 0 0.0", "validation_end 0 0.0"),
        *("epoch_begin 0 0.0", "batch_begin 0 0.1", "batch_end 1 0.1"),
        *("batch_begin 1 0.2", "batch_end 2 0.2", "save 2 0.2"),
        *("batch_begin 2 0.3", "batch_end 3 0.3"),
        *("epoch_end 3 0.3", "validation_begin 3 0.3", "validation_end 3 0.3"),
        *("epoch_begin 3 1.0", "batch_begin 3 1.1", "batch_end 4 1.1", "save 4 1.1"),
        *("batch_begin 4 1.2", "batch_end 5 1.2", "batch_begin 5 1.3", "batch_end 6 1.3"),
        *("save 6 1.3", "epoch_end 6 1.3", "validation_begin 6 1.3", "validation_end 6 1.3"),
        "train_end 6 2.0",
    ]
    assert list(checkpointer.saved) == [2, 4, 6]


def validated_and_saved(num_epochs=2, **options):
    """The steps of validations and saves of a run over 3 items an epoch, and the last step."""
    recorder = Recorder()
    state = Regression(callbacks=[recorder]).train(
        regression_batches(3),
        num_epochs,
        key=KEY,
        eval_loader=regression_batches(1),
        checkpointer=Memory(),
        **options,
    )
    marks = [line.split() for line in recorder.seen]
    validated = [int(step) for hook, step, _ in marks if hook == "validation_end"]
    return validated, [int(step) for hook, step, _ in marks if hook == "save"], int(state.step)


def test_validations_and_saves_come_where_they_are_due_and_never_twice():
    assert validated_and_saved() == ([3, 6], [6], 6)
    assert validated_and_saved(eval_steps=2, save_steps=0) == ([2, 4, 6], [3, 6], 6)
    assert validated_and_saved(eval_steps=0, save_steps=4) == ([6], [4, 6], 6)
    assert validated_and_saved(eval_steps=5, eval_on_start=True) == ([0, 5, 6], [6], 6)


def test_max_steps_ends_a_run_in_the_middle_and_at_the_end_of_an_epoch():
    assert validated_and_saved(max_steps=4) == ([3, 4], [4], 4)
    assert validated_and_saved(max_steps=3) == ([3], [3], 3)
    assert validated_and_saved(max_steps=3, save_steps=3, eval_steps=3) == ([3], [3], 3)
    assert validated_and_saved(max_steps=100) == ([3, 6], [6], 6)
    assert validated_and_saved(max_steps=0) == ([0], [0], 0)


@pytest.mark.parametrize(
    "hook, at, last",
    [
        ("on_train_begin", 0, 0),
        ("on_epoch_begin", 0, 0),
        ("on_batch_begin", 1, 2),
        ("on_batch_end", 2, 2),
        ("on_save", 2, 2),
        ("on_validation_begin", 2, 2),
        ("on_validation_end", 2, 2),
        ("on_epoch_end", 3, 3),
        ("on_train_end", 6, 6),
    ],
)
def test_stop_training_from_any_hook_ends_the_run_in_order(hook, at, last):
    recorder, checkpointer = Recorder((hook, at), stop_training), Memory()
    state = Regression(callbacks=[recorder]).train(
        regression_batches(3),
        num_epochs=2,
        key=KEY,
        eval_loader=regression_batches(1),
        eval_steps=2,
        checkpointer=checkpointer,
        save_steps=2,
    )
    assert int(state.step) == last
    assert recorder.seen[-1].startswith(f"train_end {last} ")
    assert list(checkpointer.saved)[-1] == last


def test_a_callback_that_raises_names_itself_and_all_callbacks_are_closed():
    class Fragile(Callback):
        closed = False

        def on_batch_end(self, event):
            raise ZeroDivisionError("oops")

        def close(self):
            self.closed = True

    fragile = Fragile()
    with pytest.raises(ZeroDivisionError, match="oops") as error:
        Regression(callbacks=[fragile]).train(regression_batches(1), key=KEY)
    assert error.value.__notes__ == ["raised by the callback Fragile.on_batch_end"]
    assert fragile.closed


def test_an_event_tells_where_the_run_is_and_what_it_trains_on():
    class Look(Recorder):
        def on_batch_end(self, event):
            self.seen.append((event.epoch_length, event.total_steps, event.epochs_done))
            assert event.batch["x"].shape == (4, 3) and int(event.state.step) == event.step
            assert set(event.metrics) > {"loss", "grad_norm", "absolute_error", "skipped_steps"}

    def progress_of(loader, **options):
        look = Look()
        Regression(callbacks=[look]).train(loader, 2, key=KEY, **options)
        return [entry for entry in look.seen if isinstance(entry, tuple)]

    batches = regression_batches(2)
    assert progress_of(batches) == [(2, 4, 0.5), (2, 4, 1.0), (2, 4, 1.5), (2, 4, 2.0)]
    assert progress_of(batches, max_steps=1) == [(2, 1, 0.5)]
    assert progress_of(Again(batches), max_steps=3) == [(None, 3, 0), (None, 3, 0), (None, 3, 1)]


class Again:
    """An iterable without a length."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


class Pairs(Regression):
    """Two updates from every item, as an algorithm that makes its own batches has."""

    def make_batches(self, state, item):
        for name in ("first", "second"):
            yield item[name]


def test_an_item_may_give_several_updates_and_positions_count_items():
    recorder, checkpointer = Recorder(), Memory()
    batches = regression_batches(4)
    items = [{"first": batches[i], "second": batches[i + 1]} for i in (0, 2)]
    state = Pairs(callbacks=[recorder]).train(
        items, key=KEY, checkpointer=checkpointer, save_steps=3
    )
    assert bits(state) == bits(Regression().train(batches, key=KEY))
    assert [line for line in recorder.seen if line.startswith("batch_end")] == [
        "batch_end 1 0.1", "batch_end 2 0.1", "batch_end 3 0.2", "batch_end 4 0.2",
    ]  # fmt: skip
    # Step 3 lies within an item: the checkpoint comes when the item is done.
    assert list(checkpointer.saved) == [4]
    state = Pairs().train(items, key=KEY, max_steps=3)
    assert int(state.step) == 4  # and so does the end


# Loaders.


def test_a_generator_that_runs_out_gets_a_clear_error():
    trainer = Regression()
    with pytest.raises(ValueError, match="gave no batch in epoch 1.*a generator is exhausted"):
        trainer.train((batch for batch in regression_batches(2)), num_epochs=2, key=KEY)
    with pytest.raises(
        ValueError, match="evaluation loader gave no batch.*a generator is exhausted"
    ):
        trainer.train(regression_batches(2), 2, key=KEY, eval_loader=iter(regression_batches(1)))
    with pytest.raises(ValueError, match="gave no batch in epoch 0"):
        trainer.train([], key=KEY)


def test_a_loader_that_ends_before_the_position_to_go_on_from_is_named():
    trainer = Regression()
    state = trainer.train(regression_batches(3), key=KEY)
    with pytest.raises(ValueError, match="ended after 2 items.*from item 3 of the epoch"):
        trainer.train(Again(regression_batches(2)), 3, state=state)


class Ordered:
    """An `OrderedLoader` that notes what was asked of it; each epoch has its own order."""

    def __init__(self, items):
        self.items, self.asked = items, []

    def __len__(self):
        return len(self.items)

    def batches(self, epoch, start=0):
        self.asked.append((epoch, start))
        order = np.random.default_rng(epoch).permutation(len(self.items))
        return (self.items[i] for i in order[start:])


def test_an_ordered_loader_is_asked_for_an_epoch_from_a_position():
    loader = Ordered(regression_batches(3))
    state = Regression().train(loader, 2, key=KEY, max_steps=4)
    recorder = Recorder()
    Regression(callbacks=[recorder]).train(loader, 3, state=state)
    assert loader.asked == [(0, 0), (1, 0), (1, 1), (2, 0)]
    # The epoch that was under way had its beginning already.
    begun = [line for line in recorder.seen if line.startswith("epoch_begin")]
    assert begun == ["epoch_begin 6 2.0"]


# Validation.


def test_validation_weights_batches_by_their_items_and_takes_a_subset():
    trainer = Regression()
    state = trainer.create_train_state(KEY)
    batches = regression_batches(2, rows=2) + regression_batches(1, rows=5, seed=1)
    before = bits(state)
    metrics = trainer.validate(state, batches)
    x, y = (np.concatenate([batch[name] for batch in batches]) for name in ("x", "y"))
    errors = x @ np.asarray(state.params["w"]) - y
    np.testing.assert_allclose(metrics["loss"], np.square(errors).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["absolute_error"], np.abs(errors).mean(), rtol=1e-6)
    assert metrics["num_tokens"] == 9
    part = trainer.validate(state, (batch for batch in batches), max_batches=2)
    np.testing.assert_allclose(part["loss"], np.square(errors[:4]).mean(), rtol=1e-6)
    assert trainer.test(state, batches, max_batches=2) == part
    assert bits(state) == before  # nothing changed, nothing was donated
    with pytest.raises(ValueError, match="gave no batch"):
        trainer.validate(state, [])


def test_max_eval_batches_bounds_the_validations_of_a_run():
    class Look(Callback):
        def on_validation_end(self, event):
            assert event.metrics["num_tokens"] == 8

    trainer = Regression(callbacks=[Look()])
    batches = regression_batches(3)
    trainer.train(batches, key=KEY, eval_loader=batches, max_eval_batches=2)


# Going on as if nothing had been.


def records(path):
    """The lines of metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{n: v for n, v in line.items() if n not in CLOCK_FIELDS} for line in lines]


def run(path, *callbacks, checkpointer=None, optimizer=None, **options):
    """Two epochs of four items, validated after each; a line of metrics every 3 updates."""
    trainer = Regression(
        optimizer, callbacks=[MetricsLog(path, logging_steps=3), *callbacks], max_grad_norm=1.0
    )
    return trainer.train(
        Ordered(regression_batches(4)),
        num_epochs=2,
        eval_loader=regression_batches(2, seed=1),
        checkpointer=checkpointer,
        **options,
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    path = tmp_path_factory.mktemp("unbroken") / "metrics.jsonl"
    return bits(run(path, key=KEY)), records(path)


def test_the_unbroken_run_logs_windows_across_epochs_and_a_rest(unbroken):
    steps = [(line["step"], "eval_loss" in line) for line in unbroken[1]]
    assert steps == [(3, False), (4, True), (6, False), (8, True), (8, False)]


@pytest.mark.parametrize("k", range(1, 9))
def test_a_run_resumed_from_its_checkpoint_after_any_item_ends_with_the_same_bits(
    k, unbroken, tmp_path
):
    path = tmp_path / "metrics.jsonl"
    memory = Memory()
    # The run goes on past the checkpoint, as one does that is killed later.
    run(path, key=KEY, checkpointer=memory, save_steps=k, max_steps=min(k + 2, 8))
    state, progress = memory.saved[k]
    assert bits(run(path, state=state, progress=progress)) == unbroken[0]
    assert records(path) == unbroken[1]


def test_a_run_resumed_from_the_end_of_an_epoch_ends_with_the_same_bits(unbroken, tmp_path):
    path, memory = tmp_path / "metrics.jsonl", Memory()
    run(path, key=KEY, checkpointer=memory, save_steps=0, max_steps=6)
    state, progress = memory.saved[4]
    assert (progress["epoch"], progress["position"], progress["evaluated"]) == (1, 0, 4)
    assert bits(run(path, state=state, progress=progress)) == unbroken[0]
    assert records(path) == unbroken[1]


@pytest.mark.parametrize("k", range(1, 9))
def test_the_position_follows_from_the_state_alone_where_an_item_is_an_update(
    k, unbroken, tmp_path
):
    state = run(tmp_path / "a.jsonl", key=KEY, max_steps=k)
    assert bits(run(tmp_path / "b.jsonl", state=state)) == unbroken[0]


@pytest.mark.parametrize(
    "hook, at", [("on_batch_begin", 2), ("on_batch_end", 4), ("on_batch_end", 7)]
)
def test_ctrl_c_saves_and_returns_a_state_that_goes_on_bit_by_bit(
    hook, at, unbroken, tmp_path, capsys
):
    path, memory = tmp_path / "metrics.jsonl", Memory()
    recorder = Recorder((hook, at), press_ctrl_c)
    state = run(path, recorder, key=KEY, checkpointer=memory)
    step = at + (hook == "on_batch_begin")
    assert int(state.step) == step and list(memory.saved) == [step]
    assert recorder.seen[-1].startswith("train_end")
    assert capsys.readouterr().err.startswith("finishing this step")
    assert bits(run(tmp_path / "other.jsonl", state=state)) == unbroken[0]
    saved, progress = memory.saved[step]
    assert bits(run(path, state=saved, progress=progress)) == unbroken[0]
    assert records(path) == unbroken[1]


def test_real_checkpoints_resume_to_the_same_bits(unbroken, tmp_path):
    path = tmp_path / "metrics.jsonl"
    checkpointer = Checkpointer(tmp_path / "checkpoints", save_total_limit=2)
    run(path, key=KEY, checkpointer=checkpointer, save_steps=2, max_steps=5)
    assert checkpointer.steps() == [4, 5]
    template = jax.eval_shape(Regression().create_train_state, KEY)
    state, progress, step = checkpointer.restore(template)
    assert (step, progress["epoch"], progress["position"]) == (5, 1, 1)
    # Step 5 is where the first run ended, evaluated; the whole run has no evaluation there.
    state, progress, _ = checkpointer.restore(template, step=4)
    resumed = run(path, state=state, progress=progress, checkpointer=checkpointer, save_steps=2)
    assert bits(resumed) == unbroken[0] and records(path) == unbroken[1]
    assert checkpointer.steps() == [6, 8]


def test_a_run_that_was_over_goes_on_to_nothing_and_saves_nothing(unbroken, tmp_path):
    path, memory = tmp_path / "metrics.jsonl", Memory()
    run(path, key=KEY, checkpointer=memory)
    state, progress = memory.saved.pop(8)
    assert bits(run(path, state=state, progress=progress, checkpointer=memory)) == unbroken[0]
    assert records(path) == unbroken[1] and memory.saved == {}


def test_items_of_several_updates_resume_to_the_same_bits():
    batches = regression_batches(8)
    items = [{"first": a, "second": b} for a, b in itertools.pairwise(batches)][::2]
    unbroken = Pairs().train(items, num_epochs=2, key=KEY)
    memory = Memory()
    Pairs().train(items, num_epochs=2, key=KEY, checkpointer=memory, save_steps=2)
    for step in (2, 8, 10):
        state, progress = memory.saved[step]
        assert bits(Pairs().train(items, 2, state=state, progress=progress)) == bits(unbroken)
