#!/usr/bin/env bash
# Finding: `PyTreeRestore(item=template)` returns arrays of the stored shape where the template
#   asks for another; `StandardRestore` refuses.
# Packages: orbax-checkpoint 0.12.8, jax 0.10.2
# Guess: A template of shape [8] for a stored array of shape [4] is an error in both.
# Observed: `PyTreeRestore` checks the tree's keys alone, also with the restore arguments that
#   orbax makes from the template; the array comes back with 4 elements.
# Matters: A model whose vocabulary or rank was changed resumes with arrays of the old shape,
#   and fails, or broadcasts, far from the cause.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet orbax-checkpoint==0.12.8 jax==0.10.2
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import os
import sys

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

path = os.path.abspath("saved")
template = {"w": jax.ShapeDtypeStruct((8,), jnp.float32)}
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, {"w": jnp.arange(4.0)})
    checkpointer.wait_until_finished()
    try:
        checkpointer.restore(path, template)
        standard = "restored"
    except ValueError:
        standard = "refused"
arguments = ocp.args.PyTreeRestore(
    item=template, restore_args=ocp.checkpoint_utils.construct_restore_args(template)
)
with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    restored = checkpointer.restore(path, args=arguments)
observed = {"StandardRestore": standard, "PyTreeRestore": restored["w"].shape}
expected = {"StandardRestore": "refused", "PyTreeRestore": (4,)}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
