#!/usr/bin/env bash
# Finding: TRL's `accuracy_reward` gives 0 to a right answer that is not in `\boxed{}`, and to
#   one in dollar signs, which math-verify itself accepts.
# Packages: trl 1.16.0, math-verify 0.9.0, transformers 5.24.0, torch 2.13.0
# Guess: It is math-verify's verdict: "The answer is 72." scores 1 for the solution 72.
# Observed: Completions are parsed for \boxed{} alone; "72" and "$72$" score 0. Two boxes make a
#   set, so a corrected answer scores 0 as well. Where the solution cannot be parsed the reward
#   is None.
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


texts = ("The answer is 72.", "$72$", r"\boxed{72}", r"\boxed{71}, no: \boxed{72}")
observed = {text: (verify(parse("$72$"), parse(text)), reward(text, "$72$")) for text in texts}
observed["solution Paris"] = reward(r"\boxed{Rome}", "Paris")
verdicts = ((True, 0.0), (True, 0.0), (True, 1.0), (False, 0.0))
expected = dict(zip(texts, verdicts, strict=True)) | {"solution Paris": None}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
