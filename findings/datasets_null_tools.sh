#!/usr/bin/env bash
# Finding: `Dataset.from_list` adds the parameters of every row's tools to all other rows as
#   nulls; `load_dataset("json")` of the same rows does not.
# Packages: datasets 5.2.0, pyarrow 26.0.1
# Guess: Rows come out as they went in, whichever way the dataset was made.
# Observed: `from_list` aligns structs: a tool that takes x gets a property y that is null. The
#   JSON loader gives such columns the feature type Json and keeps them as they are.
# Matters: A chat template that writes tools as JSON puts `"y": null` into every prompt, and the
#   model is trained on schemas that do not exist, in one of the two cases.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PROGRAM'
import json
import sys

from datasets import Dataset, load_dataset


def tool(name):
    return {"name": "f", "parameters": {"properties": {name: {"type": "string"}}}}


rows = [{"tools": [tool("x")]}, {"tools": [tool("y")]}]
with open("rows.jsonl", "w") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)
loaded = load_dataset("json", data_files="rows.jsonl", split="train", cache_dir="cache")


def properties(dataset):
    return dataset[0]["tools"][0]["parameters"]["properties"]


observed = {"from_list": properties(Dataset.from_list(rows)), "json": properties(loaded)}
expected = {
    "from_list": {"x": {"type": "string"}, "y": None},
    "json": {"x": {"type": "string"}},
}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
