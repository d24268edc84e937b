"""What watches a run stops, keeps, warns and tells as it should, and never holds training up."""

import gzip
import io
import json
import math
import signal
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import Regression, bits, regression_batches
from rich.console import Console

from relax.callbacks import (
    BestCheckpoint,
    Callback,
    EarlyStopping,
    LearningMonitor,
    MetricsLog,
    NonFiniteGuard,
    Profiler,
    Report,
    Status,
    Trackers,
    TrainingStatusWriter,
)
from relax.callbacks.previews import is_right, questions_of
from relax.callbacks.trackers import tracker_makers
from relax.checkpoint.checkpointer import Checkpointer
from relax.config.imports import load_object, make_object
from relax.data import DataLoader
from relax.data.preference import Preference, Preferences
from relax.data.preference_loader import PreferenceLoader
from relax.data.prompt_loader import PromptLoader
from relax.data.prompts import Prompts
from relax.errors import ConfigError, NonFiniteError
from relax.monitor import read_status
from relax.trainers.callback import Event, load_state_dicts, state_dicts

KEY = jax.random.key(5)
NAN = float("nan")


class Scripted(Regression):
    """Its evaluations are told beforehand, one after the other, by the step they come at."""

    def __init__(self, losses: dict[int, float], **options):
        super().__init__(**options)
        self.losses = losses

    def _evaluate(self, state, loader, max_batches):
        return {"loss": self.losses[int(state.step)], "accuracy": int(state.step) / 100}


def train(callbacks, losses=None, batches=8, **options):
    trainer = Scripted(losses or {}, callbacks=callbacks)
    if losses:
        options = {"eval_loader": [0], "eval_steps": 1} | options
    return trainer.train(regression_batches(batches), key=KEY, **options)


# Early stopping and the best checkpoint.


@pytest.mark.parametrize(
    "losses, options, stopped_at",
    [
        ([5, 4, 3, 2, 1, 0, 0, 0], {"patience": 2}, 8),  # better each time, but for the last two
        ([5, 6, 7, 1, 1, 1, 1, 1], {"patience": 2}, 3),
        ([5, 6, 4, 6, 6, 1, 1, 1], {"patience": 2}, 5),
        ([5, 4, 3, 2, 1, 0, -1, -2], {"patience": 3, "min_delta": 4.0}, 4),  # -4, and no more
        ([5, 4, 3, 2, 1, 0, -1, -2], {"patience": 3, "mode": "max"}, 4),
        ([NAN, NAN, 1, 2, 3, 4, 5, 6], {"patience": 3}, 6),  # what is no number is not better
    ],
)
def test_early_stopping_ends_a_run_after_so_many_evaluations_that_are_not_better(
    losses, options, stopped_at
):
    script = dict(enumerate(map(float, losses), 1))
    assert int(train([EarlyStopping("eval_loss", **options)], script).step) == stopped_at


def test_early_stopping_reads_any_metric_and_names_those_that_there_are():
    script = {step: 1.0 for step in range(1, 9)}
    assert int(train([EarlyStopping("eval_accuracy", 1, mode="max")], script).step) == 8
    assert int(train([EarlyStopping("loss", 1)], script).step) == 2
    with pytest.raises(ConfigError, match="got 'eval_f1'. Name one of: eval_loss, eval_accuracy"):
        train([EarlyStopping("eval_f1", 1)], script)
    with pytest.raises(ConfigError, match="patience >= 1"):
        EarlyStopping(patience=0)


def test_what_was_stopped_early_stays_stopped_when_it_is_gone_on_with(tmp_path):
    script = dict(enumerate([5.0, 6.0, 7.0] + [0.0] * 5, 1))
    saver = Checkpointer(tmp_path)
    state = train([EarlyStopping("eval_loss", 2)], script, checkpointer=saver)
    state, progress, step = saver.restore(state)
    assert step == 3
    trainer = Scripted(script, callbacks=[EarlyStopping("eval_loss", 2)])
    again = trainer.train(
        regression_batches(8), state=state, progress=progress, eval_loader=[0], eval_steps=1
    )
    assert int(again.step) == 3


def test_the_best_checkpoint_is_the_state_of_the_best_evaluation(tmp_path):
    script = dict(enumerate([5.0, 3.0, 4.0, NAN, 2.0, 9.0, 9.0, 9.0], 1))
    best = BestCheckpoint(tmp_path / "best", "eval_loss", "min")
    last = train([best], script)
    assert best.step == 5 and best.path == tmp_path / "best" / "5"
    assert Checkpointer(tmp_path / "best").steps() == [5]
    found, progress, step = Checkpointer(tmp_path / "best").restore(last)
    plain = Regression().train(regression_batches(5), key=KEY)
    assert (step, bits(found)) == (5, bits(plain))
    assert progress["position"] == 5 and progress["evaluated"] == 5


