"""Requests side by side: each has its own settings, and none depends on its neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.errors import ConfigError, NonFiniteError
from relax.sampling import Request, Requests, SamplingConfig, generate
from relax.sampling.request_step import prompt_logprobs
from tests.families import tiny_family

EOS = 22
PROMPTS = [[3, 4, 5], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1], [2, 2]]


def decode(ids):
    return "".join(chr(97 + i) for i in ids)


@pytest.fixture
def requests(tiny_model, tiny_params):
    return Requests(tiny_model, tiny_params, (EOS,), decode, slots=3, segment=4)


def finish(requests, *rows):
    while any(row.reason is None for row in rows):
        requests.advance()


def key(seed):
    return jax.random.key(seed)


def test_greedy_rows_equal_generate_beside_rows_that_are_sampled(requests, tiny_model, tiny_params):
    config = SamplingConfig(max_new_tokens=40, temperature=0.0, eos_token_ids=(EOS,))
    out = generate(tiny_model, tiny_params, PROMPTS, key(0), config)
    greedy = [requests.submit(Request(p, key(1), 40, temperature=0.0)) for p in PROMPTS]
    noise = [requests.submit(Request([5], key(i), 30, temperature=2.0)) for i in range(4)]
    finish(requests, *greedy, *noise)
    assert [row.tokens for row in greedy] == out.completions
    assert tuple(row.reason for row in greedy) == out.finish_reasons
    for row, expected in zip(greedy, out.logprobs, strict=True):
        np.testing.assert_allclose(row.logprobs, expected[: len(row.tokens)], atol=1e-5)
        assert row.sampled_logprobs == pytest.approx(row.logprobs, abs=1e-6)


def test_logprobs_and_alternatives_are_the_models(requests, tiny_model, tiny_params):
    request = Request([3, 4, 5], key(1), 12, temperature=0.5, top_p=0.9, alternatives=True)
    row = requests.submit(request)
    finish(requests, row)
    ids = jnp.array([[*request.prompt, *row.tokens]])
    logits = np.asarray(tiny_model.apply({"params": tiny_params}, ids))[0, 2:-1]
    expected = np.asarray(jax.nn.log_softmax(logits))
    found = expected[np.arange(len(row.tokens)), row.tokens]
    np.testing.assert_allclose(row.logprobs, found, atol=1e-5)
    for top, ids, all_of_token in zip(row.top_logprobs, row.top_tokens, expected, strict=True):
        np.testing.assert_allclose(top, np.sort(all_of_token)[::-1][:20], atol=1e-5)
        np.testing.assert_allclose(all_of_token[ids], top, atol=1e-5)
    # The sampled distribution: temperature 0.5, then the fewest tokens with 0.9 of it.
    for token, logprob, row_logits in zip(row.tokens, row.sampled_logprobs, logits, strict=True):
        probs = np.exp(row_logits / 0.5 - np.logaddexp.reduce(row_logits / 0.5))
        order = np.argsort(-probs)
        kept = order[: np.searchsorted(np.cumsum(probs[order]), 0.9) + 1]
        assert token in kept
        assert logprob == pytest.approx(np.log(probs[token] / probs[kept].sum()), abs=1e-4)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_seed_gives_the_same_whatever_runs_beside(tiny_model, tiny_params, fixed):
    def run(*before, late=()):
        requests = Requests(
            tiny_model, tiny_params, (EOS,), decode, slots=3, segment=4, max_length=128, fixed=fixed
        )
        others = [requests.submit(Request(p, key(9), 60, temperature=1.5)) for p in before]
        row = requests.submit(Request(PROMPTS[2], key(42), 50, temperature=1.2, top_p=0.95))
        requests.advance()
        others += [requests.submit(Request(p, key(8), 70)) for p in late]
        finish(requests, row, *others)
        return row

    alone = run()
    for row in (run([1]), run([1], [2, 3], [4]), run([5], late=([6], [7] * 30))):
        assert row.tokens == alone.tokens
        if fixed:  # every bit
            assert row.sampled_logprobs == alone.sampled_logprobs


def test_a_stop_string_a_limit_and_a_cancellation_end_a_row(requests):
    samples = [requests.submit(Request([3, 4], key(n), 30)) for n in range(20)]
    finish(requests, *samples)
    seed = next(n for n, row in enumerate(samples) if len(row.tokens) > 8)
    whole = samples[seed]
    text = decode(whole.tokens)
    stopped = requests.submit(Request([3, 4], key(seed), 30, stop=(text[4:6],)))
    short = requests.submit(Request([3, 4], key(seed), 3))
    finish(requests, stopped, short)
    assert stopped.reason == "stop" and decode(stopped.tokens) == text[: text.index(text[4:6]) + 2]
    assert len(stopped.logprobs) == len(stopped.tokens)
    assert (short.reason, short.tokens) == ("length", whole.tokens[:3])
    long = [requests.submit(Request([3, 4], key(n), 900)) for n in range(3)]
    late = requests.submit(Request([3, 4], key(seed), 3))
    requests.advance()
    assert late.tokens == [] and len(requests.waiting) == 1
    for row in long:
        requests.cancel(row)
    finish(requests, late)
    assert late.tokens == short.tokens and not requests.under_way
    assert {row.reason for row in long} <= {"cancelled", "eos"}


def test_samples_of_a_prompt_prefill_it_once(requests):
    rows = [requests.submit(Request(PROMPTS[2], key(n), 4)) for n in range(5)]
    finish(requests, *rows)
    assert requests.prefilled_tokens == len(PROMPTS[2]) - 1


def test_what_cannot_be_sampled_is_refused(requests, tiny_model, tiny_params):
    for request, reason in (
        (Request([], key(0), 4), "prompt 0 is empty"),
        (Request([23], key(0), 4), "must hold ids from 0 to 22, got 23"),
        (Request([1] * 10, key(0), 10**6), "do not fit the .* positions of the model"),
    ):
        with pytest.raises(ConfigError, match=reason):
            requests.submit(request)
    bad = jax.tree.map(lambda x: x * jnp.nan, tiny_params)
    requests.set_params(bad)
    requests.submit(Request([3], key(0), 4))
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        requests.advance()


def test_logprobs_of_a_prompt_are_the_models(tiny_model, tiny_params):
    ids = jnp.array([3, 4, 5, 6, 0, 0, 0, 0])
    logits = tiny_model.apply({"params": tiny_params}, ids[None, :4])[0]
    expected = np.asarray(jax.nn.log_softmax(logits))
    found, top_ids, top = prompt_logprobs(tiny_model, tiny_params, ids, K=2)
    np.testing.assert_allclose(found[1:4], [expected[i - 1, ids[i]] for i in (1, 2, 3)], atol=1e-5)
    np.testing.assert_allclose(top[1:4], np.sort(expected[:3])[:, ::-1][:, :2], atol=1e-5)
    assert np.argmax(expected[:3], axis=1).tolist() == top_ids[1:4, 0].tolist()


@pytest.fixture
def caching(tiny_model, tiny_params):
    options = {"slots": 2, "segment": 4, "prefix_caching": True}
    return Requests(tiny_model, tiny_params, (EOS,), decode, **options)


def test_the_next_turn_of_a_chat_computes_its_new_tokens_alone(caching, tiny_model, tiny_params):
    config = SamplingConfig(max_new_tokens=9, temperature=0.0, eos_token_ids=(EOS,))
    prompt, computed = list(PROMPTS[2]), 0
    for turn in range(3):
        new = len(prompt) - 1 if not turn else 5  # the last sampled token and four of the user
        beside = caching.submit(Request([turn + 3, 4], key(turn), 3))
        row = caching.submit(Request(prompt, key(0), 9, temperature=0.0))
        finish(caching, row, beside)
        computed += new + 1
        assert caching.prefilled_tokens == computed
        assert row.reused == len(prompt) - 1 - new
        out = generate(tiny_model, tiny_params, [prompt], key(0), config)
        assert row.tokens == out.completions[0]
        np.testing.assert_allclose(row.logprobs, out.logprobs[0], atol=1e-5)
        prompt = [*prompt, *row.tokens, 6, 7, 8, turn, 9]


def test_a_chat_that_was_stopped_or_rewritten_keeps_what_is_still_its_own(tiny_model, tiny_params):
    options = {"slots": 1, "segment": 4, "prefix_caching": True}
    requests = Requests(tiny_model, tiny_params, (EOS,), decode, **options)
    config = SamplingConfig(max_new_tokens=9, temperature=0.0, eos_token_ids=(EOS,))

    def ask(prompt, **fields):
        row = requests.submit(Request(prompt, key(0), 9, temperature=0.0, **fields))
        finish(requests, row)
        return row

    first = ask(PROMPTS[2])
    stopped = ask(PROMPTS[2], stop=(decode(first.tokens[2:4]),))
    assert stopped.reason == "stop" and len(stopped.tokens) < len(first.tokens)
    followed = [*PROMPTS[2], *stopped.tokens, 11, 12]
    changed = [*followed[:-1], 13, 14]
    for prompt, reused in ((followed, len(followed) - 3), (changed, len(followed) - 1)):
        row = ask(prompt)
        assert row.reused == reused
        out = generate(tiny_model, tiny_params, [prompt], key(0), config)
        assert row.tokens == out.completions[0]
    assert ask([13] * 20).reused == 0


def test_without_prefix_caching_nothing_is_reused(requests):
    for _ in range(2):
        row = requests.submit(Request([*PROMPTS[2], 9, 9], key(0), 2))
        finish(requests, row)
        requests.prefilled.clear()
    assert row.reused == 0 and requests.prefilled_tokens == 2 * (len(PROMPTS[2]) + 1)


def test_free_slots_of_long_rows_give_up_their_columns(caching):
    finish(caching, caching.submit(Request([5] * 150, key(0), 4)))
    assert caching.S == 256
    short = [caching.submit(Request([2, 2, n % 20], key(n), 100)) for n in range(12)]
    finish(caching, *short)
    finish(caching, caching.submit(Request([7, 8], key(0), 2)))
    assert caching.S < 256 and len(caching.parked.ids) <= 2


def test_states_without_columns_are_continued_whole_or_not_at_all():
    model, params = tiny_family("lfm2")
    requests = Requests(model, params, (), decode, slots=2, segment=4, prefix_caching=True)
    config = SamplingConfig(max_new_tokens=5, temperature=0.0)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    for new, reused in (([], 0), ([8, 3], 14), ([7], 21)):
        prompt = [*prompt, *new]
        row = requests.submit(Request(prompt, key(0), 5, temperature=0.0))
        finish(requests, row)
        assert row.reused == reused
        out = generate(model, params, [prompt], key(0), config)
        assert row.tokens == out.completions[0]
        np.testing.assert_allclose(row.logprobs, out.logprobs[0], atol=1e-5)
        prompt = [*prompt, *row.tokens]
    changed = [*prompt[:-3], 1, 1, 1]
    row = requests.submit(Request(changed, key(0), 5, temperature=0.0))
    finish(requests, row)
    assert row.reused == 0


def test_a_length_above_the_models_positions_is_refused(tiny_model, tiny_params):
    room = tiny_model.config.max_position_embeddings
    assert Requests(tiny_model, tiny_params, (EOS,), decode, max_length=room).room == room
    with pytest.raises(ConfigError, match=rf"max_length={room + 1} .* above the {room} pos"):
        Requests(tiny_model, tiny_params, (EOS,), decode, max_length=room + 1)
