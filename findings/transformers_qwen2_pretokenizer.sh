#!/usr/bin/env bash
# Finding: In a directory whose config.json says qwen2, `AutoTokenizer` replaces the
#   pre-tokenizer of tokenizer.json by Qwen2's own, so other tokens come out.
# Packages: transformers 5.24.0
# Guess: tokenizer.json is the whole tokenizer, the more so as tokenizer_config.json names the
#   generic `PreTrainedTokenizerFast`.
# Observed: The model type overrides the named class and only vocabulary and merges of the file
#   are used: digits grouped by three become single digits. With model type llama, or without
#   config.json, the same files give the file's own tokens.
# Matters: A tokenizer trained or changed by a user on a Qwen2 architecture trains on tokens
#   that no other reader of tokenizer.json (an inference server in Rust, `tokenizers` itself)
#   produces.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PROGRAM'
import json
import os
import sys

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)
tokenizer.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
tokenizer.train_from_iterator(["hello 123 45 123 45"] * 9, trainer)
observed = {"tokenizer.json": tokenizer.encode("12345").tokens}
for model_type in ("llama", "qwen2"):
    os.mkdir(model_type)
    tokenizer.save(f"{model_type}/tokenizer.json")
    with open(f"{model_type}/tokenizer_config.json", "w") as file:
        json.dump({"tokenizer_class": "PreTrainedTokenizerFast"}, file)
    with open(f"{model_type}/config.json", "w") as file:
        json.dump({"model_type": model_type}, file)
    observed[model_type] = AutoTokenizer.from_pretrained(model_type).tokenize("12345")
expected = {
    "tokenizer.json": ["123", "45"],
    "llama": ["123", "45"],
    "qwen2": ["1", "2", "3", "4", "5"],
}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
