#!/usr/bin/env bash
# Finding: A `mistral3` model whose text config says `tie_word_embeddings: false` has tied
#   embeddings.
# Packages: transformers 5.24.0, torch 2.13.0
# Guess: The text config decides, as it does for the same text model by itself, and as it did in
#   transformers 4.
# Observed: The field of the outer config counts alone, and its default is true, while that of the
#   text config is false. A new model has one matrix, and its file no `lm_head`; nothing is said.
# Matters: A text model that is put among its image tower loses its output matrix in training, and
#   a reader that follows the text config misses a tensor.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PROGRAM'
import sys

from safetensors import safe_open
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralForCausalLM

sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
sizes |= {"num_attention_heads": 2, "head_dim": 4}
text = sizes | {"model_type": "mistral", "vocab_size": 11, "num_key_value_heads": 2}
text |= {"tie_word_embeddings": False}
vision = sizes | {"model_type": "pixtral", "image_size": 8, "patch_size": 4}


def is_tied(model):
    return model.lm_head.weight is model.get_input_embeddings().weight


config = Mistral3Config(text_config=text, vision_config=vision)
model = Mistral3ForConditionalGeneration(config)
model.save_pretrained(".")
with safe_open("model.safetensors", "pt") as tensors:
    heads = [name for name in tensors.keys() if "lm_head" in name]
observed = {
    "outer field": config.tie_word_embeddings,
    "field of the text config": config.text_config.tie_word_embeddings,
    "tied": is_tied(model),
    "tied alone": is_tied(MistralForCausalLM(config.text_config)),
    "heads in the file": heads,
}
expected = {
    "outer field": True,
    "field of the text config": False,
    "tied": True,
    "tied alone": False,
    "heads in the file": [],
}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
