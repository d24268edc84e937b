"""Checksums of a run's rows, which resumed runs and all processes compare: no set is left out."""

import pytest

from relax.config import DPOConfig, GRPOConfig, RewardModelConfig, SFTConfig
from relax.data import profiles, read_rows
from relax.engine.recipes.dpo import read_dpo_data
from relax.engine.recipes.grpo import rollout_sizes
from relax.engine.recipes.pairs import read_pairs
from relax.engine.recipes.rl import read_prompts
from relax.engine.recipes.sft import read_sft_data
from relax.engine.rows import Sources
from relax.models import TransformerConfig
from relax.rewards import RewardRunner

SHAPE = TransformerConfig(
    vocab_size=261,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=64,
)
COMPLETIONS = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1+2=", "completion": "3"}]
PAIRS = [{"prompt": p, "chosen": "2", "rejected": "3"} for p in ("1+1=", "0+2=")]
PROMPTS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2=", "answer": "3"}]


def read(algorithm, rows, evaluation, tokenizer):
    kind = {"sft": "completions", "grpo": "prompts"}.get(algorithm, "preferences")
    profile = profiles.load_profile(profiles.DEFAULT)
    sets = {name: read_rows(part) for name, part in evaluation.items()}
    sources = Sources(kind, read_rows(rows), sets, profile, None, ())
    parts = {"model_config": SHAPE, "sources": sources}
    if algorithm == "sft":
        return read_sft_data(SFTConfig(), tokenizer, **parts)
    if algorithm == "dpo":
        return read_dpo_data(DPOConfig(), tokenizer, **parts)
    if algorithm == "reward":
        return read_pairs(RewardModelConfig(), tokenizer, for_reward_model=True, **parts)
    config = GRPOConfig().replace(max_completion_length=8, num_generations=8)
    with RewardRunner(["exact_match"]) as rewards:
        sizes = rollout_sizes(config)
        return read_prompts(config, tokenizer, rewards=rewards, sizes=sizes, **parts)


CASES = {
    "sft": (COMPLETIONS, {"completion": "4"}),
    "dpo": (PAIRS, {"rejected": "4"}),
    "reward": (PAIRS, {"chosen": "4"}),
    "grpo": (PROMPTS, {"answer": "4"}),  # a column for rewards only
}


@pytest.mark.parametrize("algorithm", CASES)
def test_a_changed_row_of_any_set_changes_the_checksum(algorithm, arithmetic_tokenizer):
    rows, change = CASES[algorithm]

    def digest(train=rows, **evaluation):
        return read(algorithm, train, evaluation, arithmetic_tokenizer).digest

    changed = [rows[0], rows[1] | change]
    found = [
        digest(easy=rows, hard=rows),
        digest(changed, easy=rows, hard=rows),
        digest(easy=changed, hard=rows),
        digest(easy=rows, hard=changed),
        digest(easy=rows),
        digest(easy=rows[:1], hard=[rows[1], *rows]),
    ]
    assert digest(easy=rows, hard=rows) == found[0]
    assert len(set(found)) == len(found)
