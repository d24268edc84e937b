"""What one algorithm adds to a job: its data, its trainer, what is said and measured around it."""

import abc
import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from relax.config import TrainerConfig
from relax.data import Rows, profiles
from relax.engine import model_source
from relax.errors import ConfigError
from relax.models import TransformerConfig, save_pretrained
from relax.trainers import Trainer, TrainState


@dataclasses.dataclass(frozen=True)
class Datasets:
    """What a run trains and evaluates on.

    Attributes:
      train: the loader of items to train on.
      eval: the loader to evaluate on, several by name, or None.
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
    # What rows are called, and what they are for, see `relax.data.profiles.apply_profile`.
    what: str = "data"
    kind: profiles.Kind = "completions"
    # Until rows have been looked at, which `auto` does.
    profile: profiles.DataProfile = profiles.load_profile(profiles.DEFAULT)

    def __init__(self, config: TrainerConfig, console: Console):
        self.config, self.console = config, console
        self._evaluations: dict[str, str] = {}  # names of evaluation sets, by how they are shown
        if self.embedded and config.profile.name != profiles.DEFAULT:
            raise ConfigError(
                f"profile {config.profile.name} needs rows of your own: the embedded task is plain "
                "sums. Pass --dataset_name."
            )

    @property
    def training(self) -> str:
        """The name under which what is trained on is shown."""
        return f"training {self.what}"

    def sources(self, given=None) -> dict[str, Rows]:
        """Rows by the name under which they are shown, as the profile has them.

        What is trained on comes first; `given` is as for `datasets`.
        """
        train, evaluation = model_source.source_rows(self.config, given)
        if not isinstance(evaluation, dict):
            evaluation = {} if evaluation is None else {"": evaluation}
        self._evaluations = {
            f"evaluation {self.what}" + f" ({name})" * bool(name): name for name in evaluation
        }
        parts = {self.training: train}
        parts |= zip(self._evaluations, evaluation.values(), strict=True)
        if self.embedded:
            return {name: self.embedded_rows(rows) for name, rows in parts.items()}
        name, base = self.config.profile.name, self.config.profile.system_prompt
        self.profile, note = profiles.resolve_profile(name, train.rows)
        made = {
            name: profiles.apply_profile(self.profile, rows, self.kind, base)
            for name, rows in parts.items()
        }
        self._tell_of_profile(note, made[self.training])
        return made

    def _tell_of_profile(self, note: str | None, rows: Rows) -> None:
        if note is not None:
            self.console.print(note, markup=False)
        for stop, count in profiles.early_stops(rows.rows, self.stop_sequences).items():
            self.console.print(
                f"note: {count} of {len(rows)} answers hold the stop sequence {stop!r} before "
                "their end, where sampled ones end; --stop_sequences sets others",
                style="yellow",
                markup=False,
            )

    def embedded_rows(self, rows):
        """The embedded rows, in the form that the algorithm takes."""
        return rows

    @property
    def system_prompt(self) -> str | None:
        """What rows are to get that the profile has not given them."""
        base = self.config.profile.system_prompt
        return profiles.remaining_system_prompt(self.profile, base)

    @property
    def stop_sequences(self) -> tuple[str, ...]:
        """Texts that end sampled completions."""
        asked = self.config.profile.stop_sequences
        return tuple(self.profile.get_stop_sequences() if asked is None else asked)

    def gathered(self, loaders: dict[str, Any], reports: dict, digest: str) -> Datasets:
        """Data sets from loaders by the names of `sources`."""
        sets = {name: loaders[title] for title, name in self._evaluations.items()}
        evaluation = sets[""] if list(sets) == [""] else sets or None
        return Datasets(loaders[self.training], evaluation, reports, digest)

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
    def reference_is_initial_model(self) -> bool:
        """Whether `state.frozen` holds a reference that can be had again from the model's files."""
        return False

    def make_model(self, *, weights: bool):
        """The model, and its parameters where it has any to begin with and `weights` asks."""
        return model_source.make_model(self.config, weights=weights)

    def save(self, path: Path, model, params, tokenizer, generation_config) -> Path:
        """Writes the trained model, adapters merged, as a Hugging Face directory."""
        return save_pretrained(path, model, params, tokenizer, generation_config=generation_config)

    def complete(self, item):
        """An item of the train loader, with what callbacks would have added to it by then."""
        return item

    def optimizer(self, steps: int):
        """What `trainer` gets as its optimizer, for a run of so many updates."""
        return model_source.make_optimizer(self.config, steps)

    def start(self, trainer: Trainer, params) -> TrainState:
        """The state before the first update; `params` (or None: fresh ones) are taken over."""
        return model_source.make_state(trainer, params, self.config.hyperparams.seed)

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
