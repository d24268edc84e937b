"""Metrics and progress: every line exactly once, numbers by hand, a terminal left as it was."""

import dataclasses
import io
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Regression, regression_batches
from rich.console import Console

from relax.callbacks import (
    BestCheckpoint,
    Callback,
    EarlyStopping,
    Event,
    MetricsLog,
    Progress,
)
from relax.callbacks.completions import RewardCounters
from relax.callbacks.curriculum import CurriculumProgress
from relax.callbacks.guards import NonFiniteGuard
from relax.callbacks.metrics import CLOCK_FIELDS, exclude_from_timing
from relax.callbacks.reference import ReferenceLogprobs
from relax.callbacks.warnings import LearningMonitor
from relax.data.curriculum import PassRateCurriculum
from relax.errors import ResumeError
from relax.rewards.batch import Tally
from relax.trainers.callback import load_state_dicts, state_dicts
from relax.trainers.rl.ahead import Ahead
from relax.trainers.rl.drafts import Drafts

KEY = jax.random.key(5)
NAN = float("nan")


def event(step, batch_shape=(4, 3), **metrics):
    """What a callback gets at an update of the second epoch of ten items."""
    arrays = {n: jnp.int32(v) if isinstance(v, int) else jnp.float32(v) for n, v in metrics.items()}
    batch = {"x": np.zeros(batch_shape)}
    return Event(None, None, step, 1, step - 10, 10, metrics=arrays, batch=batch)


def update(log, step, **metrics):
    happening = event(step, **metrics)
    log.on_batch_begin(happening)
    log.on_batch_end(happening)


def validation(log, step, **metrics):
    log.on_validation_begin(event(step))
    log.on_validation_end(Event(None, None, step, 1, step - 10, 10, metrics=metrics))


def timeless(record):
    return {name: value for name, value in record.items() if name not in CLOCK_FIELDS}


def lines(path):
    return [timeless(json.loads(line)) for line in path.read_text().splitlines()]


# MetricsLog.


def test_a_line_has_means_over_the_window_and_counts_over_the_run(tmp_path):
    seen = []
    log = MetricsLog(tmp_path / "a" / "metrics.jsonl", 2, listeners=(seen.append,))
    log.on_train_begin(event(10))
    for step, loss, tokens in [
        (11, 1.0, 3),
        (12, 2.0, 4),
        (13, 4.0, 5),
        (14, 8.0, 6),
        (15, 16.0, 7),
    ]:
        update(log, step, loss=loss, num_tokens=tokens)
    log.on_train_end(event(15))
    expected = [
        {"step": 12, "epoch": 1.2, "loss": 1.5, "num_tokens": 7},
        {"step": 14, "epoch": 1.4, "loss": 6.0, "num_tokens": 18},
        {"step": 15, "epoch": 1.5, "loss": 16.0, "num_tokens": 25},  # the rest of a window
    ]
    assert lines(tmp_path / "a" / "metrics.jsonl") == expected
    assert [timeless(record) for record in seen] == expected


def test_what_is_not_finite_is_null_in_the_file_and_itself_for_listeners(tmp_path):
    seen = []
    log = MetricsLog(tmp_path / "metrics.jsonl", 2, listeners=(seen.append,))
    log.on_train_begin(event(10))
    update(log, 11, loss=1.0, up=float("inf"), skipped_steps=0)
    update(log, 12, loss=NAN, up=-float("inf"), skipped_steps=1)
    [record] = lines(tmp_path / "metrics.jsonl")
    assert (record["loss"], record["up"], record["skipped_steps"]) == (None, None, 1)
    assert np.isnan(seen[0]["loss"])


def test_a_metric_that_some_updates_lack_is_the_mean_over_those_that_have_it(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 3)
    log.on_train_begin(event(11))
    update(log, 10, a=1.0)
    update(log, 11, a=3.0, b=5.0)
    update(log, 12, b=6.0, n=2)
    [record] = lines(tmp_path / "metrics.jsonl")
    assert record == {"step": 12, "epoch": 1.2, "a": 2.0, "b": 5.5, "n": 2}


def test_an_evaluation_is_a_line_of_its_own_and_does_not_end_a_window(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 2)
    log.on_train_begin(event(10))
    update(log, 11, loss=1.0)
    validation(log, 11, loss=7.0)
    update(log, 12, loss=2.0)
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 11, "epoch": 1.1, "eval_loss": 7.0},
        {"step": 12, "epoch": 1.2, "loss": 1.5},
    ]


