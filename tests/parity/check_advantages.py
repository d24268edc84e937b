"""Advantages of groups, against what TRL's GRPO and RLOO trainers compute from given rewards."""

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peers import bare, tiny_model
from trl import GRPOTrainer, RLOOTrainer

from relax.losses import ADVANTAGES, gdpo_advantages

SECTION = "Advantages"
P, G, F = 3, 4, 2  # prompts, completions of each, reward functions
RNG = np.random.default_rng(6)
REWARDS = RNG.normal(size=(P * G, F))
WEIGHTS = [1.0, 0.5]
MODEL = tiny_model()
NONE = REWARDS.copy()
NONE[[1, 2, 6], 0] = np.nan  # one function gives None
NONE[[4, 8, 9, 10], :] = np.nan  # all do; only one of the last group has a reward
CASES = {
    "rewards": REWARDS,
    "rewards, some None": NONE,
    "rewards of 0 and 1": (REWARDS > 0).astype(float),
}


def theirs(cls, rewards, scale="group", aggregation="sum_then_normalize", **settings):
    rewards = torch.tensor(rewards, dtype=torch.float32)
    completions = [[5, 6, 2]] * len(rewards)
    ids, texts = ([[3, 4]] * len(rewards), completions), [""] * len(rewards)
    generated = (*ids, None, texts, None, {}, None, None) if cls is GRPOTrainer else (*ids, texts)
    logs = {"prompt": [], "completion": [], "advantages": [], "rewards": defaultdict(list)}
    logs |= {"extra": defaultdict(list), "images": []}
    arguments = {"steps_per_generation": 1, "gradient_accumulation_steps": 1}
    arguments |= {"per_device_train_batch_size": 8, "gradient_checkpointing_kwargs": None}
    zeros = torch.zeros(len(rewards), 3)
    trainer = bare(
        cls,
        args=SimpleNamespace(**arguments),
        model=MODEL.train(),
        environment_factories=None,
        environments=None,
        tools=None,
        _tokenizer=SimpleNamespace(pad_token_id=0),
        eos_token_ids=[2],
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        num_iterations=1,
        use_vllm=False,
        beta=0.0,
        num_generations=G,
        multi_objective_aggregation=aggregation,
        reward_weights=torch.tensor(WEIGHTS),
        reward_clip_range=None,
        normalize_advantages=False,
        scale_rewards=scale,
        reward_funcs=[None] * F,
        reward_func_names=["one", "two"],
        log_multimodal=False,
        _logs=logs,
        _pending_extra_logs={},
        _pending_metrics={},
        _generate=lambda prompts: generated,
        _calculate_rewards=lambda *args: rewards,
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (zeros, None, None),
        **settings,
    )
    rows = [{"prompt": "x"}] * len(rewards)
    return trainer._generate_and_score_completions(rows)["advantages"].numpy()


def weighted(rewards):
    total = np.nansum(rewards * WEIGHTS, axis=1)
    return np.where(np.isnan(rewards).all(axis=1), np.nan, total).reshape(-1, G)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def check_grpo(parity, scale, name):
    mine = ADVANTAGES[scale](weighted(CASES[name])).reshape(-1)
    other = theirs(GRPOTrainer, CASES[name], scale)
    parity.equal(f"`scale_rewards` {scale}", "trl", name, mine, other, tolerance=1e-5)


@pytest.mark.parametrize("name", CASES)
def check_rloo(parity, name):
    mine = ADVANTAGES["rloo"](weighted(CASES[name])).reshape(-1)
    other = theirs(RLOOTrainer, CASES[name])
    parity.equal("`scale_rewards` rloo (RLOO)", "trl", name, mine, other, tolerance=1e-5)


@pytest.mark.parametrize("name", CASES)
def check_rewards_normalised_before_their_sum(parity, name):
    rewards = np.asarray(CASES[name], np.float64)
    mine = gdpo_advantages(rewards.reshape(-1, G, F), np.array(WEIGHTS)).reshape(-1)
    other = theirs(GRPOTrainer, CASES[name], aggregation="normalize_then_sum")
    subject = "`--multi_objective_aggregation normalize_then_sum`"
    parity.equal(subject, "trl", name, mine, other, tolerance=1e-5)


def check_equal_rewards(parity):
    rewards = np.zeros((2 * G, F))
    rewards[:, 0] = [1234.567] * G + [0.1] * G
    mine = ADVANTAGES["group"](weighted(rewards)).reshape(-1)
    assert not mine.any()
    parity.equal("equal rewards of a group", "trl", "0", mine, theirs(GRPOTrainer, rewards))


def check_close_rewards(parity):
    rewards = np.zeros((G, F))
    rewards[:, 0] = 1e7 + np.array([0.25, 0.5, 0.75, 1.0])
    parity.departs(
        "rewards of 1e7 + 0.25, 0.5, 0.75, 1",
        "trl",
        "advantages",
        ADVANTAGES["group"](weighted(rewards)).reshape(-1),
        theirs(GRPOTrainer, rewards),
        "ReLax computes them on the host, in float64; TRL in float32, where these rewards are "
        "two numbers.",
    )


def check_what_is_not_there(parity):
    parity.missing("RLOO, `--normalize_advantages`", "trl", "`--scale_rewards`")
    parity.missing("RLOO, `--reward_clip_range`", "trl", "clip the reward in its function")
