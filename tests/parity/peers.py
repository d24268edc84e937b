"""Tiny models and bare trainers of the peers."""

import functools
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from golden.trl_cases import write_tiny_llama


@functools.cache
def tiny_directory() -> Path:
    """A Hugging Face directory with two Llama layers of random weights, and a tokenizer."""
    return write_tiny_llama(Path(tempfile.mkdtemp(prefix="relax-parity-")))


def tiny_model():
    """transformers' model of that directory, in float32, new on each call."""
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_directory(), dtype=torch.float32)


def bare(cls, **attributes):
    """A stand-in for `self` in methods of a trainer that need no trainer.

    It has the class's other methods, and attributes that each trainer has on one process.
    """

    class Bare(cls):
        def __init__(self):
            pass

    trainer = Bare()
    trainer.__dict__ |= {
        "accelerator": Accelerator(),
        "model": SimpleNamespace(training=True),
        "_metrics": {"train": Recorder(), "eval": Recorder()},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "aux_loss_enabled": False,
    }
    trainer.__dict__ |= attributes
    return trainer


class Recorder(dict):
    """A dict of lists."""

    def __missing__(self, key):
        return self.setdefault(key, [])


class Accelerator:
    """What trainers ask of accelerate's, for one process."""

    device = torch.device("cpu")
    num_processes = 1
    process_index = 0
    is_main_process = True
    sync_gradients = True

    def gather(self, values):
        return values

    gather_for_metrics = gather

    def pad_across_processes(self, values, dim=0, pad_index=0):
        return values

    def reduce(self, values, reduction="sum"):
        return values

    def unwrap_model(self, model):
        return model
