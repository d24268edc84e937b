#!/usr/bin/env bash
# Finding: "50%" is equal to 50 and to 0.5.
# Packages: math-verify 0.9.0
# Guess: One of the two: 0.5 in mathematics, 50 where a percentage was asked for.
# Observed: `verify` accepts a percentage against both readings, in both directions.
# Matters: A completion that is off by a factor of 100 is rewarded wherever it writes a percent
#   sign.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet math-verify==0.9.0
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

from math_verify import parse, verify

pairs = (("50", "50%"), ("0.5", "50%"), ("50", "0.5"), (r"$50\%$", "0.5"), (r"$50\%$", "50"))
observed = {pair: verify(parse(pair[0]), parse(pair[1])) for pair in pairs}
expected = dict(zip(pairs, (True, True, False, True, True), strict=True))

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
