"""The distribution that is drawn from, option by option, against hand-made probabilities."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.sampling import SamplingConfig, generate
from relax.sampling.distribution import Rules, process_logits
from relax.sampling.selection import draw, greedy, largest, nucleus
from tests.families import tiny_family

P = np.array([0.06, 0.30, 0.02, 0.16, 0.22, 0.04, 0.12, 0.08])
DRAWS = 20_000
CHI_SQUARE = {
    1: 10.83,
    2: 13.82,
    3: 16.27,
    5: 20.52,
    6: 22.46,
    7: 24.32,
}  # exceeded once in a thousand


def share(*weights):
    return np.array(weights) / np.sum(weights)


CASES = {
    "nothing": ({}, {}, P),
    "temperature": ({"temperature": 0.5}, {}, share(*P**2)),
    "top_k": ({}, {"top_k": 3}, share(0, 0.30, 0, 0.16, 0.22, 0, 0, 0)),
    # 0.30 + 0.22 + 0.16 = 0.68 is not yet 0.7.
    "top_p": ({"top_p": 0.7}, {}, share(0, 0.30, 0, 0.16, 0.22, 0, 0.12, 0)),
    # 0.5 * 0.30 = 0.15.
    "min_p": ({"min_p": 0.5}, {}, share(0, 0.30, 0, 0.16, 0.22, 0, 0, 0)),
    # Of the five most likely the first three hold 0.68 / 0.88 = 0.77.
    "top_k, then top_p": ({"top_p": 0.7}, {"top_k": 5}, share(0, 0.30, 0, 0.16, 0.22, 0, 0, 0)),
    # p² has 0.09 of 0.1904 and 0.0484: the two are more than 0.7 of it, 0.09 alone is not.
    "temperature, then top_p": (
        {"temperature": 0.5, "top_p": 0.7},
        {},
        share(0, 0.09, 0, 0, 0.0484, 0, 0, 0),
    ),
    # Logits below 0 are doubled: p becomes p².
    "repetition_penalty": (
        {"repetition_penalty": 2.0},
        {"seen": [1, 4]},
        share(0.06, 0.09, 0.02, 0.16, 0.0484, 0.04, 0.12, 0.08),
    ),
    "logit_bias": (
        {"logit_bias": [0, -math.inf, math.log(10), 0, 0, 0, 0, 0]},
        {},
        share(0.06, 0, 0.2, 0.16, 0.22, 0.04, 0.12, 0.08),
    ),
    # 0.30 · 4 = 1.2 is above 1: its logit is halved after the bias, not doubled before it.
    "logit_bias, then repetition_penalty": (
        {"logit_bias": [0, math.log(4), 0, 0, 0, 0, 0, 0], "repetition_penalty": 2.0},
        {"seen": [1]},
        share(0.06, 1.2**0.5, 0.02, 0.16, 0.22, 0.04, 0.12, 0.08),
    ),
    "min_new_tokens": (
        {"eos_token_ids": [1, 3]},
        {"too_short": True},
        share(0.06, 0, 0.02, 0, 0.22, 0.04, 0.12, 0.08),
    ),
    "min_new_tokens, reached": ({"eos_token_ids": [1, 3]}, {"too_short": False}, P),
}


def sample(logits, rules, top_k=0, seen=(), too_short=False, seed=0):
    """Tokens and log-probabilities of `DRAWS` draws."""
    options = {"temperature": 1.0, **rules}
    rules = Rules(**{name: jnp.asarray(value) for name, value in options.items()})
    V = len(logits)
    seen = np.isin(np.arange(V), seen)

    @jax.jit
    def run(keys):
        rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32)[None], (DRAWS, V))
        shaped = process_logits(
            rows,
            rules,
            top_k=top_k,
            seen=jnp.broadcast_to(seen[None], rows.shape),
            too_short=jnp.full((DRAWS,), too_short),
        )
        return draw(keys, shaped)

    tokens, logprobs = run(jax.random.split(jax.random.key(seed), DRAWS))
    return np.array(tokens), np.array(logprobs)


def assert_drawn_from(tokens, logprobs, expected):
    counts = np.bincount(tokens, minlength=len(expected))
    possible = expected > 0
    assert not counts[~possible].any()
    wanted = DRAWS * expected[possible]
    chi_square = (np.square(counts[possible] - wanted) / wanted).sum()
    assert chi_square < CHI_SQUARE[possible.sum() - 1], (counts, wanted)
    np.testing.assert_allclose(logprobs, np.log(expected[tokens]), atol=1e-5)


def test_processors_give_the_logits_of_transformers_in_its_order():
    """A bias comes before the penalty, which takes the sign of what it has made."""
    torch = pytest.importorskip("torch")
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    V, seen = 8, [0, 1, 5]
    fields = {"vocab_size": V, "hidden_size": 2, "num_hidden_layers": 1, "intermediate_size": 2}
    model = LlamaForCausalLM(LlamaConfig(**fields, num_attention_heads=1))
    options = {"repetition_penalty": 1.7, "temperature": 0.6, "top_k": 5, "top_p": 0.9}
    bias = {0: 2.5, 1: -3.0, 3: -math.inf, 6: 0.5}
    config = GenerationConfig(
        do_sample=True,
        sequence_bias=[[[token], value] for token, value in bias.items() if value > -math.inf],
        suppress_tokens=[3],
        eos_token_id=2,
        min_new_tokens=5,
        **options,
    )
    config._eos_token_tensor = torch.tensor([2])
    processors = model._get_logits_processor(config, input_ids_seq_length=len(seen))
    logits = np.array([[-1.0, 2.0, 1.5, 9.0, 0.3, -0.2, 0.1, 1.2]], np.float32)
    expected = processors(torch.tensor([seen]), torch.tensor(logits)).numpy()

    array = np.zeros(V, np.float32)
    array[list(bias)] = list(bias.values())
    rules = Rules(
        logit_bias=array,
        repetition_penalty=np.float32(1.7),
        eos_token_ids=np.array([2]),
        temperature=np.float32(0.6),
        top_p=np.float32(0.9),
    )
    found = process_logits(
        jnp.asarray(logits),
        rules,
        top_k=5,
        seen=np.isin(np.arange(V), seen)[None],
        too_short=np.array([True]),
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_twenty_thousand_draws_fit_the_distribution(case):
    rules, others, expected = CASES[case]
    assert_drawn_from(*sample(np.log(P), rules, **others), expected)


def test_repetition_penalty_divides_logits_above_zero():
    """Logits 2 and 1: with token 0 seen and a penalty of 2 both are 1."""
    tokens, logprobs = sample([2.0, 1.0], {"repetition_penalty": 2.0}, seen=[0])
    assert_drawn_from(tokens, logprobs, np.array([0.5, 0.5]))


def test_draws_fit_where_the_likely_tokens_are_far_apart_among_many():
    """A vocabulary that the cells do not divide evenly."""
    logits, expected = np.full(1003, -np.inf), np.zeros(1003)
    places = [0, 1, 4, 255, 256, 511, 900, 1002]
    logits[places], expected[places] = np.log(P), P
    assert_drawn_from(*sample(logits, {}), expected)


def test_keys_alone_decide_what_rows_draw():
    keys = jax.random.split(jax.random.key(0), 3)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 500)), jnp.float32)
    together = draw(keys, logits)[0]
    alone = [draw(keys[i : i + 1], logits[i : i + 1])[0][0] for i in range(3)]
    assert together.tolist() == [int(token) for token in alone]


@pytest.mark.parametrize("V", [7, 300, 4096])
def test_the_largest_are_those_of_a_sort(V):
    logits = np.random.default_rng(V).normal(size=(3, V)).astype(np.float32)
    logits[1] = np.round(logits[1])  # with ties
    for k in (1, 6):
        np.testing.assert_array_equal(largest(jnp.asarray(logits), k), -np.sort(-logits)[:, :k])


@pytest.mark.parametrize("p", [0.001, 0.3, 0.9, 0.999])
def test_the_nucleus_is_that_of_a_sort(p):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 800)).astype(np.float32) * np.float32([[0.01], [1], [4], [20]])
    for row, found in zip(logits, np.array(nucleus(jnp.asarray(logits), p)), strict=True):
        falling = np.sort(row.astype(np.float64))[::-1]
        probs = np.exp(falling - falling[0])
        before = np.cumsum(probs / probs.sum()) - probs / probs.sum()
        assert found == np.float32(falling[before < p][-1])


def test_the_nucleus_keeps_all_of_equal_tokens():
    logits = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.2]]))
    assert nucleus(logits, 0.5)[0] == logits[0, 1]


def test_the_most_likely_token_is_the_first_of_equals():
    logits = np.zeros((2, 700), np.float32)
    logits[0, [300, 301, 699]] = 1
    logits[1, 5] = -1
    tokens, logprobs = greedy(jnp.asarray(logits))
    assert tokens.tolist() == [300, 0]
    np.testing.assert_allclose(logprobs[1], -math.log(699 + math.exp(-1)), rtol=1e-6)


def test_no_token_without_weight_is_drawn_by_the_largest_uniform_number(monkeypatch):
    """The largest number below 1 and sums that round."""
    uniform = np.float32(1 - 2**-24)
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, uniform))
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 600)).astype(np.float32)
    logits[:, 350:] = -np.inf
    tokens, logprobs = draw(jax.random.split(jax.random.key(0), 200), jnp.asarray(logits))
    assert (np.array(tokens) < 350).all() and np.isfinite(logprobs).all()


# --- from the configuration to the logits ---

BIAS = {4: 3.0, 9: -math.inf}
WIRED = [
    {"temperature": 0.6},
    {"top_k": 4},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"repetition_penalty": 1.8},
    {"logit_bias": BIAS},
    {"eos_token_ids": (1, 2, 3), "min_new_tokens": 3},
    {"temperature": 0.0, "repetition_penalty": 3.0, "logit_bias": BIAS},
    {"temperature": 1.4, "top_k": 9, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
]


def expected_logprobs(logits, seen, drawn, options):
    """One row's log-probabilities with transformers' order of processors, by sorting."""
    x = logits.astype(np.float64).copy()
    for token, bias in (options.get("logit_bias") or {}).items():
        x[token] += bias
    penalty = options.get("repetition_penalty", 1.0)
    for token in seen:
        x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
    if drawn < options.get("min_new_tokens", 0):
        x[list(options["eos_token_ids"])] = -np.inf
    x = x / (options.get("temperature", 1.0) or 1.0)
    if options.get("top_k"):
        x[x < np.sort(x)[-options["top_k"]]] = -np.inf
    order = np.argsort(-x)
    probs = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    before = np.cumsum(probs[order]) - probs[order]
    x[order[before >= options.get("top_p", 1.0)]] = -np.inf
    x[x < x.max() + np.log(max(options.get("min_p", 0.0), 1e-300))] = -np.inf
    with np.errstate(divide="ignore"):
        return np.log(np.exp(x - x.max()) / np.exp(x - x.max()).sum())


@pytest.mark.parametrize("options", WIRED, ids=lambda options: ",".join(options))
def test_each_option_changes_the_logprobs_of_generation_as_said(options):
    model, params = tiny_family("llama")
    prompts = [[3, 1, 4, 1, 5], [7]]
    config = SamplingConfig(max_new_tokens=3, **options)
    out = generate(model, params, prompts, jax.random.key(4), config)
    rows = np.zeros((2, 8), np.int32)
    for i, prompt in enumerate(prompts):
        rows[i, : len(prompt) + out.lengths[i]] = [*prompt, *out.completions[i]]
    logits = np.array(jax.jit(model.apply)({"params": params}, rows))
    for i, prompt in enumerate(prompts):
        for t in range(out.lengths[i]):
            place = len(prompt) + t
            logprobs = expected_logprobs(
                logits[i, place - 1], set(rows[i, :place].tolist()), t, options
            )
            assert out.logprobs[i, t] == pytest.approx(logprobs[rows[i, place]], abs=1e-4)
            if config.temperature == 0:
                assert rows[i, place] == logprobs.argmax()
