"""The reference's log-probabilities in files: computed once, gone on with after a kill, checked."""

from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from rich.console import Console
from test_dpo_trainer import loader

from relax.callbacks import reference
from relax.callbacks.reference import ReferenceLogprobs
from relax.errors import CheckpointError
from relax.trainers import DPOTrainer


@pytest.fixture
def dpo(tiny_model, tiny_params):
    trainer = DPOTrainer(tiny_model, optax.sgd(0.1), params=tiny_params, precomputed=True)
    return SimpleNamespace(trainer=trainer, params=tiny_params, calls=[])


def begin(dpo, directory, step=0, params=None, weights=None):
    """What the callback gives a fresh loader at the beginning of a run."""
    pairs, compute = loader(2), dpo.trainer.answer_logprobs
    counting = SimpleNamespace(
        model=dpo.trainer.model,
        answer_logprobs=lambda *a: dpo.calls.append(1) or compute(*a),
    )
    callback = ReferenceLogprobs({"pairs": pairs}, directory, Console(quiet=True))
    if weights is not None:
        callback.load_state_dict({"weights": weights})
    state = SimpleNamespace(params=params or dpo.params, frozen={})
    callback.on_train_begin(SimpleNamespace(trainer=counting, state=state, step=step))
    return pairs.ref_logprobs, callback.state_dict()["weights"]


def test_a_second_run_reads_what_the_first_computed(dpo, tmp_path):
    first, weights = begin(dpo, tmp_path)
    expected = np.concatenate([dpo.trainer.answer_logprobs(dpo.params, b) for b in loader(2)])[:5]
    np.testing.assert_array_equal(first, expected)
    computed = len(dpo.calls)
    again, _ = begin(dpo, tmp_path)
    assert len(dpo.calls) == computed == 3
    np.testing.assert_array_equal(first, again)
    # So does one that has moved away from the start, by the checksum in its checkpoint.
    moved = jax.tree.map(lambda p: p + 1, dpo.params)
    np.testing.assert_array_equal(begin(dpo, tmp_path, 7, moved, weights)[0], first)
    assert len(dpo.calls) == computed


def test_other_weights_have_a_file_of_their_own(dpo, tmp_path):
    first, _ = begin(dpo, tmp_path)
    other, _ = begin(dpo, tmp_path, params=jax.tree.map(lambda p: p * 1.5, dpo.params))
    assert len(list(tmp_path.iterdir())) == 2 and not np.allclose(first, other)


def test_what_a_kill_left_undone_is_done_and_nothing_else(dpo, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "SAVE_EVERY_S", -1.0)

    class Killed(list):
        def append(self, call):
            if len(self) == 2:
                raise KeyboardInterrupt
            super().append(call)

    dpo.calls = Killed()
    with pytest.raises(KeyboardInterrupt):
        begin(dpo, tmp_path)
    dpo.calls = list(dpo.calls)
    begin(dpo, tmp_path)
    assert len(dpo.calls) == 3  # of 3 batches, 2 were kept


def test_a_run_that_has_moved_cannot_go_on_without_the_file(dpo, tmp_path):
    with pytest.raises(CheckpointError, match="5 of 5 are missing. Restore the file"):
        begin(dpo, tmp_path, step=3, weights="12345678")


def test_a_damaged_file_is_made_anew(dpo, tmp_path):
    first, _ = begin(dpo, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    np.testing.assert_array_equal(begin(dpo, tmp_path)[0], first)
