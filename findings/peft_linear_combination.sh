#!/usr/bin/env bash
# Finding: `add_weighted_adapter(..., combination_type="linear")` does not give the linear
#   combination of two adapters' weight changes.
# Packages: peft 0.21.2, transformers 5.24.0, torch 2.13.0
# Guess: Weights 0.5 and 0.5 give half of one change plus half of the other, as averaging two
#   fine-tuned models would.
# Observed: The factors A and B are averaged apart with the square roots of the weights, so the
#   product holds cross terms between the two adapters. `cat` (and `svd` of sufficient rank)
#   gives the true combination.
# Matters: A merged checkpoint differs from the average of its parents by as much as their own
#   changes are large; merging two good adapters this way can spoil both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.24.0 torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
)
lora = dict(r=2, lora_alpha=2, target_modules=["q_proj"], init_lora_weights=False)
model = peft.get_peft_model(LlamaForCausalLM(config), peft.LoraConfig(**lora), adapter_name="a")
model.add_adapter("b", peft.LoraConfig(**lora))
layer = model.base_model.model.model.layers[0].self_attn.q_proj
average = 0.5 * layer.get_delta_weight("a") + 0.5 * layer.get_delta_weight("b")
errors = {}
for kind in ("linear", "cat"):
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], kind, combination_type=kind)
    errors[kind] = ((layer.get_delta_weight(kind) - average).norm() / average.norm()).item()
print("relative error of the combination:", errors)
observed = {"linear is the average": errors["linear"] < 0.1, "cat is": errors["cat"] < 1e-5}
expected = {"linear is the average": False, "cat is": True}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
