#!/usr/bin/env bash
# Finding: math-verify finds no number in `<answer>72</answer>`, but does in `<answer> 72
#   </answer>`.
# Packages: math-verify 0.9.0
# Guess: The number between the tags is found, as in any other text.
# Observed: A bare number directly behind `>` is not recognised, so the list of candidates is
#   empty and the completion counts as wrong. A space, a line break or \\boxed{} around the
#   number is enough.
# Matters: With R1-style prompts every right answer written without spaces scores 0: cut the
#   answer out of its tags before it is verified.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet math-verify==0.9.0
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

from math_verify import parse, verify

gold = parse("72")
texts = ("<answer>72</answer>", "<answer> 72 </answer>", r"<answer>\boxed{72}</answer>")
observed = {text: verify(gold, parse(text)) for text in texts}
expected = dict(zip(texts, (False, True, True), strict=True))

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
