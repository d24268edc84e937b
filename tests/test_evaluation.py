"""Evaluation of several sets, of every batch, and its history: numbers by an independent loop."""

import json

import jax
import numpy as np
import pytest
from conftest import Regression, regression_batches

from relax.callbacks import Callback, MetricsLog
from relax.checkpoint.checkpointer import Checkpointer

KEY = jax.random.key(3)
SETS = {
    "easy": regression_batches(2, rows=2),
    "hard": regression_batches(1, rows=5, seed=1) + regression_batches(1, rows=3, seed=2),
}


def errors(state, batches) -> np.ndarray:
    w = np.asarray(state.params["w"])
    return np.concatenate([batch["x"] @ w - batch["y"] for batch in batches])


@pytest.fixture(scope="module")
def trainer():
    return Regression()


@pytest.fixture(scope="module")
def state(trainer):
    return trainer.create_train_state(KEY)


def test_several_sets_are_evaluated_by_name_and_all_together(trainer, state):
    metrics = trainer.validate(state, SETS)
    for name, batches in SETS.items():
        expected = np.square(errors(state, batches)).mean()
        np.testing.assert_allclose(metrics[f"{name}_loss"], expected, rtol=1e-6)
        assert metrics[f"{name}_num_tokens"] == len(errors(state, batches))
    every = errors(state, SETS["easy"] + SETS["hard"])
    np.testing.assert_allclose(metrics["loss"], np.square(every).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["absolute_error"], np.abs(every).mean(), rtol=1e-6)
    assert metrics["num_tokens"] == 12
    part = trainer.validate(state, SETS, max_batches=1)
    expected = np.square(errors(state, SETS["hard"][:1])).mean()
    np.testing.assert_allclose(part["hard_loss"], expected, rtol=1e-6)
    with pytest.raises(ValueError, match="loader of 'none' gave no batch"):
        trainer.validate(state, {"easy": SETS["easy"], "none": []})


def test_one_named_set_is_called_by_no_name(trainer, state):
    assert trainer.validate(state, {"only": SETS["easy"]}) == trainer.test(state, SETS["easy"])


def test_every_batch_has_its_numbers(trainer, state):
    hard = trainer.validate(state, SETS["hard"])
    losses = [np.square(errors(state, [batch])).mean() for batch in SETS["hard"]]
    np.testing.assert_allclose([b["loss"] for b in hard.batches], losses, rtol=1e-6)
    assert [b["num_tokens"] for b in hard.batches] == [5, 3]
    both = trainer.validate(state, SETS).batches
    assert [b["set"] for b in both] == ["easy", "easy", "hard", "hard"]
    np.testing.assert_allclose([b["loss"] for b in both[2:]], losses, rtol=1e-6)


def test_a_run_validates_several_sets_and_callbacks_see_them():
    class Look(Callback):
        def on_validation_end(self, event):
            seen.append((event.step, event.metrics["hard_num_tokens"], len(event.metrics.batches)))

    seen = []
    trainer = Regression(callbacks=[Look()])
    trainer.train(regression_batches(2), 2, key=KEY, eval_loader=SETS)
    assert seen == [(2, 8, 4), (4, 8, 4)]


def test_a_resumed_run_goes_on_behind_the_lines_of_its_checkpoint(tmp_path):

    def run(name, **options):
        log = MetricsLog(tmp_path / name, 1)
        trainer = Regression(callbacks=[log])
        trainer.train(regression_batches(4), eval_loader=SETS, **options)
        return log

    def timeless(path):
        lines = map(json.loads, path.read_text().splitlines())
        return [{n: v for n, v in line.items() if n not in times} for line in lines]

    times = ("elapsed_s", "tokens_per_second")
    run("whole.jsonl", key=KEY)
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    run("first.jsonl", key=KEY, max_steps=2, checkpointer=checkpointer)
    template = jax.eval_shape(Regression().create_train_state, KEY)
    state, progress, _ = checkpointer.restore(template)
    # Where the first run ended it was evaluated, the whole one was not.
    first = timeless(tmp_path / "first.jsonl")
    run("first.jsonl", state=state, progress=progress)
    second = timeless(tmp_path / "first.jsonl")
    assert second[: len(first)] == first
    assert [line for line in second if "eval_loss" not in line] == [
        line for line in timeless(tmp_path / "whole.jsonl") if "eval_loss" not in line
    ]
    assert [line["step"] for line in second] == [1, 2, 2, 3, 4, 4]
