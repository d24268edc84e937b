"""LoRA on a tiny Llama: logits, files, merged weights and gradients, against peft."""

import functools

import jax
import numpy as np
import peft
import pytest
import torch
from peers import tiny_directory, tiny_model
from peft.tuners.lora import LoraConfig, LoraLayer
from safetensors.numpy import load_file

from relax.models import load_pretrained, save_pretrained
from relax.models.huggingface.peft import WEIGHTS, load_adapter, load_merged
from relax.models.huggingface.peft_config import IGNORED_FIELDS, READ, REQUIRED_VALUES
from relax.models.huggingface.peft_save import save_adapter
from relax.models.trainable import merge
from relax.optimizers import sgd
from relax.trainers import SFTTrainer

SECTION = "Adapters"
IDS = np.random.default_rng(1).integers(3, 90, size=(2, 12)).astype(np.int32)
LABELS = np.where(np.arange(12) < 4, -100, IDS).astype(np.int32)
CASES = {
    "all linear layers, rank 4, alpha 7": {
        "r": 4,
        "lora_alpha": 7,
        "target_modules": "all-linear",
    },
    "`use_rslora`": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": ["q_proj", "down_proj"],
    },
    "`rank_pattern`, `alpha_pattern`, `layers_to_transform`": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "layers_to_transform": [1],
        "rank_pattern": {"[kv]_proj": 3},
        "alpha_pattern": {"layers...self_attn.q_proj": 1, "self.*_proj": 2},
    },
}


def with_adapter(fields):
    """A model of peft with a random adapter."""
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", **fields))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    return model.eval()


def their_logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(IDS).long()).logits


@functools.partial(jax.jit, static_argnums=0)
def our_logits(model, params):
    return model.apply({"params": params}, IDS)


@pytest.mark.parametrize("name", CASES)
def check_adapter(parity, name, tmp_path):
    theirs = with_adapter(CASES[name])
    theirs.peft_config["default"].base_model_name_or_path = str(tiny_directory())
    theirs.save_pretrained(tmp_path / "theirs")
    expected = their_logits(theirs)
    base, params = load_pretrained(tiny_directory())
    model, adapters = load_adapter(tmp_path / "theirs", base, params)
    weights = merge(adapters, {"base": params})
    found = our_logits(model, weights)
    parity.equal(name, "peft", "logits", found, expected, tolerance=1e-5)

    gradients = our_gradients(model, params, adapters)
    loss = theirs(torch.from_numpy(IDS).long(), labels=torch.from_numpy(LABELS).long()).loss
    loss.backward()
    save_adapter(tmp_path / "gradients", model, merge(gradients, {"base": params}), "base")
    ours = load_file(tmp_path / "gradients" / WEIGHTS)
    wanted = {
        key.replace(".default", ""): parameter.grad
        for key, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }
    compare_gradients(parity, name, ours, wanted, theirs)

    save_adapter(tmp_path / "ours", model, weights, str(tiny_directory()))
    again = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "ours").eval()
    parity.equal(
        name, "peft", "logits of our file read by peft", found, their_logits(again), tolerance=1e-5
    )

    theirs.merge_and_unload().save_pretrained(tmp_path / "merged")
    _, merged = load_merged(tmp_path / "theirs")
    save_pretrained(tmp_path / "our_merged", base, merged)
    parity.equal(
        name,
        "peft",
        "merged weights",
        load_file(tmp_path / "our_merged" / "model.safetensors"),
        load_file(tmp_path / "merged" / "model.safetensors"),
    )


def compare_gradients(parity, name, ours, wanted, theirs):
    """Where a module has a scale of its own, ours is within B: its gradient is divided by it."""
    scales = {
        f"{module}.lora_B.weight": layer.scaling["default"]
        for module, layer in theirs.named_modules()
        if isinstance(layer, LoraLayer)
    }
    usual = theirs.peft_config["default"]
    usual = usual.lora_alpha / (usual.r**0.5 if usual.use_rslora else usual.r)
    ours = {key: value * scales.get(key, usual) / usual for key, value in ours.items()}
    parity.equal(name, "peft", "gradients", ours, wanted, tolerance=2e-5)


def our_gradients(model, params, adapters):
    trainer = SFTTrainer(model, sgd(0.1), params=params)
    batch = {"input_ids": IDS, "labels": LABELS}

    def loss(adapters):
        return trainer.compute_loss(adapters, batch, frozen={"base": params}).loss

    return jax.jit(jax.grad(loss))(adapters)


def check_what_is_not_there(parity):
    for kind in peft.PeftType:
        if kind.value != "LORA":
            parity.missing(f"`{kind.value}`", "peft", "only LoRA is implemented")
    fields = LoraConfig().to_dict()
    for name, supported in REQUIRED_VALUES.items():
        if name in fields and name not in ("peft_type", "task_type", "revision"):
            values = " or ".join(f"`{value}`" for value in supported) or "its absence"
            parity.missing(f"`{name}`", "peft", f"only {values} is read")
    for name in sorted(set(fields) - set(REQUIRED_VALUES) - READ - IGNORED_FIELDS):
        parity.missing(f"`{name}`", "peft", "adapters with it are refused")