def test_a_resumed_log_cuts_the_file_back_and_goes_on_within_the_window(tmp_path):
    path = tmp_path / "metrics.jsonl"

    def updates(log, *steps):
        for step in steps:
            update(log, step, loss=0.1 * step, num_tokens=step)

    whole = MetricsLog(tmp_path / "whole.jsonl", 3)
    whole.on_train_begin(event(10))
    updates(whole, 12, 13, 14, 15, 16)

    log = MetricsLog(path, 3)
    log.on_train_begin(event(10))
    updates(log, 12, 13)
    saved = json.loads(json.dumps(log.state_dict()))
    updates(log, 14, 15)
    validation(log, 15, loss=3.0)
    assert len(path.read_text().splitlines()) == 3

    assert set(saved) == {"counts", "lines", "window"}  # of no size that grows with the run
    log = MetricsLog(path, 3)
    log.load_state_dict(saved)
    log.on_train_begin(event(13))
    assert [line["step"] for line in lines(path)] == [12]  # cut at once
    updates(log, 14, 15, 16)
    assert lines(path) == lines(tmp_path / "whole.jsonl")


def test_lines_that_are_lost_before_a_resume_are_told(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 1)
    log.on_train_begin(event(10))
    update(log, 11, loss=1.0)
    update(log, 12, loss=1.0)
    saved = log.state_dict()
    text = log.path.read_text()
    log.path.write_text(text[: text.index("\n") + 5])  # one line, and a part of the next
    log = MetricsLog(log.path, 1)
    log.load_state_dict(saved)
    with pytest.warns(UserWarning, match="holds 1 of the 2 lines"):
        log.on_train_begin(event(12))
    update(log, 13, loss=1.0)
    assert [line["step"] for line in lines(log.path)] == [11, 13]
    assert log.state_dict()["lines"] == 2


@pytest.mark.parametrize("obstacle", ["a directory", "a file in the way"])
def test_a_file_that_cannot_be_written_is_named_in_the_error(obstacle, tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    if obstacle == "a directory":
        path.mkdir(parents=True)
    else:
        path.parent.write_text("")
    with pytest.raises(OSError, match="metrics.jsonl"):
        MetricsLog(path, 1).on_train_begin(event(10))


def test_a_new_run_begins_its_counts_anew_and_writes_over_an_old_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 99}\n')
    log = MetricsLog(path, 2)
    for _ in range(2):
        Regression(callbacks=[log]).train(regression_batches(2), key=KEY)
    assert [(line["step"], line["num_tokens"]) for line in lines(path)] == [(2, 8), (2, 8)]


def test_validating_outside_of_training_is_logged_without_an_epoch(tmp_path):
    log = MetricsLog(tmp_path / "a" / "metrics.jsonl", 2)
    trainer = Regression(callbacks=[log])
    batches = regression_batches(2)
    loss = trainer.validate(trainer.create_train_state(KEY), batches)["loss"]
    state = trainer.train(batches, key=KEY)
    trainer.validate(state, batches)
    before, training, after = lines(tmp_path / "a" / "metrics.jsonl")
    assert (before["step"], before["eval_loss"], after["step"]) == (0, loss, 2)
    assert "epoch" not in before and "epoch" not in after and training["epoch"] == 1.0


