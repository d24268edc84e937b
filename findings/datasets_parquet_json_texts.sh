#!/usr/bin/env bash
# Finding: Chat rows read from jsonl and written with `to_parquet` hold each message as a JSON
#   text, which only `datasets` turns back into an object.
# Packages: datasets 5.2.0, pyarrow 26.0.1
# Guess: Parquet keeps lists of structs, so any reader (pyarrow, pandas, polars, a training
#   library) finds messages with a role and a content.
# Observed: Where the messages of a file differ in their keys, the loader gives them the new
#   feature type Json; the file has the extension type arrow.json, and pyarrow 26 returns
#   strings. The feature is recorded in the schema's metadata alone.
# Matters: The same rows train from jsonl and fail, or are trained as raw JSON, from the parquet
#   file made of them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PROGRAM'
import json
import sys

import pyarrow.parquet
from datasets import load_dataset

call = {"function": {"name": "add", "arguments": {"x": 1}}}
rows = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"messages": [{"role": "assistant", "content": "c", "tool_calls": [call]}]},
]
with open("rows.jsonl", "w") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)
dataset = load_dataset("json", data_files="rows.jsonl", split="train", cache_dir="cache")
dataset.to_parquet("rows.parquet")
table = pyarrow.parquet.read_table("rows.parquet")
metadata = json.loads(table.schema.metadata[b"huggingface"])
observed = {
    "datasets": dataset[0]["messages"][0],
    "pyarrow": table.to_pylist()[0]["messages"][0],
    "feature": metadata["info"]["features"]["messages"]["feature"],
}
expected = {
    "datasets": {"role": "user", "content": "a"},
    "pyarrow": '{"role":"user","content":"a"}',
    "feature": {"_type": "Json"},
}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
