"""What a person sees of a reinforcement-learning run: completions, plain warnings, counts."""

import io
import json
import math

import jax
import pytest
from rich.console import Console
from rl import TableTrainer, items_of

from relax.callbacks.completions import Completions, RewardCounters, table
from relax.callbacks.warnings import LearningMonitor
from relax.rewards import RewardRunner
from relax.trainers.callback import Event

KEY = jax.random.key(3)


def screen(width=200) -> Console:
    return Console(file=io.StringIO(), width=width, highlight=False)


def shown(console: Console) -> str:
    return console.file.getvalue()


RECORD = {
    "prompt": [{"role": "user", "content": "1+1="}],
    "completion": "[bold]2[/bold]",
    "finish": "eos",
    "tokens": 3,
    "rewards": {"right": 1.0, "short": math.nan},
    "reward": 0.7,
    "advantage": -0.123,
}


def test_a_table_shows_prompt_completion_each_reward_and_the_advantage():
    console = screen()
    console.print(table([RECORD], "step 3"))
    said = shown(console)
    for text in ("step 3", "Prompt", "Completion", "right", "short", "Advantage", "1+1=", "1.00",
                 "-0.12", "[bold]2[/bold]"):  # fmt: skip
        assert text in said
    assert "nan" not in said


def test_a_table_has_the_columns_that_reward_functions_logged():
    console = screen()
    logged = {"[i]gold[/i]": "[b]4[/b]\x1b[2J", "ratio": 0.123456, "why": None}
    console.print(table([RECORD | logged, RECORD], "step 3"))
    header = next(line for line in shown(console).splitlines() if "Prompt" in line)
    assert header.index("short") < header.index("[i]gold[/i]") < header.index("Advantage")
    assert "[b]4[/b]\ufffd[2J" in shown(console) and " 0.1235 " in shown(console)


def train(callback, count=4, **options):
    trainer = TableTrainer(callbacks=[callback], **options)
    trainer.train(items_of(count), key=KEY)
    return trainer


@pytest.mark.parametrize(
    "options, every, files",
    [
        ({}, 2, [2, 4]),
        ({"num_iterations": 3}, 2, [1, 4, 7, 10]),  # a multiple of 2 is among 1 2 3, 4 5 6, ...
        ({"num_iterations": 3}, 5, [4, 10]),  # 5 and 10, and the run's 12 updates hold no 15
    ],
)
def test_rollouts_are_kept_whose_updates_hold_a_multiple(tmp_path, options, every, files):
    train(Completions(tmp_path / "c", every, screen()), **options)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        f"step_{step:06d}.jsonl" for step in files
    ]


def test_a_line_of_the_file_is_a_completion_and_everything_about_it(tmp_path):
    def sometimes(completions, log_extra):
        log_extra("first", [c[:1] for c in completions])
        log_extra("reward", ["gold"] * len(completions))  # is the name of a column already
        return [None] + [1.0] * (len(completions) - 1)

    def always(completions):
        return [2.0] * len(completions)

    console = screen()
    train(
        Completions(tmp_path, 1, console, shown=3), 1, reward_funcs=[sometimes, always],
        reward_weights=[1.0, 0.5],
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "step_000001.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    first, second = lines[:2]
    assert first["rewards"] == {"sometimes": None, "always": 2.0} and first["reward"] == 1.0
    assert second["rewards"] == {"sometimes": 1.0, "always": 2.0} and second["reward"] == 2.0
    assert first["prompt"] == "00" and lines[4]["prompt"] == "01"
    # 1, 2, 2, 2: the mean is 1.75, the standard deviation 0.5.
    assert first["advantage"] == pytest.approx(-0.75 / 0.5001, rel=1e-5)
    assert first["tokens"] >= len(first["completion"]) and first["finish"] in ("eos", "length")
    assert first["first"] == first["completion"][:1] and first["logged_reward"] == "gold"
    said = shown(console)
    assert said.count("step 1") == 1 and "sometimes" in said and "-1.50" in said
    assert "first" in said and "logged_reward" in said


# Warnings.

FINE = {
    "step": 1, "grad_norm": 1.0, "frac_reward_zero_std": 0.2, "reward": 0.5,
    "completions/clipped_ratio": 0.1, "entropy": 1.0, "kl": 0.1,
}  # fmt: skip
SYMPTOMS = {
    "96% of the groups have equal rewards (mean 0.50)": {"frac_reward_zero_std": 0.96},
    "60% of the completions are truncated at max_completion_length": {
        "completions/clipped_ratio": 0.6
    },
    "the entropy fell from 1.00 to 0.05 nats": {"entropy": 0.05, "frac_reward_zero_std": 0.6},
    "KL to the reference model is 12.0 nats per token": {"kl": 12.0},
}


@pytest.mark.parametrize("text", SYMPTOMS)
def test_a_symptom_that_lasts_is_told_once(text):
    said = []
    monitor = LearningMonitor(said.append)
    for record in [FINE, FINE | SYMPTOMS[text], FINE, *[FINE | SYMPTOMS[text]] * 2]:
        monitor.show(record)
    assert said == []
    for _ in range(3):
        monitor.show(FINE | SYMPTOMS[text])
    [warning] = said
    assert text in warning


def test_no_reward_at_all_is_told_and_evaluations_are_not_looked_at():
    said = []
    monitor = LearningMonitor(said.append)
    unrewarded = {n: v for n, v in FINE.items() if n != "reward"} | {"frac_reward_zero_std": 1.0}
    for _ in range(3):
        monitor.show({"eval_reward": 0.0})
        monitor.show(unrewarded)
    [warning] = said
    assert "100% of the groups have equal rewards (mean none)" in warning


def test_warnings_go_on_from_a_checkpoint():
    bad = FINE | {"completions/clipped_ratio": 0.9}
    before = LearningMonitor(lambda text: None)
    for _ in range(2):
        before.show(bad)
    said = []
    after = LearningMonitor(said.append)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    after.on_train_begin(Event(None, None, 20))
    after.show(bad)
    assert len(said) == 1
    after.on_train_begin(Event(None, None, 0))  # a run from its beginning
    assert after.state_dict() == LearningMonitor(print).state_dict()


def test_counts_of_failures_go_on_from_a_checkpoint():
    def fails(completions):
        return [float("inf")] * len(completions)

    runner = RewardRunner([fails], max_errors=1.0)
    assert len(runner.score(["p"], ["c"]).failures) == 1
    state = json.loads(json.dumps(RewardCounters(runner).state_dict()))
    other = RewardRunner([fails], max_errors=1.0)
    RewardCounters(other).load_state_dict(state)
    other.score(["p"], ["c"])
    assert other.tally.failed["fails"] == 2 and other.tally.scored["fails"] == 2
