#!/usr/bin/env bash
# Finding: On a Qwen3-MoE that also has a dense layer, `target_modules` of the MLP's projections
#   adapts the experts only; the dense layer gets no adapter.
# Packages: peft 0.21.2, transformers 5.24.0, torch 2.13.0
# Guess: `gate_proj`, `up_proj` and `down_proj` adapt every module of these names, so at least
#   the dense MLP, whose modules bear exactly these names.
# Observed: peft takes the names for those of the experts, which transformers 5 holds as fused
#   tensors, rewrites them to `target_parameters` and empties `target_modules`: the three linear
#   layers of the dense MLP stay frozen, without a warning.
# Matters: Fewer weights are trained than asked for, and an adapter trained elsewhere on the
#   dense layer does not load where it belongs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.24.0 torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

import peft
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

config = Qwen3MoeConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=8,
    moe_intermediate_size=4,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    num_experts=2,
    num_experts_per_tok=1,
    mlp_only_layers=[0],
)
base = Qwen3MoeForCausalLM(config)
dense = [name for name, _ in base.named_modules() if name.startswith("model.layers.0.mlp.")]
lora = peft.LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"])
model = peft.get_peft_model(base, lora)
adapted = [name for name, _ in model.named_parameters() if "lora_A" in name]
used = model.peft_config["default"]
observed = {
    "linear layers of the dense MLP": sum(name.endswith("_proj") for name in dense),
    "adapters there": sum(".layers.0.mlp." in name for name in adapted),
    "adapters at the experts": sum(".layers.1.mlp.experts." in name for name in adapted),
    "target_modules": sorted(used.target_modules),
    "target_parameters": sorted(used.target_parameters),
}
expected = {
    "linear layers of the dense MLP": 3,
    "adapters there": 0,
    "adapters at the experts": 2,
    "target_modules": [],
    "target_parameters": ["down_proj", "gate_up_proj"],
}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
