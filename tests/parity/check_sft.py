"""Loss and gradients of supervised fine-tuning on a tiny Llama, against transformers."""

import jax
import numpy as np
import torch
from peers import tiny_directory, tiny_model
from safetensors.numpy import load_file
from transformers.trainer_pt_utils import LabelSmoother

from relax.losses import linear_cross_entropy, next_token_targets
from relax.models import load_pretrained, save_pretrained
from relax.optimizers import sgd
from relax.trainers import SFTTrainer
from relax.trainers.update import accumulate_gradients

SECTION = "Supervised fine-tuning"
RNG = np.random.default_rng(3)
LENGTHS = np.array([20, 7, 13, 16])
REAL = np.arange(20)[None, :] < LENGTHS[:, None]
IDS = np.where(REAL, RNG.integers(5, 250, size=(4, 20)), 0).astype(np.int32)
LABELS = np.where(REAL & (np.arange(20) >= 3), IDS, -100).astype(np.int32)


def theirs(micro_batches):
    """Loss and gradients by tensor; the mean is over the trained tokens of all micro-batches."""
    model = tiny_model()
    total, count = 0.0, int((LABELS[:, 1:] != -100).sum())
    for rows in np.split(np.arange(4), micro_batches):
        loss = model(
            torch.from_numpy(IDS[rows]).long(),
            attention_mask=torch.from_numpy(REAL[rows]).long(),
            labels=torch.from_numpy(LABELS[rows]).long(),
            num_items_in_batch=count,
        ).loss
        loss.backward()
        total += float(loss)
    return np.float32(total), {name: p.grad for name, p in model.named_parameters()}


def ours(micro_batches, directory):
    model, params = load_pretrained(tiny_directory())
    trainer = SFTTrainer(model, sgd(0.1), params=params)
    batch = {"input_ids": IDS, "labels": LABELS, "segment_ids": REAL.astype(np.int32)}
    batch["positions"] = np.where(REAL, np.arange(20), 0).astype(np.int32)

    def loss(params, batch, index):
        return trainer.compute_loss(params, batch)

    compute = jax.jit(lambda params: accumulate_gradients(loss, params, batch, micro_batches))
    gradients, metrics = compute(params)
    save_pretrained(directory, model, gradients)
    return metrics["loss"], load_file(directory / "model.safetensors")


def check_loss_and_gradients(parity, tmp_path):
    for count in (1, 2):
        (loss, gradients), (their_loss, wanted) = ours(count, tmp_path / str(count)), theirs(count)
        what = f"padded rows, {count} micro-batch{'es' if count > 1 else ''}"
        parity.equal(what, "transformers", "loss", loss, their_loss)
        parity.equal(what, "transformers", "all gradients", gradients, wanted, tolerance=2e-5)


def check_label_smoothing(parity):
    """transformers' smoother, which TRL's SFT takes for `label_smoothing_factor`."""
    logits = RNG.normal(size=(4, 20, 9)).astype(np.float32)
    labels = np.where(LABELS == -100, -100, LABELS % 9)
    given = torch.from_numpy(logits.copy()).requires_grad_()
    smoother = LabelSmoother(epsilon=0.1)
    wanted = smoother({"logits": given}, torch.from_numpy(labels).long(), shift_labels=True)
    wanted.backward()

    def loss(logits):
        targets = next_token_targets(labels).reshape(-1)
        states = logits.reshape(-1, 9)
        sums = linear_cross_entropy(
            states, np.eye(9, dtype=np.float32), targets, label_smoothing=0.1
        )
        return sums.loss / sums.weight

    ours = jax.value_and_grad(loss)(jax.numpy.asarray(logits))
    subject = "`--label_smoothing_factor 0.1`"
    parity.equal(subject, "transformers", "value and gradient", ours, (wanted, given.grad))
