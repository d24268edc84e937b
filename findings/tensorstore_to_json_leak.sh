#!/usr/bin/env bash
# Finding: `KvStore.Spec.to_json()` keeps about 250 bytes of each call, and `Spec.to_json()`
#   some 600, for ever.
# Packages: tensorstore 0.1.86
# Guess: A function that returns a dict leaves nothing behind.
# Observed: Memory grows by the same amount with every call and garbage collection does not
#   return it. orbax calls it for every leaf of every checkpoint that it writes or reads.
# Matters: A run that saves a thousand leaves every five minutes grows by tens of megabytes a
#   day, and a test of flat memory blames the trainer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tensorstore==0.1.86
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import gc
import sys

import tensorstore

spec = tensorstore.KvStore.Spec({"driver": "memory", "path": "a/"})


def resident():
    gc.collect()
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) * 1024


def call(times):
    for _ in range(times):
        spec.to_json()
    return resident()


before = call(2000)
grown = [(after - before) / times for times, after in ((20000, call(20000)),)]
again = call(20000)
print(f"bytes a call: {grown[0]:.0f}, over twice as many {(again - before) / 40000:.0f}")
observed = {"grows by over 150 bytes a call": (again - before) / 40000 > 150}
expected = {"grows by over 150 bytes a call": True}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
