"""The page of an algorithm without its run: no files, no processes, no devices."""

from pathlib import Path
from types import SimpleNamespace

import optax
from rl import Letters

from relax.rewards import RewardRunner


class StubRun:
    """What a page asks of a `Run`, so that a test sees the trainer that the page makes."""

    resume_from, keeps_frozen = None, False
    run_dir = SimpleNamespace(path=Path("run"))
    source = SimpleNamespace(end_tokens=lambda tokenizer: (tokenizer.eos_token_id,))
    console = None

    def __init__(self, config, model):
        self.config, self.model = config, model

    def __call__(self, *_, **__):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def load_tokenizer(self):
        return Letters()

    def load_model(self, **_):
        return self.model, {}

    def attempt(self, f, *args):
        return f(*args)

    def load_data(self, *_, **__):
        loader = SimpleNamespace(curriculum=None)
        return SimpleNamespace(train=loader, stop_sequences=(), source_names=())

    def make_optimizer(self, data):
        return optax.sgd(1.0)

    def steps(self, data):
        return 100

    def logging_steps(self, data):
        return 1

    def options(self, *_):
        steps = self.config.hyperparams.gradient_accumulation_steps
        return {"gradient_accumulation_steps": steps, "max_grad_norm": 1.0}

    def train(self, trainer, data, **_):
        return trainer


def trainer_of(page, config, model, monkeypatch):
    """The trainer that a page makes of a configuration."""
    module = page.__module__
    rewards = RewardRunner([lambda completions: [0.0] * len(completions)])
    monkeypatch.setattr(f"{module}.Run", StubRun(config, model))
    monkeypatch.setattr("relax.engine.recipes.rl.load_rewards", lambda *_: rewards)
    return page(config)
