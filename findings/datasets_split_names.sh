#!/usr/bin/env bash
# Finding: Files named train_sft and train_gen become one split `train`, a file named eval
#   becomes `test`, and a file with no known word is left out.
# Packages: datasets 5.2.0, pyarrow 26.0.1
# Guess: Each file is a split of its own name, or all files of a directory are read.
# Observed: A split is guessed from the words train, test, eval, dev, validation (and kin)
#   between separators of the file name; several files with one word are joined. As soon as one
#   file has such a word, files without any are dropped, with no message.
# Matters: Preference and SFT rows are mixed into one training set, held-out rows go missing,
#   and the numbers of rows are the only sign.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PROGRAM'
import json
import os
import sys

from datasets import load_dataset


def splits(*names):
    directory = "-".join(names)
    os.mkdir(directory)
    for name in names:
        with open(f"{directory}/{name}.jsonl", "w") as file:
            file.write(json.dumps({"name": name}))
    loaded = load_dataset(directory, cache_dir="cache")
    return {split: sorted(rows["name"]) for split, rows in loaded.items()}


observed = {
    "two kinds": splits("train_sft", "train_gen"),
    "eval": splits("train", "eval"),
    "other": splits("train", "held_out"),
}
expected = {
    "two kinds": {"train": ["train_gen", "train_sft"]},
    "eval": {"train": ["train"], "test": ["eval"]},
    "other": {"train": ["train"]},
}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
