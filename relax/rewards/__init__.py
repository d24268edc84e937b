"""Rewards: the protocol, the built-in functions, and the killable workers that run them."""

from relax.rewards.answers import get_exact_match, get_last_number_match
from relax.rewards.batch import RewardBatch, RewardFailure, weighted_total
from relax.rewards.environment import Environment, Observation, TextEnvironment
from relax.rewards.episode_runner import EpisodeRunner
from relax.rewards.lengths import get_repetition_penalty_reward, get_soft_overlong_punishment
from relax.rewards.loading import (
    SHIPPED,
    load_environment,
    load_reward,
    load_tool,
    reward_factory,
)
from relax.rewards.mathematics import (
    accuracy_reward,
    get_cosine_scaled_reward,
    reasoning_accuracy_reward,
)
from relax.rewards.protocol import collect_columns
from relax.rewards.runner import PendingRewards, RewardRunner
from relax.rewards.structure import get_json_schema, get_regex_match, think_format_reward
from relax.rewards.tasks import reasoning_gym

__all__ = [
    "SHIPPED",
    "Environment",
    "EpisodeRunner",
    "Observation",
    "PendingRewards",
    "RewardBatch",
    "RewardFailure",
    "RewardRunner",
    "TextEnvironment",
    "accuracy_reward",
    "collect_columns",
    "get_cosine_scaled_reward",
    "get_exact_match",
    "get_json_schema",
    "get_last_number_match",
    "get_regex_match",
    "get_repetition_penalty_reward",
    "get_soft_overlong_punishment",
    "load_environment",
    "load_reward",
    "load_tool",
    "reasoning_accuracy_reward",
    "reasoning_gym",
    "reward_factory",
    "think_format_reward",
    "weighted_total",
]
