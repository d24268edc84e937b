"""What composes with a trainer. A user's own callbacks derive from `Callback`."""

from relax.callbacks.metrics import MetricsLog
from relax.callbacks.progress import Progress
from relax.trainers.callback import Callback, Event, StopTraining

__all__ = ["Callback", "Event", "MetricsLog", "Progress", "StopTraining"]
