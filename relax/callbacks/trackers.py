"""Where metrics go besides the file: TensorBoard, Weights & Biases, trackio, or an own tracker.

A tracker is another program, and the network. So each lives in a thread of its own behind a queue
of bounded length: whatever it does, raise, hang or be offline, training neither waits for it nor
ends with it. What it did not take is counted, and told at the end.
"""

import importlib.util
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from relax.config.imports import make_object
from relax.errors import ConfigError
from relax.trainers.callback import Callback, Event

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
_FAILURES = 10  # in a row, after which a tracker is given no more


class Tracker(Protocol):
    """What takes metrics. `close`, where it has one, is called at the end."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...


class Trackers(Callback):
    """Hands every record of `MetricsLog` to trackers, none of which can hold the run up.

    Its method `show` is to be a listener of `MetricsLog`.

    Args:
      makers: by name, what makes the tracker, given the step that the run begins after. It is
        called in the tracker's thread.
      say: is told, once each, what fails, and at the end what was not taken.
      capacity: records that may wait for a tracker.
      patience_s: seconds that the end of the run waits for all of them.
    """

    def __init__(
        self,
        makers: dict[str, Callable[[int], Tracker]],
        say: Callable[[str], None],
        capacity: int = 1000,
        patience_s: float = 5.0,
    ):
        self.makers, self.say = makers, say
        self.capacity, self.patience_s = capacity, patience_s
        self._feeds: list[_Feed] = []

    def on_train_begin(self, event: Event) -> None:
        self.close()
        self._feeds = [
            _Feed(name, maker, event.step, self.capacity) for name, maker in self.makers.items()
        ]

    def show(self, record: dict) -> None:
        """Takes a record of `MetricsLog`, as one of its listeners."""
        metrics = tagged(record)
        for feed in self._feeds:
            feed.give((metrics, record["step"]))
            self._tell(feed)

    def close(self) -> None:
        deadline_s = time.monotonic() + self.patience_s
        for feed in self._feeds:
            feed.end()
        for feed in self._feeds:
            feed.wait(max(deadline_s - time.monotonic(), 0.0))
            self._tell(feed)
            lost = feed.given - feed.taken
            if lost:
                self.say(f"{feed.name} did not take {lost} of {feed.given} records")
        self._feeds = []

    def _tell(self, feed: "_Feed") -> None:
        if feed.problem is not None and not feed.told:
            feed.told = True
            self.say(f"{feed.name}: {feed.problem}. Training goes on without it.")


class _Feed:
    """A tracker in its thread, and the queue before it."""

    def __init__(self, name: str, maker: Callable[[int], Tracker], step: int, capacity: int):
        self.name, self.given, self.taken = name, 0, 0
        self.problem: str | None = None
        self.told = False
        self._queue: queue.Queue = queue.Queue(capacity)
        self._ended = threading.Event()
        # A daemon: the process may end while the tracker hangs.
        self._thread = threading.Thread(
            target=self._run, args=(maker, step), name=f"tracker-{name}", daemon=True
        )
        self._thread.start()

    def give(self, item: tuple[dict, int]) -> None:
        self.given += 1
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self.problem = (
                self.problem or f"{self._queue.maxsize} records wait for it, which is all"
            )

    def end(self) -> None:
        self._ended.set()

    def wait(self, seconds: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.problem = self.problem or "it does not come to an end"

    def _run(self, maker: Callable[[int], Tracker], step: int) -> None:
        try:
            tracker = maker(step)
            self._feed(tracker)
            getattr(tracker, "close", lambda: None)()
        except BaseException as error:  # sys.exit in a tracker ends its thread alone
            self.problem = self.problem or _words(error)

    def _feed(self, tracker: Tracker) -> None:
        failures = 0
        while failures < _FAILURES:
            try:
                item = self._queue.get(timeout=0.05)
            except queue.Empty:
                if self._ended.is_set():
                    return
                continue
            try:
                tracker.log(*item)
                self.taken, failures = self.taken + 1, 0
            except Exception as error:
                failures += 1
                self.problem = self.problem or _words(error)


def tagged(record: dict) -> dict[str, float]:
    """A record under the names that trackers group by, as transformers gives them.

    >>> tagged({"step": 3, "loss": 1.0, "eval_loss": 2.0})
    {'train/loss': 1.0, 'eval/loss': 2.0}
    """
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in record.items()
        if name != "step"
    }


def tracker_makers(
    names: list[str], directory: Path, run_name: str | None, config: dict[str, Any]
) -> dict[str, Callable[[int], Tracker]]:
    """What makes the trackers that `report_to` names.

    Args:
      names: of trackers, or `path/to/file.py:Class`.
      directory: of the run.
      run_name: in trackers; None: the directory's name.
      config: the run's configuration, to be shown beside it.

    Raises:
      ConfigError: a package is not installed, or a class cannot be made.
    """
    run_name = run_name or directory.resolve().name
    makers = {}
    for name in names:
        if name == "none":
            continue
        if name not in PACKAGES:
            own = make_object(name, "report_to")
            if not callable(getattr(own, "log", None)):
                raise ConfigError(f"report_to {name!r} must have a method log(metrics, step).")
            makers[name] = lambda step, own=own: own
            continue
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ConfigError(
                f"report_to {name} needs the package {PACKAGES[name]}, which is not installed: "
                f'pip install "relax-trainers[{name}]".'
            )
        if name == "tensorboard":
            makers[name] = lambda step: TensorBoard(directory / "events", step)
        else:
            makers[name] = lambda step, name=name: RunTracker(
                name, run_name, config, directory / "events"
            )
    return makers


class TensorBoard:
    """Writes event files, in a directory that TENSORBOARD_LOGGING_DIR may name.

    Args:
      directory: of the files.
      step: what an earlier run wrote after this step is hidden.
    """

    def __init__(self, directory: Path, step: int = 0):
        from tensorboardX import SummaryWriter

        place = os.environ.get("TENSORBOARD_LOGGING_DIR", str(directory))
        self.writer = SummaryWriter(place, purge_step=step + 1 if step else None)

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class RunTracker:
    """Weights & Biases, or trackio, which has the same functions.

    The project is that of WANDB_PROJECT or TRACKIO_PROJECT, else `relax`. Weights & Biases keeps
    its own files in `directory`.
    """

    def __init__(self, package: str, run_name: str, config: dict[str, Any], directory: Path):
        self.package = importlib.import_module(package)
        project = os.environ.get(f"{package.upper()}_PROJECT", "relax")
        options = {}
        if package == "wandb":
            directory.mkdir(parents=True, exist_ok=True)
            options = {"dir": str(directory), "reinit": "finish_previous"}
        self.run = self.package.init(project=project, name=run_name, config=config, **options)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log(metrics, step=step)

    def close(self) -> None:
        self.run.finish()


def _words(error: BaseException) -> str:
    name, lines = type(error).__name__, str(error).splitlines()
    return f"{name}: {lines[0][:200].rstrip('.')}" if lines else name