def test_a_run_that_goes_on_from_the_best_checkpoint_ends_as_the_whole_one(tmp_path):
    script = dict(enumerate([5.0, 4.0, 1.0] + [9.0] * 5, 1))

    def log(name):
        return MetricsLog(tmp_path / name, 1)

    callbacks = [log("a"), EarlyStopping("eval_loss", 4), BestCheckpoint(tmp_path / "best")]
    whole = train(callbacks, script)
    store = Checkpointer(tmp_path / "best")
    state, progress, _ = store.restore(whole)
    (tmp_path / "b").write_bytes((tmp_path / "a").read_bytes())
    again = [log("b"), EarlyStopping("eval_loss", 4), BestCheckpoint(tmp_path / "other")]
    trainer = Scripted(script, callbacks=again)
    state = trainer.train(
        regression_batches(8), state=state, progress=progress, eval_loader=[0], eval_steps=1
    )
    assert bits(state) == bits(whole) and int(state.step) == 7
    steps = [
        [json.loads(li)["step"] for li in (tmp_path / n).read_text().splitlines()] for n in "ab"
    ]
    assert steps[0] == steps[1]


# Guards.


def with_nan(batches, steps):
    for step in steps:
        batches[step - 1]["x"] = np.full((4, 3), NAN, np.float32)
    return batches


def test_updates_that_are_not_finite_end_a_run_when_there_are_several_in_a_row(tmp_path):
    guard = NonFiniteGuard(3, tmp_path / "bad_batch.jsonl")
    trainer = Regression(callbacks=[guard])
    with pytest.raises(NonFiniteError) as caught:
        trainer.train(with_nan(regression_batches(12), [2, 5, 6, 7]), key=KEY)
    said = str(caught.value)
    assert "3 updates in a row, 5 to 7, were not finite" in said and "at update 4" in said
    bad = [json.loads(line) for line in (tmp_path / "bad_batch.jsonl").read_text().splitlines()]
    assert [line["step"] for line in bad] == [5, 6, 7] and bad[0]["position"] == 5
    assert bad[0]["batch"]["x"] == [[None] * 3] * 4 and len(bad[0]["batch"]["y"]) == 4


def test_fewer_updates_that_are_not_finite_are_survived_unchanged():
    batches = with_nan(regression_batches(12), [2, 5, 6, 9, 10])
    state = Regression(callbacks=[NonFiniteGuard(3)]).train(batches, key=KEY)
    assert int(state.step) == 12 and np.isfinite(bits_of(state)).all()
    with pytest.raises(NonFiniteError, match="11 to 12"):  # looked at when the run ends, too
        batches = with_nan(regression_batches(12), [11, 12])
        Regression(callbacks=[NonFiniteGuard(2)]).train(batches, key=KEY)


def bits_of(state):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)])


def test_the_count_of_updates_in_a_row_is_carried_through_a_checkpoint():
    first, second = NonFiniteGuard(3), NonFiniteGuard(3)
    for step, skipped in ((1, 0), (2, 1), (3, 1)):
        first.on_batch_end(
            Event(None, None, step, 0, step, metrics={"skipped_steps": skipped, "loss": 0.5})
        )
    load_state_dicts([second], json.loads(json.dumps(state_dicts([first]))))
    with pytest.raises(NonFiniteError, match="2 to 4.* 0.5 at update 1"):
        second.on_batch_end(Event(None, None, 4, 0, 4, metrics={"skipped_steps": 1, "loss": NAN}))
        second.state_dict()


def said_by_monitor(records) -> list[str]:
    said = []
    monitor = LearningMonitor(said.append)
    for step, record in enumerate(records, 1):
        monitor.show({"step": step, "grad_norm": 1.0, "learning_rate": 0.1, "loss": 1.0} | record)
    return said


