#!/usr/bin/env bash
# Finding: The probabilities of `interleave_datasets` are not the shares of its rows, and the rows
#   that it leaves out are the same in every epoch.
# Packages: datasets 5.2.0, pyarrow 26.0.1
# Guess: With probabilities 0.7 and 0.3, 70 % of the rows are of the first set; 100 and 90 rows make
#   143 until one set is exhausted, and 300 until both are.
# Observed: A set is drawn at random for each row, once for the whole result. With seeds 0 to 3 it
#   has 138 to 154 rows until one is exhausted, and 250 to 321 until both are, of which 64 to 72 %
#   are of the first set. Rows left out are the last ones of their set; epochs repeat the same rows.
# Matters: The seed decides on the length of an epoch, so that runs differ in their numbers of
#   updates; a part of a set is never trained on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PROGRAM'
import sys

from datasets import Dataset, interleave_datasets

sets = [
    Dataset.from_dict({"of": [name] * count, "row": list(range(count))})
    for name, count in (("a", 100), ("b", 90))
]


def rows(seed, strategy):
    mixed = interleave_datasets(sets, [0.7, 0.3], seed=seed, stopping_strategy=strategy)
    of_b = [row["row"] for row in mixed if row["of"] == "b"]
    return len(mixed), len(mixed) - len(of_b), of_b


observed = {}
for strategy in ("first_exhausted", "all_exhausted"):
    made = [rows(seed, strategy) for seed in range(4)]
    observed[strategy] = [(length, of_a) for length, of_a, _ in made]
    print(f"{strategy}: rows, and those of a: {observed[strategy]}")
    if strategy == "first_exhausted":
        firsts = all(of_b == list(range(len(of_b))) for _, _, of_b in made)
        print(f"the rows of b are always its first ones: {firsts}")
expected = {
    "first_exhausted": [(154, 100), (144, 100), (138, 100), (141, 100)],
    "all_exhausted": [(250, 160), (316, 226), (321, 231), (307, 217)],
}
same = firsts and observed == expected
sys.exit(0 if same else f"the behaviour has changed, expected {expected}")
PROGRAM
