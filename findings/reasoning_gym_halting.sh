#!/usr/bin/env bash
# Finding: The task `game_of_life_halting` scores 1.0 for every answer.
# Packages: reasoning-gym 0.1.25
# Guess: The answer is True or False, and the wrong one scores 0.
# Observed: True, False and words that answer nothing all score 1.0, on every item.
# Matters: In GRPO each group has equal rewards, so the task teaches nothing while the mean
#   reward shows 1.0; in a mixture it lifts the reward curve.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet reasoning-gym==0.1.25
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

import reasoning_gym

task = reasoning_gym.create_dataset("game_of_life_halting", size=20, seed=1)
observed = {
    answer: sum(task.score_answer(answer, item) for item in task) / 20
    for answer in ("True", "False", "no idea")
}
observed["answers"] = sorted({item["answer"] for item in task})
expected = {"True": 1.0, "False": 1.0, "no idea": 1.0, "answers": ["False", "True"]}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
