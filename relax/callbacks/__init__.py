"""Callbacks, whose hooks a trainer calls. Derive your own from `Callback`."""

from relax.callbacks.guards import NonFiniteGuard
from relax.callbacks.metrics import MetricsLog
from relax.callbacks.previews import Previews
from relax.callbacks.profiler import Profiler
from relax.callbacks.progress import Progress
from relax.callbacks.report import Report
from relax.callbacks.status import Status
from relax.callbacks.stopping import BestCheckpoint, EarlyStopping
from relax.callbacks.trackers import Trackers
from relax.callbacks.warnings import LearningMonitor
from relax.monitor.status import TrainingStatusWriter
from relax.trainers.callback import Callback, Event, StopTraining

__all__ = [
    "BestCheckpoint",
    "Callback",
    "EarlyStopping",
    "Event",
    "LearningMonitor",
    "MetricsLog",
    "NonFiniteGuard",
    "Previews",
    "Profiler",
    "Progress",
    "Report",
    "Status",
    "StopTraining",
    "Trackers",
    "TrainingStatusWriter",
]
