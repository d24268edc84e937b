#!/usr/bin/env bash
# Finding: Answers in a jsonl file that all look like dates arrive as `datetime` objects, and
#   their text is no longer the answer.
# Packages: datasets 5.2.0, pyarrow 26.0.1
# Guess: A JSON string is read as a string.
# Observed: `load_dataset("json")` leaves types to Arrow's JSON reader, which makes a timestamp
#   column of strings such as 2024-03-01; a single other string in the column keeps it text.
#   `str(row["answer"])` is "2024-03-01 00:00:00".
# Matters: An exact-match reward on a date task scores every right completion 0, or the column
#   breaks when one more row is added.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PROGRAM'
import json
import sys

from datasets import load_dataset


def answers(*values):
    name = f"{len(values)}.jsonl"
    with open(name, "w") as file:
        file.writelines(json.dumps({"answer": value}) + "\n" for value in values)
    rows = load_dataset("json", data_files=name, split="train", cache_dir="cache")
    return [str(row["answer"]) for row in rows]


observed = {
    "dates": answers("2024-03-01", "2024-03-02"),
    "and one word": answers("2024-03-01", "2024-03-02", "never"),
}
expected = {
    "dates": ["2024-03-01 00:00:00", "2024-03-02 00:00:00"],
    "and one word": ["2024-03-01", "2024-03-02", "never"],
}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
