#!/usr/bin/env bash
# Finding: `Dataset.from_list` keeps the columns of the first row only; a column that begins in a
#   later row is gone, without a word.
# Packages: datasets 5.2.0, pyarrow 26.0.1
# Guess: The columns are those of all rows, null where a row has none, as `load_dataset("json")`,
#   pandas and polars have it.
# Observed: `tools` of the second row is dropped, in both rows. The same rows as a jsonl file keep
#   it.
# Matters: Where the first conversation has no tools, or the first pair no margin, the whole data
#   set is trained on without them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/cache" "$folder/venv/bin/python" - <<'PROGRAM'
import json
import sys

from datasets import Dataset, load_dataset

rows = [{"prompt": "Hi"}, {"prompt": "Weather in Brest?", "tools": "[weather]"}]
with open("rows.jsonl", "w") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)
observed = {
    "from_list": Dataset.from_list(rows).column_names,
    "json": load_dataset("json", data_files="rows.jsonl", split="train").column_names,
}
expected = {"from_list": ["prompt"], "json": ["prompt", "tools"]}

for name, columns in observed.items():
    print(f"{name}: {columns}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
