"""Evaluation tasks: their options, the model that they get, and how they are made by name."""

from relax.engine.tasks.options import Subject, Task, TaskOptions
from relax.engine.tasks.results import Estimate, TaskResult
from relax.engine.tasks.tasks import make_tasks

__all__ = ["Estimate", "Subject", "Task", "TaskOptions", "TaskResult", "make_tasks"]
