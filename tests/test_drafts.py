"""Drafts: the completions are those without them, and the policy's distribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from relax.errors import ConfigError
from relax.sampling import SamplingConfig, generate
from relax.sampling.selection import draw_coupled
from tests.families import tiny_family

KEY = jax.random.key(3)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [7], [2, 7, 1]]
CONFIG = SamplingConfig(max_new_tokens=9, n=3, coupled=True, eos_token_ids=(4, 11), slots=4)
DRAWS = 20_000


def moved(params, size, seed=0):
    """Parameters near the given ones."""
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    near = [x + size * x.std() * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(structure, near)


def letters(ids):
    return "".join(chr(97 + i) for i in ids)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_k": 5, "min_new_tokens": 3},
        {"top_p": 0.8, "stop": ("ab", "c"), "eos_token_ids": ()},
    ],
    ids=str,
)
def test_completions_are_those_without_drafts(tiny_model, tiny_params, options):
    config, policy = dataclasses.replace(CONFIG, **options), moved(tiny_params, 0.1)
    drafts = generate(tiny_model, tiny_params, PROMPTS, KEY, config, decode=letters)
    wanted = generate(tiny_model, policy, PROMPTS, KEY, config, decode=letters)
    seen = {}
    found = generate(
        tiny_model,
        policy,
        PROMPTS,
        KEY,
        config,
        decode=letters,
        drafts=drafts.completions,
        on_tokens=lambda row, new: seen.setdefault(row, []).extend(new),
    )
    assert found.completions == wanted.completions != drafts.completions
    assert found.finish_reasons == wanted.finish_reasons
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-5)
    same = [
        int((np.array(a[: len(b)]) == b[: len(a)]).cumprod().sum())
        for a, b in zip(drafts.completions, wanted.completions, strict=True)
    ]
    assert found.reused == sum(same) > 0
    for row, tokens in enumerate(found.completions):
        assert seen[row][: len(tokens)] == tokens


def test_windows_and_sinks_are_verified_too():
    model, params = tiny_family("gpt_oss")
    policy, config = moved(params, 0.05), dataclasses.replace(CONFIG, max_new_tokens=12)
    drafts = generate(model, params, PROMPTS, KEY, config).completions
    wanted = generate(model, policy, PROMPTS, KEY, config)
    found = generate(model, policy, PROMPTS, KEY, config, drafts=drafts)
    assert found.completions == wanted.completions
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-5)


def test_a_draft_may_be_short_long_wrong_or_missing(tiny_model, tiny_params):
    policy = moved(tiny_params, 0.1)
    wanted = generate(tiny_model, policy, PROMPTS, KEY, CONFIG)
    whole = generate(tiny_model, policy, PROMPTS, KEY, CONFIG, drafts=wanted.completions)
    assert whole.completions == wanted.completions
    assert whole.reused == wanted.lengths.sum()
    drafts = [c[: i % 4] for i, c in enumerate(wanted.completions)]
    drafts[5], drafts[8] = [1] * 40, wanted.completions[8] + [1, 2]
    found = generate(tiny_model, policy, PROMPTS, KEY, CONFIG, drafts=drafts)
    assert found.completions == wanted.completions


def joint(model, params, prompt):
    """The exact probabilities of two tokens behind a prompt, `[V, V]`."""
    V = model.config.vocab_size
    rows = np.array([[*prompt, v] for v in range(V)])
    logits = np.asarray(model.apply({"params": params}, rows)[:, len(prompt) - 1 :], np.float64)
    p = np.exp(logits - logits.max(axis=2, keepdims=True))
    p /= p.sum(axis=2, keepdims=True)
    return p[0, 0][:, None] * p[:, 1]


def assert_drawn_from(completions, p):
    counts = np.zeros_like(p)
    np.add.at(counts, tuple(np.array(completions).T), 1)
    rare = p * len(completions) < 10
    f = [*counts[~rare], counts[rare].sum()]
    e = [*p[~rare], p[rare].sum()]
    assert stats.chisquare(f, len(completions) * np.array(e)).pvalue > 1e-3


def test_twenty_thousand_draws_follow_the_policy_with_drafts_and_without(tiny_model, tiny_params):
    prompt, drafts, accepted = [3, 1, 4], None, []
    config = SamplingConfig(max_new_tokens=2, n=DRAWS // 20, coupled=True, slots=DRAWS)
    for epoch in range(2):
        params = moved(tiny_params, 0.15, seed=epoch)
        found = generate(tiny_model, params, [prompt] * 20, KEY, config, drafts=drafts)
        assert_drawn_from(found.completions, joint(tiny_model, params, prompt))
        drafts = found.completions
        accepted.append(found.reused / (2 * DRAWS))
    assert accepted[0] == 0 and 0.3 < accepted[1] < 0.95


def test_a_key_gives_two_near_distributions_the_same_token_but_for_six_of_their_distances():
    V, rng = 700, np.random.default_rng(1)  # of 256 cells
    logits = 2 * rng.normal(size=V)
    both = [logits, logits + 0.05 * rng.normal(size=V)]
    p, q = (np.exp(x) / np.exp(x).sum() for x in both)
    keys = jax.random.split(KEY, DRAWS)

    @jax.jit
    def draw(logits):
        return draw_coupled(keys, jnp.broadcast_to(logits, (DRAWS, V)))

    drawn = [draw(jnp.asarray(x, jnp.float32)) for x in both]
    for (tokens, logprobs), of in zip(drawn, (p, q), strict=True):
        counts, often = np.bincount(tokens, minlength=V), of * DRAWS > 10
        f, e = [*counts[often], counts[~often].sum()], [*of[often], of[~often].sum()]
        assert stats.chisquare(f, DRAWS * np.array(e)).pvalue > 1e-3
        np.testing.assert_allclose(logprobs, np.log(of)[tokens], atol=1e-5)
    distance, differ = 0.5 * np.abs(p - q).sum(), (drawn[0][0] != drawn[1][0]).mean()
    assert 0.8 * distance < differ < 6 * distance


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"coupled": False}, "set coupled"),
        ({"repetition_penalty": 1.5}, "no repetition_penalty, got 1.5"),
    ],
)
def test_what_a_draft_cannot_be_verified_under_is_refused(tiny_model, tiny_params, change, words):
    config = dataclasses.replace(CONFIG, **change)
    with pytest.raises(ConfigError, match=words):
        generate(tiny_model, tiny_params, PROMPTS, KEY, config, drafts=[()] * 9)


def test_drafts_are_as_many_as_rows_and_need_attention_in_every_layer(tiny_model, tiny_params):
    with pytest.raises(ConfigError, match="one for each of the 9 rows, got 2"):
        generate(tiny_model, tiny_params, PROMPTS, KEY, CONFIG, drafts=[(), ()])
    model, params = tiny_family("lfm2")
    with pytest.raises(ConfigError, match="layers are all attention"):
        generate(model, params, PROMPTS, KEY, CONFIG, drafts=[()] * 9)
