"""The algorithms, one file each, and their common `Trainer`."""

from relax.trainers.callback import Callback, Event, StopTraining
from relax.trainers.distillation_trainer import DistillationTrainer, Teacher
from relax.trainers.dpo_trainer import DPOTrainer
from relax.trainers.grpo_trainer import GRPOTrainer
from relax.trainers.items import OrderedLoader
from relax.trainers.online_dpo_trainer import OnlineDPOTrainer
from relax.trainers.ppo_trainer import PPOTrainer
from relax.trainers.reward_trainer import RewardTrainer
from relax.trainers.rl_trainer import RLTrainer
from relax.trainers.sft_trainer import SFTTrainer
from relax.trainers.trainer import LoggedBatch, Trainer, TrainState
from relax.trainers.update import LossOutput, Max, Mean, Min, Sum

__all__ = [
    "LoggedBatch",
    "Callback",
    "DPOTrainer",
    "DistillationTrainer",
    "Event",
    "GRPOTrainer",
    "LossOutput",
    "Max",
    "Mean",
    "Min",
    "OnlineDPOTrainer",
    "OrderedLoader",
    "PPOTrainer",
    "RLTrainer",
    "RewardTrainer",
    "SFTTrainer",
    "StopTraining",
    "Sum",
    "Teacher",
    "TrainState",
    "Trainer",
]
