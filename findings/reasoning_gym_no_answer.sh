#!/usr/bin/env bash
# Finding: Five tasks (boxnet, graph_color, propositional_logic, rubiks_cube, rush_hour) have
#   the answer None, and None scores 0.
# Packages: reasoning-gym 0.1.25
# Guess: `item["answer"]` is an answer that `score_answer` takes, as in the other tasks.
# Observed: These tasks check a solution by rules and ship none: the column is None for every
#   item.
# Matters: SFT on `question` and `answer`, few-shot prompts or a check such as "the reference
#   scores 1" break or, where None is turned into text, train the word None.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet reasoning-gym==0.1.25
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

import reasoning_gym

names = ("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour", "gcd")
observed = {}
for name in names:
    task = reasoning_gym.create_dataset(name, size=3, seed=3)
    has = {item["answer"] is not None for item in task}
    observed[name] = (has, {task.score_answer(item["answer"], item) for item in task})
expected = dict.fromkeys(names, ({False}, {0.0})) | {"gcd": ({True}, {1.0})}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
