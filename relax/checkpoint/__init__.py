"""Checkpoints: written atomically, restored bit for bit."""

from relax.checkpoint.checkpointer import Checkpointer, restore_checkpoint

__all__ = ["Checkpointer", "restore_checkpoint"]
