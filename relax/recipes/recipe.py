"""What one algorithm adds to a job: its data, its trainer, what is said and measured around it."""

import abc
import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from relax import assemble
from relax.config import TrainerConfig
from relax.models import TransformerConfig, save_pretrained
from relax.trainers import Trainer, TrainState


@dataclasses.dataclass(frozen=True)
class Datasets:
    """What a run trains and evaluates on.

    Attributes:
      train: the loader of items to train on.
      eval: the loader to evaluate on, or None.
      reports: by the name under which each is shown; they have `to_dict()`.
      digest: of all that is trained on: a resumed run must find the same.
    """

    train: Any
    eval: Any
    reports: dict[str, Any]
    digest: str


class Recipe(abc.ABC):
    """Base of the recipes. One serves one job.

    Args:
      config: of the job.
      console: where the job speaks.
    """

    # Metrics of the summary, in this order, where there are any.
    headline: tuple[str, ...] = ("eval_loss",)

    def __init__(self, config: TrainerConfig, console: Console):
        self.config, self.console = config, console

    @abc.abstractmethod
    def datasets(self, tokenizer, shape: TransformerConfig, rows=None) -> Datasets:
        """Reads, tokenises and batches everything before anything is compiled.

        `rows` are rows to train on and rows to evaluate on (or None), in place of the named ones.
        """

    @abc.abstractmethod
    def trainer(self, model, tokenizer, optimizer, callbacks: tuple) -> Trainer:
        """The trainer, with the configuration's options."""

    @abc.abstractmethod
    def show_data(self, datasets: Datasets) -> None:
        """Prints what became of the rows."""

    @property
    def updates_per_item(self) -> int:
        """Updates per item of the train loader."""
        return 1

    @property
    def plan(self) -> str:
        """What an update consists of."""
        h = self.config.hyperparams
        rows = h.per_device_train_batch_size * h.gradient_accumulation_steps
        return f"{rows} rows ({h.per_device_train_batch_size} x {h.gradient_accumulation_steps})"

    @property
    def embedded(self) -> bool:
        """Whether the run is on the embedded task."""
        return self.config.data.dataset_name is None

    @property
    def has_constant_reference(self) -> bool:
        """Whether `state.frozen` holds a reference that can be had again from the model's files."""
        return False

    def make_model(self, *, weights: bool):
        """The model, and its parameters where it has any to begin with and `weights` asks."""
        return assemble.make_model(self.config, weights=weights)

    def save(self, path: Path, model, params, tokenizer, generation_config) -> Path:
        """Writes the trained model, adapters merged, as a Hugging Face directory."""
        return save_pretrained(path, model, params, tokenizer, generation_config=generation_config)

    def fresh_params(self, model, tokenizer):
        """Parameters to begin from where no model is named; None: those that the key makes."""
        return None

    def callbacks(self, run_dir, logging_steps: int) -> tuple:
        """Callbacks beside those of every job."""
        return ()

    def examine(self, when: str, trainer, state: TrainState, datasets: Datasets) -> dict:
        """Metrics of the embedded task, taken `before` and `after` training."""
        return {}

    def close(self) -> None:  # noqa: B027
        """Gives back what the recipe holds, however the job ends."""
