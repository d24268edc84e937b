"""Greedy completions of a tiny Llama, against transformers' `generate`."""

import jax
import numpy as np
import torch
from peers import tiny_directory, tiny_model

from relax.models import load_pretrained
from relax.sampling import SamplingConfig, generate

SECTION = "Sampling"
RNG = np.random.default_rng(12)
PROMPTS = [RNG.integers(5, 250, size=n).tolist() for n in (3, 9, 6)]
EOS, NEW = 1, 12


def theirs(**settings):
    """Completions of prompts that are padded on the left, up to their EOS."""
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    out = tiny_model().generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=EOS,
        pad_token_id=0,
        **settings,
    )
    return [up_to_eos(row[width:].tolist()) for row in out]


def up_to_eos(tokens):
    return np.array(tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens)


def check_greedy_completions(parity):
    model, params = load_pretrained(tiny_directory())
    cases = {
        "`temperature` 0": ({}, {}),
        "`temperature` 0, `repetition_penalty`": ({"repetition_penalty": 1.5},) * 2,
        "`temperature` 0, `logit_bias` of EOS, `min_new_tokens`": (
            {"logit_bias": {EOS: 30.0}, "min_new_tokens": 4},
            {"sequence_bias": [[[EOS], 30.0]], "min_new_tokens": 4},
        ),
    }
    for name, (mine, other) in cases.items():
        config = SamplingConfig(
            max_new_tokens=NEW, temperature=0.0, eos_token_ids=(EOS,), slots=4, **mine
        )
        out = generate(model, params, PROMPTS, jax.random.key(0), config)
        found = [np.array(tokens) for tokens in out.completions]
        what = f"completions of {len(PROMPTS)} prompts of unequal length"
        parity.equal(name, "transformers", what, found, theirs(**other))