def test_tokens_per_second_leave_out_compiling_evaluating_and_saving(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("relax.callbacks.metrics.time.monotonic", lambda: now[0])
    seen = []
    log = MetricsLog(None, 3, listeners=(seen.append,))
    log.on_train_begin(event(9))
    took = {10: 100.0, 11: 2.0, 12: 1.0, 13: 4.0, 14: 50.0, 15: 1.0}
    for step, seconds in took.items():
        happening = event(step, (2, 3) if step == 14 else (4, 3), num_tokens=10)
        log.on_batch_begin(happening)
        now[0] += seconds
        log.on_batch_end(happening)
        if step == 11:
            log.on_validation_begin(happening)
            now[0] += 1000
            log.on_validation_end(dataclasses.replace(happening, metrics={"loss": 1.0}))
        if step == 13:
            log.state_dict()
            now[0] += 1000
            log.on_save(happening)
        if step == 12:
            with exclude_from_timing(
                dataclasses.replace(happening, trainer=SimpleNamespace(callbacks=[log]))
            ):
                now[0] += 1000  # such as a trace that is written
    speeds = [record["tokens_per_second"] for record in seen if "tokens_per_second" in record]
    assert speeds == [20 / 3, 20 / 5]  # steps 11, 12 and 13, 15
    assert seen[-1]["elapsed_s"] == sum(took.values()) + 3000


def test_no_path_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    trainer = Regression(callbacks=[MetricsLog(None, 1, listeners=(seen.append,))])
    trainer.train(regression_batches(2), key=KEY)
    assert [record["step"] for record in seen] == [1, 2] and list(tmp_path.iterdir()) == []


def test_states_of_callbacks_go_to_their_own_kind_and_place():
    class Count(Callback):
        n = 0

        def state_dict(self):
            return {"n": self.n}

        def load_state_dict(self, state):
            self.n = state["n"]

    first, second, other = Count(), Count(), Callback()
    first.n, second.n = 1, 2
    states = state_dicts([first, other, second])
    assert states == {"Count.0": {"n": 1}, "Count.1": {"n": 2}}
    again = [Callback(), Count(), Count(), Count()]
    load_state_dicts(again, states)
    assert [callback.n for callback in again[1:]] == [1, 2, 0]
    with pytest.warns(UserWarning, match="callbacks that this run lacks: Count.1. They are"):
        load_state_dicts([Count()], states)


STATEFUL = {
    MetricsLog: lambda: MetricsLog(None),
    NonFiniteGuard: NonFiniteGuard,
    LearningMonitor: lambda: LearningMonitor(print),
    EarlyStopping: EarlyStopping,
    BestCheckpoint: lambda: BestCheckpoint("best", saver=object()),
    ReferenceLogprobs: lambda: ReferenceLogprobs({}, Path("reference"), Console()),
    RewardCounters: lambda: RewardCounters(SimpleNamespace(tally=Tally(0.1))),
    Ahead: lambda: Ahead(None, 1, 1),
    Drafts: Drafts,
    CurriculumProgress: lambda: CurriculumProgress(PassRateCurriculum(3), [], 1.0),
}


def test_these_are_all_callbacks_with_a_state():
    found = {c for c in Callback.__subclasses__() if c.__module__.startswith("relax.")}
    assert {c for c in found if "load_state_dict" in vars(c)} == STATEFUL.keys()


@pytest.mark.parametrize("make", STATEFUL.values(), ids=lambda make: make().__class__.__name__)
def test_a_state_of_another_version_is_refused_with_what_to_do(make):
    """As of a log that kept all lines, under "history", where this one counts them."""
    name = f"{type(make()).__name__}.0"
    match = rf"state of the callback {name} cannot be read .*: resume with the version that wrote"
    for state in ({"history": [], "counts": {}, "window": []}, {}, [], None, "text"):
        with pytest.raises(ResumeError, match=match):
            load_state_dicts([make()], {name: state})


# Progress.


def shown(terminal, trainer_class=Regression, **options):
    """What a run of 2 epochs of 3 batches, the last a shorter one, prints."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=160)
    progress = Progress(console)
    log = MetricsLog(None, 2, listeners=(progress.show,))
    batches = regression_batches(2) + regression_batches(1, rows=2)
    try:
        trainer_class(callbacks=[log, progress]).train(batches, 2, key=KEY, **options)
    except ZeroDivisionError:
        pass
    return console.file.getvalue()


def test_plain_lines_tell_step_epoch_loss_and_speed_and_each_compilation_once():
    text = shown(False, eval_loader=regression_batches(1), eval_steps=3)
    assert "\x1b" not in text
    found = text.splitlines()
    assert sum("compiling the train step for batches of 4 x 3 ..." in line for line in found) == 1
    assert sum("compiling the train step for batches of 2 x 3 ..." in line for line in found) == 1
    assert len(re.findall(r"compiled for [42] x 3 and made one step in \d+\.\d s", text)) == 2
    steps = [line for line in found if line.startswith("step")]
    assert [line.split("  ")[:2] for line in steps] == [
        ["step 2/6", "epoch 0.67"],
        ["step 3/6", "epoch 1.00"],
        ["step 4/6", "epoch 1.33"],
        ["step 6/6", "epoch 2.00"],
        ["step 6/6", "epoch 2.00"],
    ]
    assert re.search(r"  loss \d+\.\d{4}  grad norm \d+\.\d{3}  [\d,]+ tokens/s$", steps[0])
    assert re.search(r"  evaluation loss \d+\.\d{4}$", steps[1])


def test_a_terminal_gets_one_bar_and_its_cursor_back(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    text = shown(True)
    last = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text)
    for words in ("step 6/6 ━", "loss ", "tokens/s", "0 s left"):
        assert words in last
    # A line of every logging window stays above the bar.
    assert re.findall(r"step (\d)/6  epoch", last) == ["2", "4", "6"]
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_an_error_while_training_stops_the_bar_too(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")

    class Broken(Regression):
        def make_batches(self, state, item):
            if int(state.step) == 1:
                raise ZeroDivisionError
            return (item,)

    text = shown(True, Broken)
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_the_accuracy_of_a_run_on_pairs_is_that_of_its_pairs():
    console = Console(file=io.StringIO(), width=160)
    record = {"step": 4, "mean_token_accuracy": 0.1, "rewards/accuracies": 0.75}
    Progress(console).show(record | {"rewards/margins": 1.5})
    assert console.file.getvalue() == "step 4  accuracy 0.750  margin 1.500\n"


RECORDS = {
    "sft": {"loss": 1.23456, "mean_token_accuracy": 0.5, "learning_rate": 1e-4, "grad_norm": 12.5},
    "dpo": {
        "loss": 0.693147, "rewards/accuracies": 0.5, "rewards/margins": -0.1, "grad_norm": 12.5,
        "mean_token_accuracy": 0.5, "learning_rate": 1e-4,
    },
    "grpo": {
        "loss": -0.0001, "reward": 0.8751, "kl": 0.0123, "completions/mean_length": 245.1,
        "learning_rate": 1e-6, "grad_norm": 0.5,
    },
    "ppo": {
        "loss": -0.0001, "reward": 0.8751, "objective/kl": 12.3, "completions/mean_length": 245.1,
        "learning_rate": 1e-6, "grad_norm": 0.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("step_s", [0.001, 0.00085, 1.0, 60.0])
@pytest.mark.parametrize("algorithm", RECORDS)
def test_what_matters_fits_a_terminal_of_80_columns(algorithm, step_s, monkeypatch):
    """Long runs of every algorithm: bar, time left, loss and reward are whole, lines are one.

    The time left changes between two reads of the clock, and so does its width.
    """
    ticks = itertools.count(step=step_s)
    monkeypatch.setattr("relax.callbacks.progress.time.monotonic", lambda: next(ticks))
    monkeypatch.setenv("TERM", "xterm-256color")
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    progress = Progress(console)
    progress.on_train_begin(Event(None, None, 0, total_steps=12_000))
    for step in (1233, 1234):
        happening = dataclasses.replace(event(step, loss=1.0), total_steps=12_000)
        progress.on_batch_begin(happening)
        progress.on_batch_end(happening)
    record = RECORDS[algorithm] | {"tokens_per_second": 12345.6}
    progress.show({"step": 1234, "epoch": 10.25} | record)
    progress.close()
    written = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", console.file.getvalue())
    found = [line.rstrip() for line in re.split(r"[\r\n]+", written)]
    assert max(map(len, found)) <= 80
    assert not any("..." in line for line in found if line.startswith("step"))
    [logged] = [line for line in found if line.startswith("step 1234/12000  epoch 10.25  loss ")]
    bar = found[-1] or found[-2]
    assert re.search(r"^step 1234/12000 [━╸╺ ]{10} loss -?\d\.\d{4} .* left$", bar), bar
    if "reward" in record:
        assert "reward 0.875" in logged and "reward 0.875" in bar


def test_what_is_under_way_is_shown_with_its_seconds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("relax.callbacks.progress.time.monotonic", lambda: now[0])
    progress = Progress(Console(file=io.StringIO(), force_terminal=True, width=80))
    for hook, words in (
        (lambda: progress.on_batch_begin(event(11, loss=1.0)), "compiling the train step for 4"),
        (lambda: progress.on_validation_begin(event(11)), "evaluating (3 s)"),
        (progress.state_dict, "saving (3 s)"),
    ):
        hook()
        now[0] += 3
        assert progress._status().startswith(words)
    progress.show({"step": 12, "loss": 0.5, "reward": 0.25, "tokens_per_second": 12345.0})
    assert progress._status() == "loss 0.5000  reward 0.250  12,345 tokens/s  saving (3 s)"
    progress.console.width = 60
    assert progress._status() == "loss 0.5000  reward 0.250  saving (3 s)"


def test_a_second_batch_shape_is_counted_when_it_compiles():
    text = shown(False)
    assert re.search(
        r"compiled for 2 x 3 and made one step in .* s, batch shape 2 of this run$",
        text,
        re.MULTILINE,
    )
    assert "batch shape 1" not in text


def test_time_left_leaves_out_compiling_evaluating_and_saving(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("relax.callbacks.progress.time.monotonic", lambda: now[0])
    progress = Progress(Console(file=io.StringIO()))
    progress.on_train_begin(event(10))
    progress._total = 20
    for step, seconds in ((11, 100.0), (12, 2.0), (13, 4.0)):
        happening = event(step, loss=1.0)
        progress.on_batch_begin(happening)
        now[0] += seconds
        progress.on_batch_end(happening)
        progress.on_validation_begin(happening)
        now[0] += 1000
        progress.on_validation_end(happening)
        progress.state_dict()
        now[0] += 1000
        progress.on_save(happening)
    assert progress._left.seconds(7) == 21.0  # 3 s an update


@pytest.mark.parametrize("skipped", [0, 3])
def test_skipped_steps_are_shown_where_there_are_any(skipped):
    console = Console(file=io.StringIO(), width=160)
    Progress(console).show({"step": 4, "epoch": 0.5, "loss": NAN, "skipped_steps": skipped})
    expected = "step 4  epoch 0.50  loss nan" + ("  3 skipped" if skipped else "")
    assert console.file.getvalue() == expected + "\n"
