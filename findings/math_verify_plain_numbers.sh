#!/usr/bin/env bash
# Finding: In plain text 1e3 is read as 1, 3 1/2 as 1 and 5! as 5.
# Packages: math-verify 0.9.0
# Guess: They are 1000, 3.5 and 120, or are not understood at all.
# Observed: The pattern for plain numbers takes a part of the text and drops the rest, so a
#   wrong completion can equal the gold: "1e3" verifies against 1.
# Matters: Scientific notation and mixed fractions are common in completions; right ones score 0
#   and a few wrong ones 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet math-verify==0.9.0
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

from math_verify import parse, verify

numbers = {"1e3": ("1000", "1"), "3 1/2": ("7/2", "1"), "5!": ("120", "5")}
pairs = [(gold, text) for text, golds in numbers.items() for gold in golds]
observed = {pair: verify(parse(pair[0]), parse(pair[1])) for pair in pairs}
expected = dict(zip(pairs, (False, True) * 3, strict=True))

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
