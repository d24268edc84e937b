"""The configuration of a run: dataclasses, files and the strict command line. Imports no jax."""

from relax.config.dpo import DPOConfig
from relax.config.loader import ConfigLoader, create_default_config, from_dict
from relax.config.options import option, options, resolve_steps, section
from relax.config.ppo import PPOConfig
from relax.config.reward import RewardModelConfig
from relax.config.rl import GRPOConfig
from relax.config.schema import (
    DataConfig,
    DebugConfig,
    Hyperparams,
    InferenceConfig,
    LimitsConfig,
    ModelConfig,
    OutputConfig,
    ProfileConfig,
    RowsConfig,
    SFTConfig,
    SFTSection,
    SystemConfig,
    TrainerConfig,
    diff,
)

__all__ = [
    "ConfigLoader",
    "DPOConfig",
    "DataConfig",
    "DebugConfig",
    "GRPOConfig",
    "Hyperparams",
    "InferenceConfig",
    "ModelConfig",
    "OutputConfig",
    "PPOConfig",
    "ProfileConfig",
    "RewardModelConfig",
    "LimitsConfig",
    "RowsConfig",
    "SFTConfig",
    "SFTSection",
    "SystemConfig",
    "TrainerConfig",
    "create_default_config",
    "diff",
    "from_dict",
    "option",
    "options",
    "resolve_steps",
    "section",
]