def test_the_monitor_tells_of_a_jump_of_the_gradient_norm_and_of_standing_still():
    assert said_by_monitor([{}] * 30) == []
    [jump] = said_by_monitor([{}] * 6 + [{"grad_norm": 40.0}] + [{}] * 6)
    assert "the gradient norm rose from 1 to 40 around step 7" in jump
    assert said_by_monitor([{}] * 3 + [{"grad_norm": 40.0}]) == []  # too early to compare
    assert said_by_monitor([{"learning_rate": 0.0}] * 2) == []
    [rate] = said_by_monitor([{"learning_rate": 0.0}] * 9)
    assert "learning rate is 0" in rate
    [loss] = said_by_monitor([{"loss": 0.0}] * 3)
    assert "loss is exactly 0" in loss
    assert said_by_monitor([{"loss": 0.0, "reward": 1.0}] * 9) == []
    [skipped] = said_by_monitor([{}, {"skipped_steps": 2}, {"skipped_steps": 3}])
    assert "2 updates up to step 2 were skipped" in skipped


# Trackers.


class Memory:
    """A tracker that keeps what it is given."""

    def __init__(self):
        self.seen, self.closed = [], False

    def log(self, metrics, step):
        self.seen.append((step, metrics))

    def close(self):
        self.closed = True


def tracked(maker, count=6, **options):
    """What a run with a tracker says, its seconds, and its final state."""
    said = []
    trackers = Trackers({"mine": maker}, said.append, **options)
    log = MetricsLog(None, 1, listeners=(trackers.show,))
    start_s = time.monotonic()
    state = train([log, trackers], batches=count)
    return said, time.monotonic() - start_s, state


def test_a_tracker_gets_every_record_once_in_order_under_grouped_names():
    memory = Memory()
    said, _, _ = tracked(lambda step: memory)
    assert said == [] and memory.closed
    assert [step for step, _ in memory.seen] == [1, 2, 3, 4, 5, 6]
    assert {"train/loss", "train/grad_norm"} <= set(memory.seen[0][1])


class Raises(Memory):
    def log(self, metrics, step):
        raise OSError("no route to host\nand a stack of more")


class Leaves(Memory):
    def log(self, metrics, step):
        raise SystemExit(3)


class NeverCloses(Memory):
    def close(self):
        threading.Event().wait()


def no_tracker(step):
    raise RuntimeError("please log in")


def hangs_when_started(step):
    threading.Event().wait()


@pytest.mark.parametrize(
    "maker, told",
    [
        (lambda step: Raises(), ["OSError: no route to host. The run", "failed to log 6 records"]),
        (lambda step: Leaves(), ["SystemExit: 3. The run", "failed to log 6 records"]),
        (lambda step: NeverCloses(), ["could not be closed: no answer within 0.2 s"]),
        (no_tracker, ["RuntimeError: please log in. The run continues without it."]),
        (hangs_when_started, ["no answer within 0.2 s. The run continues without it."]),
    ],
)
def test_a_tracker_that_raises_hangs_or_leaves_changes_nothing_but_is_told_of(maker, told):
    said, _, state = tracked(maker, patience_s=0.2)
    assert len(said) == len(told), said
    for sentence, part in zip(said, told, strict=True):
        assert sentence.startswith("mine") and part in sentence
    assert bits(state) == bits(train([], batches=6))


def test_a_tracker_that_fails_often_is_sent_nothing_more_and_one_that_recovers_goes_on():
    class Twice(Memory):
        def log(self, metrics, step):
            if step in (2, 3):
                raise OSError("no route to host")
            super().log(metrics, step)

    recovers = Twice()
    said, _, _ = tracked(lambda step: recovers)
    assert [step for step, _ in recovers.seen] == [1, 4, 5, 6] and recovers.closed
    assert said[-1] == "mine failed to log 2 records; metrics.jsonl has all of them."
    asked = []

    class Broken(Memory):
        def log(self, metrics, step):
            asked.append(step)
            raise OSError("no route to host")

    said, _, _ = tracked(lambda step: Broken(), count=14)
    assert asked == list(range(1, 11)) and "failed to log 14 records" in said[-1]


def test_report_to_takes_an_own_tracker_and_tells_what_is_not_installed(tmp_path, monkeypatch):
    file = tmp_path / "own.py"
    file.write_text(
        "class Mine:\n    def log(self, metrics, step):\n        pass\n\n\nclass Other:\n    pass\n"
    )
    makers = tracker_makers([f"{file}:Mine", "none"], tmp_path, None, {})
    assert list(makers) == [f"{file}:Mine"]
    with pytest.raises(ConfigError, match="must have a method log"):
        tracker_makers([f"{file}:Other"], tmp_path, None, {})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "relax-trainers\[wandb\]"'):
        tracker_makers(["wandb"], tmp_path, None, {})


