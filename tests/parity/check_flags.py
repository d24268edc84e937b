"""Options and their defaults: the fields of TRL's configurations that ReLax has or lacks."""

import dataclasses

import pytest
import trl

from relax.config import DPOConfig, GRPOConfig, RewardModelConfig, SFTConfig, options
from relax.config.foreign import advice
from relax.config.names import ALIASES

SECTION = "Flags"
CONFIGS = {
    "SFT": (trl.SFTConfig, SFTConfig),
    "DPO": (trl.DPOConfig, DPOConfig),
    "KTO": (trl.KTOConfig, DPOConfig),
    "reward models": (trl.RewardConfig, RewardModelConfig),
    "GRPO": (trl.GRPOConfig, GRPOConfig),
    "RLOO": (trl.RLOOConfig, GRPOConfig),
    "models": (trl.ModelConfig, SFTConfig),
    "data sets": (trl.ScriptArguments, SFTConfig),
}
RLOO = "RLOO is GRPO with `--scale_rewards rloo`, and has GRPO's defaults."
WHY = {
    "output_dir": "ReLax has a folder per algorithm.",
    "optim": "The same optimizer under optax's name.",
    "shuffle_dataset": "Both shuffle rows in each epoch; in TRL the sampler does, and this flag "
    "shuffles them once more before that.",
    "pad_to_multiple_of": "ReLax pads to one of a few lengths, for each of which the step is "
    "compiled.",
    "num_completions_to_print": "ReLax prints 8 completions, TRL all of them.",
    "loss_type": "KTO is a `--loss_type` of DPO.",
    "num_generations": RLOO,
    "beta": RLOO,
    "attn_implementation": "ReLax takes the fastest implementation that the device has.",
    "lora_target_modules": "All linear layers of the blocks; in TRL peft's choice for the family.",
}
OFF = (None, "none", [], {}, 0, 0.0, "")  # equivalents of an option that is not set


def default(field):
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


@pytest.mark.parametrize("name", CONFIGS)
def check_defaults(parity, name):
    theirs, ours = CONFIGS[name]
    known = options(ours)
    ours_equal, theirs_equal = {}, {}
    for field in dataclasses.fields(theirs):
        if field.name not in known:
            continue
        mine, other = known[field.name].default, default(field)
        compared = [None if value in OFF else value for value in (mine, other)]
        if field.name not in WHY or compared[0] == compared[1]:
            ours_equal[field.name], theirs_equal[field.name] = compared
            continue
        both = f"{name}: `{mine}`, in TRL `{other}`".replace("`['", "`").replace("']`", "`")
        what, why = f"default of `--{field.name}`", WHY[field.name]
        parity.departs(what, "trl", both, repr(mine), repr(other), why)
    found = f"{len(ours_equal)} options with equal names and defaults"
    parity.equal(f"{name}: `{theirs.__name__}`", "trl", found, ours_equal, theirs_equal)


def check_what_is_not_there(parity):
    """A field with neither an option nor advice would be listed without a reason."""
    missing = {}
    for theirs, ours in CONFIGS.values():
        known = options(ours)
        for name in (field.name for field in dataclasses.fields(theirs)):
            if name not in known and name not in ALIASES:
                missing[name] = missing.get(name) or advice(name, known) or ""
    everywhere = {name for _, ours in CONFIGS.values() for name in options(ours)}
    for name, why in sorted(missing.items()):
        if name not in everywhere:
            parity.missing(f"`--{name}`", "trl", why)
