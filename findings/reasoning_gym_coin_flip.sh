#!/usr/bin/env bash
# Finding: In `coin_flip` the answer 0 scores 1.0 wherever the true probability is below 1.
# Packages: reasoning-gym 0.1.25
# Guess: The probability is compared within a tolerance: 0 for 0.234375 scores nothing, or
#   little.
# Observed: Partial credit is the length of the common prefix over the length of the shorter
#   text, and "0" is a prefix of every such answer: it scores 1.0 on all of them, as does 0.2
#   for 0.234375.
# Matters: A policy finds within a few updates that it need not read the question: it says 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet reasoning-gym==0.1.25
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

import reasoning_gym

task = reasoning_gym.create_dataset("coin_flip", size=20, seed=3)
below = [item for item in task if float(item["answer"]) < 1]
observed = {
    "items with a probability below 1": len(below),
    "of these 0 scores 1.0": sum(task.score_answer("0", item) == 1 for item in below),
}
expected = dict.fromkeys(observed, len(below))

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
