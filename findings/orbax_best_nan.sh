#!/usr/bin/env bash
# Finding: A NaN metric makes orbax's `CheckpointManager` keep the wrong checkpoints and call a
#   NaN step the best.
# Packages: orbax-checkpoint 0.12.8, jax 0.10.2
# Guess: NaN is the worst value, or is refused: with best_mode="min" the step with the least
#   loss is kept.
# Observed: Steps are sorted by a comparison that NaN breaks: after losses 1.0, 0.5, 0.7, NaN,
#   0.9 the manager (max_to_keep=2) has deleted 0.5 and 0.7; after 1.0, 0.5, 0.7, NaN its best
#   step is the NaN one.
# Matters: One evaluation that overflows costs the best weights of a run, irreversibly.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet orbax-checkpoint==0.12.8 jax==0.10.2
cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM'
import os
import sys
import tempfile

import jax.numpy as jnp
import orbax.checkpoint as ocp


def kept(*losses):
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, best_fn=lambda metrics: metrics["loss"], best_mode="min"
    )
    with ocp.CheckpointManager(tempfile.mkdtemp(dir=os.getcwd()), options=options) as manager:
        for step, loss in enumerate(losses):
            arguments = ocp.args.StandardSave({"w": jnp.ones(1)})
            manager.save(step, args=arguments, metrics={"loss": loss})
        manager.wait_until_finished()
        return [losses[step] for step in manager.all_steps()], losses[manager.best_step()]


nan = float("nan")
observed = {
    "without NaN": str(kept(1.0, 0.5, 0.7, 0.9)),
    "NaN before the last": str(kept(1.0, 0.5, 0.7, nan, 0.9)),
    "NaN at last": str(kept(1.0, 0.5, 0.7, nan)),
}
expected = {
    "without NaN": "([0.5, 0.7], 0.5)",
    "NaN before the last": "([nan, 0.9], 0.9)",
    "NaN at last": "([0.5, nan], nan)",
}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
