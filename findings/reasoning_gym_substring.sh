#!/usr/bin/env bash
# Finding: The scorer that most tasks inherit pays for an answer that merely contains the right
#   one: -1 and 12 earn 0.5 where the answer is 1, and so does "1" with a newline.
# Packages: reasoning-gym 0.1.25
# Guess: 1.0 for the answer, 0 for another; white space at the ends does not count.
# Observed: Where the right answer is a substring, the score is its length divided by the length
#   of the given text. The text is not stripped first, so a newline behind a right answer of one
#   digit costs half, and a list of all digits earns a little on every item.
# Matters: A wrong sign or an extra digit is paid half the reward, and a completion that ends in
#   a newline cannot reach 1.0: strip before scoring and test for 1.0 where the task has one
#   answer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet reasoning-gym==0.1.25
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

import reasoning_gym

task = reasoning_gym.create_dataset("gcd", size=2, seed=3)
item = task[0]
given = ("1", "1\n", "-1", "12", "1 2 3 4 5 6 7 8 9")
observed = {repr(text): round(task.score_answer(text, item), 3) for text in given}
observed["answer"] = item["answer"]
expected = {
    repr("1"): 1.0,
    repr("1\n"): 0.5,
    repr("-1"): 0.5,
    repr("12"): 0.5,
    repr("1 2 3 4 5 6 7 8 9"): 0.059,
    "answer": "1",
}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
