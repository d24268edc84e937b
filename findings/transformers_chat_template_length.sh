#!/usr/bin/env bash
# Finding: `apply_chat_template(messages)` returns a mapping of two entries, so `len()` of it is
#   2 for every conversation.
# Packages: transformers 5.24.0, jinja2 3.1.6
# Guess: A list of token ids, as in transformers 4: `len()` is the number of tokens and slices
#   cut it.
# Observed: A `BatchEncoding` with input_ids and attention_mask comes back unless
#   `return_dict=False` is given; code that filters by length keeps every row, since 2 is below
#   any limit.
# Matters: A length filter written for transformers 4 lets everything pass without an error. The
#   loss then falls on truncated rows.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 jinja2==3.1.6
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
template = "{% for message in messages %}{{ message.content }} {% endfor %}"
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template)
messages = [{"role": "user", "content": "a b " * 50}]
given = tokenizer.apply_chat_template(messages)
plain = tokenizer.apply_chat_template(messages, return_dict=False)
observed = {"len": len(given), "keys": sorted(given), "len of the list": len(plain)}
expected = {"len": 2, "keys": ["attention_mask", "input_ids"], "len of the list": 100}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