def test_tensorboard_gets_event_files_that_it_can_read(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event as Written

    [maker] = tracker_makers(["tensorboard"], tmp_path, None, {}).values()
    said, _, _ = tracked(maker, count=2)
    assert said == []
    [file] = (tmp_path / "events").iterdir()
    data, scalars = file.read_bytes(), {}
    while data:  # length (8), its checksum (4), the event, its checksum (4)
        length = int.from_bytes(data[:8], "little")
        event, data = Written.FromString(data[12 : 12 + length]), data[16 + length :]
        scalars |= {(event.step, v.tag): v.simple_value for v in event.summary.value}
    assert (1, "train/loss") in scalars and (2, "train/grad_norm") in scalars


# Status, report, profiler.


def test_the_status_follows_a_run_to_its_last_checkpoint(tmp_path):
    writer = TrainingStatusWriter(tmp_path / "status.json", every_s=0)
    status, seen = Status([writer], tmp_path / "checkpoints"), []

    class Look(Callback):
        def on_batch_end(self, event):
            seen.append(read_status(writer.path))

        def on_validation_begin(self, event):
            seen.append(read_status(writer.path))

    log = MetricsLog(None, 1, listeners=(status.show,))
    saver = Checkpointer(tmp_path / "checkpoints")
    train(
        [log, status, Look()], {s: 1.0 for s in range(1, 9)}, batches=4, eval_steps=2,
        checkpointer=saver,
    )  # fmt: skip
    phases = [found["phase"] for found in seen]
    assert phases == ["training", "training", "evaluating"] * 2
    assert [found["step"] for found in seen] == [1, 2, 2, 3, 4, 4]
    assert seen[1]["total_steps"] == 4 and seen[1]["time_left_s"] >= 0
    last = read_status(writer.path)
    assert last["loss"] == last["metrics"]["loss"] and last["evaluation"]["eval_loss"] == 1.0
    assert last["last_checkpoint"] == {"step": 4, "path": str(tmp_path / "checkpoints" / "4")}
    assert {"starting", "compiling", "training", "evaluating"} <= set(last["seconds"])


def test_a_report_that_cannot_be_written_is_told_once_and_stops_nothing(tmp_path):
    said = []
    report = Report(tmp_path / "nowhere", said.append)
    train([report], checkpointer=Checkpointer(tmp_path / "c"), save_steps=2)
    assert report.write() is None
    assert len(said) == 1 and "the report cannot be written" in said[0]


def test_a_page_that_costs_too_much_at_a_save_is_written_as_soon_as_it_does_not(
    tmp_path, monkeypatch
):
    now, written = [0.0], []

    def write_report(directory):
        written.append(now[0])
        now[0] += 1.0  # is worth 20 seconds of training

    monkeypatch.setattr("relax.callbacks.report.time.monotonic", lambda: now[0])
    monkeypatch.setattr("relax.callbacks.report.write_report", write_report)
    report = Report(tmp_path, print)
    for second in range(1, 61):  # of an update each
        now[0] += 1.0
        report.on_batch_end(None)
        if second in (1, 5, 9, 50):
            report.on_save(None)
    # The first at once, the second after 20 seconds, the third went with it, the last at once.
    assert written == [1.0, 22.0, 52.0]


def test_a_window_of_updates_is_traced_into_a_file_that_perfetto_reads(tmp_path):
    """And TensorBoard: its plugin looks for this directory, and for steps by their numbers."""
    console = Console(file=io.StringIO(), width=200)
    train([Profiler(tmp_path / "profile", 2, 3, console)], batches=4)
    [trace] = (tmp_path / "profile").glob("plugins/profile/*/*.trace.json.gz")
    assert list(trace.parent.glob("*.xplane.pb"))
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    events = [event for event in events if event.get("ph") == "X"]  # with begin and duration
    assert all(event["dur"] >= 0 and "ts" in event for event in events)
    steps = [e["args"]["step_num"] for e in events if "step_num" in e.get("args", {})]
    assert sorted(steps) == ["2", "3"]
    assert any(e.get("args", {}).get("hlo_module") == "jit_update" for e in events)
    assert not any(event["name"].startswith("$") for event in events)  # functions of Python
    assert "the trace is in" in console.file.getvalue()


def test_a_window_behind_the_end_of_the_run_is_refused():
    with pytest.raises(ConfigError, match="5:6 must start within the run, which has 4 updates"):
        train([Profiler("nowhere", 5, 6)], batches=4)


# Questions.


def test_questions_are_what_stands_before_and_what_is_trained(arithmetic_tokenizer):
    tokenizer = arithmetic_tokenizer
    prompt, answer = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("1+1=", "2"))
    text = tokenizer("abcdef", add_special_tokens=False)["input_ids"]
    labels = [-100] * len(prompt) + answer
    # A second turn, and a text that is trained on from its first token, which has no prompt.
    rows = [(prompt + answer, labels), ((prompt + answer) * 2, labels * 2), (text, text)]
    found = questions_of(DataLoader(rows, 1), tokenizer, 5)
    assert [(q.prompt, q.expected) for q in found] == [("1+1=", "2")] * 2
    assert found[0].prompt_ids == prompt


