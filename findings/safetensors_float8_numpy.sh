#!/usr/bin/env bash
# Finding: `safetensors.numpy` writes a float8 array of ml_dtypes and cannot read its own file;
#   bfloat16 works both ways.
# Packages: safetensors 0.8.0, numpy 2.4.6, ml_dtypes 0.6.0
# Guess: What `save_file` takes, `load_file` returns.
# Observed: Reading looks the type up in numpy itself, which has no float8: AttributeError. No
#   check at saving says so.
# Matters: A quantised export is found unreadable when the run that made it is over. Read a
#   tensor back at export, or store the bytes as uint8.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6 ml_dtypes==0.6.0
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file


def there_and_back(dtype):
    save_file({"w": np.ones(2, dtype)}, "w.safetensors")
    try:
        return str(load_file("w.safetensors")["w"].dtype)
    except AttributeError as error:
        return str(error)


observed = {
    "bfloat16": there_and_back(ml_dtypes.bfloat16),
    "float8": there_and_back(ml_dtypes.float8_e4m3fn),
}
expected = {
    "bfloat16": "bfloat16",
    "float8": "module 'numpy' has no attribute 'float8_e4m3fn'",
}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
