"""The configuration of a run: dataclasses, files and the strict command line. Imports no jax."""

from relax.config.distill import DistillConfig
from relax.config.dpo import DPOConfig
from relax.config.grpo import GRPOConfig
from relax.config.loader import ConfigLoader, create_default_config, from_dict
from relax.config.online_dpo import OnlineDPOConfig
from relax.config.options import option, options, resolve_steps, section
from relax.config.ppo import PPOConfig
from relax.config.reward import RewardModelConfig
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
    SystemConfig,
    TrainerConfig,
    diff,
)
from relax.config.sft import SFTConfig, SFTSection

__all__ = [
    "ConfigLoader",
    "DPOConfig",
    "DataConfig",
    "DebugConfig",
    "DistillConfig",
    "GRPOConfig",
    "Hyperparams",
    "InferenceConfig",
    "ModelConfig",
    "OnlineDPOConfig",
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