def test_questions_of_pairs_expect_the_chosen_answer_and_those_of_prompts_their_column():
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "".join(chr(i) for i in ids))
    pairs = [
        Preference(*(np.array(list(map(ord, text)), np.int32) for text in texts))
        for texts in (("p0", "yes", "no"), ("p1", "a", "b"), ("p2", "c", "d"))
    ]
    loader = PreferenceLoader(Preferences(pairs, True), 1)
    found = questions_of(loader, tokenizer, 2)
    assert [(q.prompt, q.expected) for q in found] == [("p0", "yes"), ("p1", "a")]
    rows = [{"prompt": "3*3=", "answer": 9}, {"prompt": "why?", "answer": None}]
    prompts = PromptLoader(Prompts([[1], [2]], rows, False), 1, shuffle=False)
    found = questions_of(prompts, tokenizer, 2)
    assert [(q.prompt, q.expected) for q in found] == [("3*3=", "9"), ("why?", None)]
    assert questions_of([{"x": 1}], tokenizer, 2) == []


def test_an_answer_is_right_where_it_is_what_is_expected():
    assert is_right("54 ", "54") and not is_right("54.", "54")
    assert is_right("so it is #### 1,000", "#### 1000") and not is_right("1000", "#### 1000")
    assert is_right("anything", None) is None


# Own callbacks.


def test_a_callback_is_found_in_a_file_and_a_mistake_in_it_is_told(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from relax.callbacks import Callback\n\n\nclass Mine(Callback):\n    pass\n\n\n"
        "class Needs:\n    def __init__(self, more):\n        pass\n\n\n"
        "def twice(x):\n    return 2 * x\n"
    )
    assert isinstance(make_object(f"{file}:Mine", "callbacks"), Callback)
    assert load_object("relax.callbacks.EarlyStopping", "callbacks", type) is EarlyStopping
    for spec, reason in {
        f"{file}:Mien": "has no class 'Mien'. Did you mean Mine",
        f"{file}:Needs": "cannot be constructed without arguments: TypeError",
        f"{tmp_path}/none.py:Mine": "there is no Python file",
        "no_such_package.Class": "there is no module 'no_such_package'",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            make_object(spec, "callbacks")


def test_a_signal_leaves_a_status_and_a_trace_in_order(tmp_path):
    class Stop(Callback):
        def on_batch_end(self, event):
            if event.step == 3:
                signal.raise_signal(signal.SIGTERM)

    writer = TrainingStatusWriter(tmp_path / "status.json")
    profiler = Profiler(tmp_path / "profile", 2, 7)
    state = train([profiler, Stop(), Status([writer])])
    assert int(state.step) == 3 and not profiler._is_on
    assert read_status(writer.path)["step"] == 3
    assert not math.isnan(read_status(writer.path)["seconds"]["training"])


def test_the_state_that_callbacks_save_does_not_grow_with_the_run(tmp_path):
    """As much after 3,000 updates with evaluations and saves as after 100."""
    sizes = {}

    class Saver:
        def save(self, step, state, progress):
            sizes[step] = len(json.dumps(progress["callbacks"]))

        def wait(self):
            pass

    said = []
    monitor, status = LearningMonitor(said.append), Status([], tmp_path / "checkpoints")
    log = MetricsLog(tmp_path / "metrics.jsonl", 5, listeners=(monitor.show, status.show))
    callbacks = [log, NonFiniteGuard(), monitor, EarlyStopping(patience=10**6), status]
    Regression(callbacks=callbacks).train(
        regression_batches(10), 300, key=KEY, eval_loader=regression_batches(1), eval_steps=20,
        checkpointer=Saver(), save_steps=20,
    )  # fmt: skip
    assert len(sizes) == 150 and sizes[3000] <= sizes[100] + 100
