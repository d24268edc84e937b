#!/usr/bin/env bash
# Finding: Where two answers differ from the first character on and the chosen one ends with a
#   space, TRL's `extract_prompt` makes the whole chosen answer the prompt.
# Packages: trl 1.16.0, transformers 5.24.0, torch 2.13.0
# Guess: Texts without a common beginning have an empty prompt.
# Observed: "Yes, of course. " and "No, never. " give the prompt "Yes, of course." and the
#   completions " " and " ": the character before the first difference is looked up at index -1,
#   which is the last one. Without the space at the end the prompt is empty.
# Matters: The pair then says that a space is better than a space after the chosen answer, and
#   the rejected answer is not trained on at all.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet trl==1.16.0 transformers==5.24.0 torch==2.13.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PROGRAM'
import sys

from trl import extract_prompt

pairs = {
    "a space at the end": ("Yes, of course. ", "No, never. "),
    "none": ("Yes, of course.", "No, never."),
}
observed = {
    name: extract_prompt({"chosen": chosen, "rejected": rejected})
    for name, (chosen, rejected) in pairs.items()
}
expected = {
    "a space at the end": {"prompt": "Yes, of course.", "chosen": " ", "rejected": " "},
    "none": {"prompt": "", "chosen": "Yes, of course.", "rejected": "No, never."},
}
for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
