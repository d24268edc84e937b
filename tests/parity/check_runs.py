"""Whole runs of SFT and DPO: every update logs what TRL's trainers log.

These cases and more are recorded in tests/golden/, and replayed by the suite without TRL.
"""

import numpy as np
import pytest
import record_trl
import record_trl_dpo
import test_dpo_parity
import test_trl_parity
from golden import trl_cases, trl_dpo_cases
from peers import tiny_directory

SECTION = "Whole runs"
SFT = ("two_micro_batches",)
DPO = ("four_losses",)


def compare(parity, what, ours, theirs, names):
    for name in names:
        mine = [float(line[name]) for line in ours]
        pair = mine, [float(value) for value in theirs[name]]
        assert len(pair[0]) == len(pair[1])
        what_is = f"`{name}` of {len(mine)} updates"
        parity.equal(what, "trl", what_is, *map(array, pair), tolerance=1e-4)


def array(values):
    return np.array(values, np.float32)


@pytest.mark.parametrize("name", SFT)
def check_sft(parity, name, tmp_path):
    kind, extra = trl_cases.TINY[name]
    settings = trl_cases.flags(name, extra)
    rows = trl_cases.write_rows(tmp_path / "rows.jsonl", kind)
    theirs = record_trl.record(tiny_directory(), rows, settings, tmp_path)
    _, ours = test_trl_parity.run(tiny_directory(), rows, tmp_path / "run", **settings)
    names = ("loss", "grad_norm", "learning_rate", "num_tokens")
    compare(parity, f"SFT, {name.replace('_', ' ')}", ours, theirs, names)


@pytest.mark.parametrize("name", DPO)
def check_dpo(parity, name, tmp_path):
    kind, extra = trl_dpo_cases.TINY[name]
    settings = trl_dpo_cases.flags(name, extra)
    rows = trl_dpo_cases.write_pairs(tmp_path / "rows.jsonl", kind, count=100)
    theirs = record_trl_dpo.record(tiny_directory(), rows, settings, tmp_path)
    settings |= {"pad_to_multiple_of": 320}  # so that the step is compiled once
    ours = test_dpo_parity.run(tiny_directory(), rows, tmp_path / "run", settings)
    names = ("loss", "grad_norm", "logps/chosen", "logps/rejected", "num_tokens")
    compare(parity, f"DPO, {name.replace('_', ' ')}", ours, theirs, names)
