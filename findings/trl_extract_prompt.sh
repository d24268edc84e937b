#!/usr/bin/env bash
# Finding: Where two answers share no beginning and the chosen one ends in a space, TRL's
#   `extract_prompt` makes the chosen answer the prompt, and cuts the rejected one to its last
#   character.
# Packages: trl 1.16.0, transformers 5.24.0, datasets 5.2.0
# Guess: The prompt is empty, and both answers stay whole, as they do without the space.
# Observed: The function steps back over a space before the first difference. At the first
#   character that is the last one of the text: Python's index -1. An answer that begins like the
#   whole other one loses its border too: the last common character goes to the answers.
# Matters: Pairs of texts that are written without a prompt are trained on with the better answer
#   as the prompt, in each row that a stray space ends.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps trl==1.16.0
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 datasets==5.2.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PROGRAM'
import sys

from trl.data_utils import extract_prompt

expected = {
    ("Yes, it is.", "No."): ("", "Yes, it is.", "No."),
    ("Yes, it is. ", "No."): ("Yes, it is.", " ", "."),
    ("The sky", "The sky is blue"): ("The sk", "y", "y is blue"),
}
observed = {}
for chosen, rejected in expected:
    parts = extract_prompt({"chosen": chosen, "rejected": rejected})
    observed[chosen, rejected] = parts["prompt"], parts["chosen"], parts["rejected"]
    print(f"{chosen!r}, {rejected!r}: {parts}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
