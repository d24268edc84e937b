#!/usr/bin/env bash
# Finding: transformers 5.24 gives a left-padded text another output than the text alone where an
#   LFM2 model has `conv_bias`.
# Packages: transformers 5.24.0, torch 2.13.0
# Guess: With an attention mask, padding in front of a text does not change its logits.
# Observed: Padding is set to 0 before `in_proj`, whose bias makes something of it again, which the
#   convolution carries into the first tokens. Without biases the logits are equal.
# Matters: Batched generation of such a model depends on the longest prompt of the batch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PROGRAM'
import sys

import torch
from transformers import Lfm2Config, Lfm2ForCausalLM


def difference(conv_bias):
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        conv_bias=conv_bias,
        initializer_range=0.2,
    )
    model = Lfm2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
        text = torch.arange(1, 8)[None]
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), text], dim=1)
        mask = (padded > 0).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(padded, attention_mask=mask, position_ids=positions, use_cache=False)
        return (out.logits[:, 3:] - model(text, use_cache=False).logits).abs().max().item()


without, with_bias = difference(False), difference(True)
print(f"largest difference of logits: {without:.0e} without conv_bias, {with_bias:.0e} with it")
expected = without < 1e-4 and with_bias > 1e-2
sys.exit(0 if expected else "the behaviour has changed")
PROGRAM
