#!/usr/bin/env bash
# Finding: An adapter with overlapping keys in `alpha_pattern` is saved with its keys sorted,
#   and since the first key that matches counts, it loads with another scale.
# Packages: peft 0.21.2, transformers 5.24.0, torch 2.13.0
# Guess: A pattern that says 8 for every q_proj comes back from disk as it was trained.
# Observed: The first key that matches a module decides. `save_pretrained` writes the JSON with
#   sorted keys, so `layers.0...` comes before `self_attn...`: layer 0 was trained with scale 4
#   and loads with scale 8, without a word. With `rank_pattern` the same order makes loading
#   fail on shapes.
# Matters: The evaluated adapter is not the trained one. Write patterns that no two keys share,
#   and compare logits after a reload.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.24.0 torch==2.13.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PROGRAM'
import sys
import tempfile

import peft
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
)
lora = peft.LoraConfig(
    r=2,
    lora_alpha=2,
    target_modules=["q_proj"],
    alpha_pattern={"self_attn.q_proj": 8, "layers.0.self_attn.q_proj": 16},
)


def scales(model):
    layers = model.base_model.model.model.layers
    return [layer.self_attn.q_proj.scaling["default"] for layer in layers]


trained = peft.get_peft_model(LlamaForCausalLM(config), lora)
directory = tempfile.mkdtemp(dir=".")
trained.save_pretrained(directory)
loaded = peft.PeftModel.from_pretrained(LlamaForCausalLM(config), directory)
observed = {"scales in training": scales(trained), "scales after a reload": scales(loaded)}
expected = {"scales in training": [4.0, 4.0], "scales after a reload": [8.0, 4.0]}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
