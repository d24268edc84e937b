"""Logits of the sampling distribution, against the processors of transformers' `generate`."""

import itertools

import jax.numpy as jnp
import numpy as np
import torch
from peers import tiny_model
from transformers import GenerationConfig

from relax.sampling.distribution import Rules, process_logits, sample_token

SECTION = "Sampling"
B, V, P = 6, 61, 9
EOS = [2, 5]
MODEL = tiny_model()
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(B, V)).astype(np.float32) * 3
IDS = RNG.integers(6, V, size=(B, P))
MASK = np.arange(P) >= RNG.integers(0, 4, size=(B, 1))  # rows that are padded on the left
BIAS = {7: 2.5, 11: -4.0, 30: -np.inf}
# Our option, and the value that it has in transformers.
OPTIONS = {
    "logit_bias": (BIAS, {"sequence_bias": [[[token], float(b)] for token, b in BIAS.items()]}),
    "repetition_penalty": (1.3, {"repetition_penalty": 1.3}),
    "min_new_tokens": (1, {"min_new_tokens": 1}),
    "temperature": (0.6, {"temperature": 0.6}),
    "top_k": (12, {"top_k": 12}),
    "top_p": (0.8, {"top_p": 0.8}),
    "min_p": (0.03, {"min_p": 0.03}),
}


def theirs(settings, logits=LOGITS):
    neutral = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "min_p": None}
    config = GenerationConfig(**neutral | {"eos_token_id": EOS} | settings)
    model = MODEL
    model._prepare_special_tokens(config)
    ids = torch.from_numpy(IDS)
    mask = {"attention_mask": torch.from_numpy(MASK.astype(np.int64))}
    processors = model._get_logits_processor(config, P, model_kwargs=mask)
    return processors(ids, torch.from_numpy(logits.copy())).numpy()


def ours(settings, logits=LOGITS):
    bias = np.zeros(V, np.float32)
    for token, value in settings.get("logit_bias", {}).items():
        bias[token] = value
    seen = np.zeros((B, V), bool)
    for row in range(B):
        seen[row, IDS[row, MASK[row]]] = True
    numbers = {"temperature": 1.0} | {
        name: settings[name]
        for name in ("repetition_penalty", "temperature", "top_p", "min_p")
        if name in settings
    }
    rules = Rules(**{name: np.float32(value) for name, value in numbers.items()})
    if "logit_bias" in settings:
        rules = rules._replace(logit_bias=bias)
    if "min_new_tokens" in settings:
        rules = rules._replace(eos_token_ids=np.array(EOS))
    too_short = np.ones(B, bool)
    return process_logits(
        jnp.asarray(logits), rules, top_k=settings.get("top_k", 0), seen=seen, too_short=too_short
    )


def check_each_option(parity):
    for name, (value, settings) in OPTIONS.items():
        pair = ours({name: value}), theirs(settings)
        parity.equal(f"`{name}`", "transformers", "logits and banned tokens", *pair)


def check_all_combinations(parity):
    names = list(OPTIONS)
    all_ours, all_theirs = [], []
    for chosen in itertools.product((False, True), repeat=len(names)):
        used = [name for name, use in zip(names, chosen, strict=True) if use]
        settings = {}
        for name in used:
            settings |= OPTIONS[name][1]
        all_ours.append(ours({name: OPTIONS[name][0] for name in used}))
        all_theirs.append(theirs(settings))
    what = f"all {len(all_ours)} combinations of these options"
    parity.equal(what, "transformers", "logits and banned tokens", all_ours, all_theirs)


def check_ties(parity):
    logits = np.round(LOGITS)  # many tokens of the same logit
    pair = ours({"top_k": 7}, logits), theirs({"top_k": 7}, logits)
    parity.equal("`top_k` with ties at the threshold", "transformers", "banned tokens", *pair)
    pair = ours({"min_p": 0.2}, logits), theirs({"min_p": 0.2}, logits)
    parity.equal("`min_p` with ties at the threshold", "transformers", "banned tokens", *pair)
    mine, other = np.asarray(ours({"top_p": 0.8}, logits)), theirs({"top_p": 0.8}, logits)
    lowest = np.where(np.isfinite(other), other, np.inf).min(axis=1, keepdims=True)
    parity.departs(
        "`top_p` with ties at the threshold",
        "transformers",
        "banned tokens",
        mine,
        other,
        "Tokens of the same probability are kept or banned together; transformers keeps those "
        "that its sort puts last.",
        explained=np.where(logits >= lowest, logits, -np.inf),
    )


def check_greedy(parity):
    logits = LOGITS.copy()
    logits[0, [3, 50]] = 20.0  # the first of equals
    tokens, logprobs = sample_token(jnp.asarray(logits), None, Rules())
    expected = torch.from_numpy(logits).log_softmax(-1).max(-1)
    parity.equal("greedy token", "torch", "token", tokens, expected.indices)
    parity.equal("greedy token", "torch", "log-probability", logprobs, expected.values)


def check_what_is_not_there(parity):
    has = set(OPTIONS) | {"sequence_bias"}
    changes = "min_length typical_p epsilon_cutoff eta_cutoff top_h no_repeat_ngram_size "
    changes += "bad_words_ids suppress_tokens begin_suppress_tokens forced_bos_token_id "
    changes += "forced_eos_token_id exponential_decay_length_penalty guidance_scale "
    changes += "renormalize_logits remove_invalid_values watermarking_config num_beams "
    changes += "penalty_alpha encoder_repetition_penalty encoder_no_repeat_ngram_size"
    fields = vars(GenerationConfig())
    for name in changes.split():
        if name in fields and name not in has:
            why = "`logit_bias` of -inf" if name in ("bad_words_ids", "suppress_tokens") else ""
            parity.missing(f"`{name}`", "transformers", why)
