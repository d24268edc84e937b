"""What trainers promise reward functions: the state of the run, columns, names, special tokens."""

import datetime
import decimal
import json
import re

import jax
import pytest
from metric_names import NAMES
from rl import TablePPO, TableTrainer, items_of

from relax.callbacks import MetricsLog
from relax.data import read_rows
from relax.errors import DataError
from relax.rewards import RewardRunner
from relax.rewards.batch import metric_name

KEY = jax.random.key(3)


def test_a_reward_function_reads_max_steps_and_epoch_while_a_trainer_trains():
    """Three items an epoch, two epochs: TRL's `trainer_state` at the beginning of each update."""
    seen = []

    def reads(completions, trainer_state, **kwargs):
        state = trainer_state
        seen.append((state.global_step, state.max_steps, round(state.epoch, 6)))
        return [float(len(c)) for c in completions]

    TableTrainer(reward_funcs=[reads]).train(items_of(3), num_epochs=2, key=KEY)
    assert seen == [(step, 6, round(step / 3, 6)) for step in range(6)]


@pytest.mark.parametrize("trainer_class", [TableTrainer, TablePPO])
def test_every_name_that_a_trainer_logs_is_reserved(trainer_class):
    records = []
    log = MetricsLog(None, 1, listeners=(records.append,))
    items = items_of(2)
    trainer_class(callbacks=[log]).train(items, key=KEY, eval_loader=items[:1], eval_steps=1)
    names = {name for record in records for name in record}
    assert {"loss", "reward", "step", "eval_reward"} <= names
    assert {name for name in names if metric_name("f", name) == name} == set()


def test_every_documented_metric_of_a_trainer_with_reward_functions_is_reserved():
    names = [re.sub(r"<\w+>", "x", name) for name in NAMES]
    free = {name for name in names if metric_name("f", name) == name}
    of_sft, of_reward_models = {"exact_match", "nll"}, {"accuracy", "margin"}
    of_reward_models |= {"mean_reward", "min_reward", "max_reward"}
    assert free == of_sft | of_reward_models


VALUES = [
    datetime.datetime(2024, 1, 2, 3, 4),
    datetime.date(2024, 1, 2),
    datetime.timedelta(seconds=1),
    decimal.Decimal("1.5"),
    b"bytes",
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("source", ["python", "parquet"])
def test_a_column_that_a_worker_cannot_be_sent_is_refused_by_name(source, value, tmp_path):
    """As `datasets` gives them; a function that takes no such column is not disturbed."""
    rows = [{"prompt": "1+1=", "answer": "2", "when": value}]
    if source == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
        rows = tmp_path / "rows.parquet"
    found = read_rows(rows).rows
    match = f"row 0: column 'when' holds a {type(value).__name__}: .* Convert the column or leave"
    with RewardRunner(["think_format"]) as runner, pytest.raises(DataError, match=match):
        runner.check_rows(found)
    with RewardRunner(["soft_overlong_punishment"], parameters=OVERLONG) as runner:
        runner.check_rows([{"prompt": "1+1="}])


OVERLONG = {"soft_overlong_punishment": {"max_completion_len": 9, "soft_punish_cache": 2}}


def test_a_pattern_sees_special_tokens_and_a_schema_does_not():
    """The tags are special tokens: the plain text of a completion lacks them."""
    parameters = {"regex_match": {"pattern": "<tool>.*</tool>", "full": True}}
    plain, special = '{"a": 1}', '<tool>{"a": 1}</tool>'
    texts = {"completion_texts": [special], "prompt_texts": ["2+2="]}
    with RewardRunner(["regex_match"], parameters=parameters) as runner:
        assert runner.asks_for_texts
        assert runner.score(["2+2="], [plain], texts=texts).total.tolist() == [1.0]
        assert runner.score(["2+2="], [plain]).total.tolist() == [0.0]
    pytest.importorskip("jsonschema")
    parameters = {"json_schema": {"schema": {"type": "object"}}}
    with RewardRunner(["json_schema"], parameters=parameters) as runner:
        assert not runner.asks_for_texts
        assert runner.score(["2+2="], [plain], texts=texts).total.tolist() == [1.0]
    assert json.loads(plain) == {"a": 1}
