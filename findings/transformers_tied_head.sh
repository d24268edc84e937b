#!/usr/bin/env bash
# Finding: A checkpoint with `tie_word_embeddings: true` and an `lm_head.weight` of other values
#   loads untied.
# Packages: transformers 5.24.0, torch 2.13.0
# Guess: The config decides: one matrix, and the other tensor of the file is dropped or refused.
# Observed: transformers 5 compares the two tensors, keeps both when they differ, and only logs
#   a warning. The config still says tied, so a reader that follows the config computes other
#   logits.
# Matters: Adapters merged into one of two tied matrices, or a head that another trainer untied,
#   give a model whose meaning depends on the reader.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PROGRAM'
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    tie_word_embeddings=True,
)
LlamaForCausalLM(config).save_pretrained(".")
tensors = load_file("model.safetensors")
was_saved = "lm_head.weight" in tensors
tensors["lm_head.weight"] = 2 * tensors["model.embed_tokens.weight"]
save_file(tensors, "model.safetensors", metadata={"format": "pt"})
model = LlamaForCausalLM.from_pretrained(".")
observed = {
    "lm_head saved for a tied model": was_saved,
    "tie_word_embeddings": model.config.tie_word_embeddings,
    "head is the file's": torch.equal(model.lm_head.weight, tensors["lm_head.weight"]),
    "one matrix": model.lm_head.weight is model.model.embed_tokens.weight,
}
expected = {
    "lm_head saved for a tied model": False,
    "tie_word_embeddings": True,
    "head is the file's": True,
    "one matrix": False,
}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
