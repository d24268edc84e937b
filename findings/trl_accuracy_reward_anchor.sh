#!/usr/bin/env bash
# Finding: TRL's `accuracy_reward` gives 0 to "The answer is 72." and to `$72$` where the
#   solution is 72, both of which math-verify itself accepts.
# Packages: trl 1.16.0, math-verify 0.9.0, transformers 5.24.0, torch 2.13.0
# Guess: The reward is math-verify's verdict, so a completion that ends in the right number
#   scores 1.
# Observed: Only LaTeX counts as an answer, and only in \boxed{} or behind words such as "the
#   answer is": "The answer is $72$." scores 1. Two boxes make a set, so an answer corrected
#   later scores 0. Where the solution cannot be parsed the reward is None.
# Matters: A prompt that does not ask for \boxed{} trains on rewards of 0 only, and solutions
#   that cannot be parsed leave rows without a reward.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet trl==1.16.0 math-verify==0.9.0 transformers==5.24.0 torch==2.13.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PROGRAM'
import sys

from math_verify import parse, verify
from trl.rewards import accuracy_reward


def reward(text, solution):
    return accuracy_reward([[{"role": "assistant", "content": text}]], [solution])[0]


def verdicts(text):
    return verify(parse("$72$"), parse(text)), reward(text, "$72$")


expected = {
    "The answer is 72.": (True, 0.0),
    "$72$": (True, 0.0),
    "The answer is $72$.": (True, 1.0),
    r"\boxed{72}": (True, 1.0),
    r"\boxed{71}, no: \boxed{72}": (False, 0.0),
}
observed = {text: verdicts(text) for text in expected}
observed["solution Paris"] = reward(r"\boxed{Rome}", "Paris")
expected["solution Paris"] = None

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
