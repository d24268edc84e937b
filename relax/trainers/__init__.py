"""The algorithms, one readable file each, and the trainer they stand on."""

from relax.trainers.callback import Callback, Event, StopTraining
from relax.trainers.sft_trainer import SFTTrainer
from relax.trainers.trainer import OrderedLoader, Trainer, TrainState
from relax.trainers.update import LossOutput, Mean, Sum

__all__ = [
    "Callback",
    "Event",
    "LossOutput",
    "Mean",
    "OrderedLoader",
    "SFTTrainer",
    "StopTraining",
    "Sum",
    "TrainState",
    "Trainer",
]
