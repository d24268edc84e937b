#!/usr/bin/env bash
# Finding: `safetensors.numpy.save_file` writes a transposed array without complaint, and what it
#   writes is the array that was not transposed, under the transposed shape.
# Packages: safetensors 0.8.0, numpy 2.4.6
# Guess: The values are written in their order, as numpy's own `tobytes` gives them, or the array
#   is refused, as `safetensors.torch` refuses tensors that are not contiguous.
# Observed: The memory is written as it lies. The docstring asks for contiguous arrays; nothing
#   checks them.
# Matters: Flax keeps kernels as [in, out] and torch as [out, in], so every exporter transposes. A
#   square matrix that is not made contiguous loads everywhere, transposed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

import numpy as np
from safetensors.numpy import load, save

kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
saved = {"a view": kernel.T, "a copy": np.ascontiguousarray(kernel.T)}
read = {name: load(save({"weight": array}))["weight"].tolist() for name, array in saved.items()}
expected = {
    "a view": [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]],
    "a copy": [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]],
}

for name, values in read.items():
    print(f"{name}: saved {saved[name].tolist()}, read {values}")
sys.exit(0 if read == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
