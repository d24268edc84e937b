"""Runs with tools and environments: the clock changes no byte, and a kill none either."""

import jax
import numpy as np
import optax
import pytest
import runs
from grpo_runs import call, make_job, outcome, start
from runs import end_all, finish, flags, killed
from test_data_prepare import byte_tokenizer

from relax.models import Transformer, TransformerConfig
from relax.sampling import SamplingConfig
from relax.trainers import GRPOTrainer, PPOTrainer
from tests import tool_files
from tests.tool_files import TEMPLATES, Napping, add

LETTERS = [chr(c) for c in range(48, 123) if chr(c).isalnum()]
PROMPT = [{"role": "user", "content": "Hi"}]


@pytest.fixture(autouse=True)
def no_child_left():
    yield
    end_all()


@pytest.mark.parametrize("kind", [GRPOTrainer, PPOTrainer])
def test_a_rollout_and_its_update_do_not_depend_on_how_long_the_environment_takes(kind):
    tokenizer = byte_tokenizer(TEMPLATES["hermes"])
    model = Transformer(
        TransformerConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    )
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    trainer = kind(
        model,
        optax.sgd(0.1),
        reward_funcs=[],
        tokenizer=tokenizer,
        tools=[add],
        environment_factory=Napping,
        sampling=SamplingConfig(max_new_tokens=400, stop=tuple(LETTERS), segment=4, slots=4),
        num_generations=3,
        params=params,
        **({"critic_optimizer": optax.sgd(0.1)} if kind is PPOTrainer else {}),
    )
    partner = trainer.partner
    item = {"prompt_ids": [partner.turns.prompt(PROMPT, {})] * 2, "rows": [{"prompt": PROMPT}] * 2}
    state = trainer.create_train_state(jax.random.key(2))
    first, again = (next(iter(trainer.make_batches(state, item))) for _ in range(2))
    partner.runner.close()
    for one, other in zip(*map(jax.tree.leaves, (first.batch, again.batch)), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    assert first.metrics["episodes/mean_turns"] > 1 and first.metrics["tools/call_frequency"] == 0
    for record in first.records:
        roles = [message["role"] for message in record["messages"]]
        assert roles[:3] == ["assistant", "user", "assistant"] and record["turns"] > 1
    _, metrics = trainer.train_step(state, first.batch)
    assert metrics["sampling/logp_difference/max"] < 1e-4 and metrics["skipped_steps"] == 0


@pytest.mark.programs
@pytest.mark.timeout(1200)
def test_a_killed_run_of_episodes_ends_in_the_bytes_of_an_unbroken_one(tmp_path):
    rows = [{"prompt": PROMPT, "answer": str(i)} for i in range(12)]
    made = make_job(tmp_path)
    job = {name: made[name] for name in made if name not in ("reward_funcs", "reward_weights")} | {
        "dataset_name": runs.write_rows(tmp_path / "chats.jsonl", rows),
        "environment_factory": f"{tool_files.__file__}:Napping",
        "stop_sequences": ",".join(LETTERS),
        "max_completion_length": 24,
        "max_steps": 4,
        "save_steps": 2,
    }
    assert call(**job, output_dir=tmp_path / "unbroken") == 0
    expected = outcome(tmp_path / "unbroken")
    arguments = [*flags(**job), f"--output_dir={tmp_path / 'broken'}", "--resume=auto"]
    for fault in ("rollout:1", "after_rename:1"):
        assert killed(start(*arguments, fault=fault)), fault
    finish(*arguments, script=runs.ROOT / "run_grpo.py")
    assert outcome(tmp_path / "broken") == expected
