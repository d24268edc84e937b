#!/usr/bin/env bash
# Finding: peft says of a `rank_pattern` key for a target parameter that it matched nothing and was
#   ignored, and applies it.
# Packages: peft 0.21.2, transformers 5.24.0, torch 2.13.0
# Guess: a warning that a key "did not match any targeted module and was ignored" means that the
#   parameter has the rank `r`.
# Observed: the warning looks at the names of modules alone. The experts' fused parameter gets the
#   rank of the pattern, whose key matches the parameter's full name.
# Matters: A writer of adapter files who believes the warning removes the key, and the adapter then
#   does not load; a reader who ignores the key expects tensors of another shape.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.24.0 torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys
import warnings

import peft
from transformers import MixtralConfig, MixtralForCausalLM

config = MixtralConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=4,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_local_experts=3,
    num_experts_per_tok=1,
)
lora = peft.LoraConfig(
    r=2,
    target_modules=["q_proj"],
    target_parameters=["mlp.experts.gate_up_proj"],
    rank_pattern={"gate_up_proj": 5},
)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = peft.get_peft_model(MixtralForCausalLM(config), lora)
state = peft.get_peft_model_state_dict(model)
(shape,) = (tuple(t.shape) for name, t in state.items() if "experts.lora_A" in name)
observed = {
    "said to be ignored": any("were ignored: ['gate_up_proj']" in str(w.message) for w in caught),
    "shape of the experts' A": shape,
    "experts times the pattern's rank": 3 * 5,
}
expected = {
    "said to be ignored": True,
    "shape of the experts' A": (15, 8),
    "experts times the pattern's rank": 15,
}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
