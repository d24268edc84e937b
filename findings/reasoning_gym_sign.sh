#!/usr/bin/env bash
# Finding: `gsm_symbolic` ignores the sign: -288 scores 1.0 where the answer is 288.
# Packages: reasoning-gym 0.1.25
# Guess: Numbers are compared as numbers.
# Observed: The scorer takes the first run of digits out of the answer, so a minus before it is
#   lost, as are words and other numbers behind it: "288, or 5" scores 1.0 too.
# Matters: A policy that gets the sign wrong is rewarded, and one that lists candidates with the
#   likeliest first is rewarded as well.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet reasoning-gym==0.1.25
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

import reasoning_gym

task = reasoning_gym.create_dataset("gsm_symbolic", size=5, seed=1)


def score(form):
    return [task.score_answer(form.format(item["answer"]), item) for item in task]


observed = {form: score(form) for form in ("{}", "-{}", "{}, or 5", "7{}")}
expected = {"{}": [1.0] * 5, "-{}": [1.0] * 5, "{}, or 5": [1.0] * 5, "7{}": [0.01] * 5}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
