#!/usr/bin/env bash
# Finding: Gold answers such as A, (2,3) or x^2 parse to nothing without dollar signs, and
#   nothing equals itself.
# Packages: math-verify 0.9.0
# Guess: `verify(parse(text), parse(text))` is True.
# Observed: LaTeX is only looked for between delimiters, and the default extraction has no plain
#   strings: "A", "x^2" and "(2,3)" give an empty list, "(2, 3)" with a space gives 3. An empty
#   gold makes every completion wrong, without an error.
# Matters: Rows of a data set whose answers are choices, tuples or expressions get reward 0 for
#   ever. Check that each gold verifies against itself, and wrap gold answers in dollar signs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet math-verify==0.9.0
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

from math_verify import parse, verify

texts = ("A", "x^2", "(2,3)", "(2, 3)", "$x^2$", "$(2, 3)$", "72")
observed = {text: (len(parse(text)) > 0, verify(parse(text), parse(text))) for text in texts}
observed["'(2, 3)' is"] = parse("(2, 3)")[0]
expected = {
    "A": (False, False),
    "x^2": (False, False),
    "(2,3)": (False, False),
    "(2, 3)": (True, True),
    "$x^2$": (True, True),
    "$(2, 3)$": (True, True),
    "72": (True, True),
    "'(2, 3)' is": 3,
}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
