#!/usr/bin/env bash
# Finding: `add_eos_token=True` as an argument takes the BOS away that tokenizer.json adds; the
#   same field in tokenizer_config.json does nothing.
# Packages: transformers 5.24.0
# Guess: Both add an EOS behind the text and leave the BOS before it.
# Observed: The argument rebuilds the post-processor from scratch, with an EOS and no BOS, and
#   this is what `save_pretrained` then writes. The field of tokenizer_config.json is ignored.
# Matters: Pre-training and SFT texts end or begin differently from what the configuration says,
#   depending on who loads the tokenizer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PROGRAM'
import json
import sys

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer

tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="a"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 0)]
)
tokenizer.save("tokenizer.json")


def tokens(field, **options):
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    with open("tokenizer_config.json", "w") as file:
        json.dump(fields | field, file)
    return AutoTokenizer.from_pretrained(".", **options)("a b").tokens()


observed = {
    "as it is": tokens({}),
    "field": tokens({"add_eos_token": True}),
    "argument": tokens({}, add_eos_token=True),
}
expected = {
    "as it is": ["<s>", "a", "b"],
    "field": ["<s>", "a", "b"],
    "argument": ["a", "b", "</s>"],
}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
