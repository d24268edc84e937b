"""Profiles: prompt formats, answer formats and stop sequences. Imports no jax."""

from relax.data.profiles.apply import Kind, apply_profile, early_stops, remaining_system_prompt
from relax.data.profiles.auto import choose_profile, resolve_profile
from relax.data.profiles.base import DataProfile, Rewriting, messages_of
from relax.data.profiles.combined import CombinedProfile
from relax.data.profiles.registry import (
    AUTO,
    DEFAULT,
    PROFILES,
    get_profile,
    load_profile,
    profile_problem,
    register_profile,
)

__all__ = [
    "AUTO",
    "DEFAULT",
    "PROFILES",
    "CombinedProfile",
    "DataProfile",
    "Kind",
    "Rewriting",
    "apply_profile",
    "choose_profile",
    "early_stops",
    "get_profile",
    "load_profile",
    "messages_of",
    "profile_problem",
    "register_profile",
    "remaining_system_prompt",
    "resolve_profile",
]
