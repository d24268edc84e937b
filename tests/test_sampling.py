"""Generation: equal to the full forward pass, the same for a row wherever it runs, and ended."""

import dataclasses
import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.errors import NonFiniteError
from relax.losses.logprobs import linear_logprobs
from relax.models import load_pretrained
from relax.sampling import SamplingConfig, generate, stop_decoder
from relax.sampling.rows import Row, plan_segment
from tests.families import FAMILY_NAMES, NEWER, tiny_family

V = 23  # of the tiny model
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [7], [2, 7, 1]]
CONFIG = SamplingConfig(max_new_tokens=8)
# Of the newer families `test_families` compares greedy text with that of transformers.
FAMILIES = (*(n for n in FAMILY_NAMES if n not in NEWER), "llama-dynamic", "phi3-longrope")


@pytest.fixture(scope="module")
def llama(tiny_model, tiny_params):
    return tiny_model, tiny_params


@functools.partial(jax.jit, static_argnums=(0, 1))
def trainers_logprobs(model, temperature, params, ids, positions, segments):
    """`[R, T - 1]`: of each token after the first."""
    hidden = model.apply({"params": params}, ids, positions, segments, method="hidden_states")
    return linear_logprobs(
        hidden[:, :-1].reshape(-1, hidden.shape[2]),
        model.output_matrix(params),
        ids[:, 1:].reshape(-1),
        temperature=temperature,
        softcap=model.config.final_logit_softcapping,
    ).logprobs.reshape(ids.shape[0], -1)


def full_forward_logprobs(model, params, prompts, out, temperature):
    """The trainer's log-probabilities of completions `[R, T]`: rows padded on the left."""
    rows = [[*p, *c] for p, c in zip(prompts, out.completions, strict=True)]
    longest = max(map(len, rows))
    ids, segments, positions = np.zeros((3, len(rows), longest), np.int32)
    ids += 11  # padding may hold anything
    for i, row in enumerate(rows):
        pad = longest - len(row)
        ids[i, pad:], segments[i, pad:], positions[i, pad:] = row, 1, range(len(row))
    logprobs = np.asarray(trainers_logprobs(model, temperature, params, ids, positions, segments))
    found = np.zeros_like(out.logprobs)
    for i, count in enumerate(out.lengths):
        found[i, :count] = logprobs[i, longest - 1 - count :]
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_sampled_logprobs_equal_the_trainers_of_the_same_tokens(name):
    """Prompts of unequal lengths, a temperature, and rows longer than every window."""
    model, params = tiny_family(name)
    depends_on_length = name in ("llama-dynamic", "phi3-longrope")
    prompts = [[3, 1, 4], [7], [2, 7]] if depends_on_length else PROMPTS
    config = SamplingConfig(max_new_tokens=5 if depends_on_length else 8, temperature=1.3)
    out = generate(model, params, prompts, jax.random.key(1), config)
    assert out.lengths.tolist() == [config.max_new_tokens] * 3
    expected = full_forward_logprobs(model, params, prompts, out, 1.3)
    np.testing.assert_allclose(out.logprobs, expected, atol=1e-4, rtol=0)


def test_sampled_logprobs_stay_those_of_the_trainer_while_the_cache_grows(llama):
    """A row of 62 tokens and one that passes the smallest cache's 64 columns."""
    model, params = llama
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, V, n).tolist() for n in (2, 62)]
    config = SamplingConfig(max_new_tokens=20, segment=3)
    out = generate(model, params, prompts, jax.random.key(1), config)
    expected = full_forward_logprobs(model, params, prompts, out, 1.0)
    np.testing.assert_allclose(out.logprobs, expected, atol=1e-4, rtol=0)


def test_greedy_tokens_are_the_most_likely_of_the_full_forward_pass(llama):
    model, params = llama
    config = SamplingConfig(max_new_tokens=6, temperature=0.0)
    out = generate(model, params, PROMPTS, jax.random.key(0), config)
    ids = np.zeros((3, 15), np.int32)
    for i, (prompt, completion) in enumerate(zip(PROMPTS, out.completions, strict=True)):
        ids[i, : len(prompt) + 6] = [*prompt, *completion]
    best = np.asarray(jax.jit(model.apply)({"params": params}, ids).argmax(axis=-1))
    for i, prompt in enumerate(PROMPTS):
        assert out.completions[i] == best[i, len(prompt) - 1 : len(prompt) + 5].tolist()
    expected = full_forward_logprobs(model, params, PROMPTS, out, 1.0)
    np.testing.assert_allclose(out.logprobs, expected, atol=1e-4, rtol=0)


# --- a row is its prompt's and its key's ---


def keys_of(count, seed=5):
    return jax.random.split(jax.random.key(seed), count)


def test_a_row_has_the_same_tokens_alone_in_another_batch_and_at_another_place(llama):
    model, params = llama
    keys = keys_of(3)
    together = generate(model, params, PROMPTS, keys, CONFIG).completions
    for i in range(3):
        alone = generate(model, params, PROMPTS[i : i + 1], keys[i : i + 1], CONFIG)
        assert alone.completions == [together[i]]
    turned = generate(model, params, PROMPTS[::-1], keys[::-1], CONFIG).completions
    assert turned == together[::-1]


def test_fewer_slots_than_rows_give_the_same_tokens_as_one_batch(llama):
    """With ends at random places, so that slots are given to waiting rows at different times."""
    model, params = llama
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, V, rng.integers(1, 30)).tolist() for _ in range(8)]
    config = SamplingConfig(max_new_tokens=24, eos_token_ids=(3, 8), n=2, segment=4)
    key = jax.random.key(2)
    at_once = generate(model, params, prompts, key, config)
    assert set(at_once.finish_reasons) == {"eos", "length"} and len(set(at_once.lengths)) > 4
    by_turns = generate(model, params, prompts, key, dataclasses.replace(config, slots=3))
    assert by_turns.completions == at_once.completions
    assert by_turns.finish_reasons == at_once.finish_reasons
    np.testing.assert_allclose(by_turns.logprobs, at_once.logprobs, atol=1e-4)


def test_the_same_key_gives_the_same_text_and_another_key_another_one(llama):
    model, params = llama
    first, again, other = (
        generate(model, params, PROMPTS, jax.random.key(seed), CONFIG).completions
        for seed in (0, 0, 1)
    )
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_samples_of_a_prompt_differ_and_stand_in_the_order_of_the_prompts(llama):
    """Sample j of prompt i is row i * n + j and has the key fold_in(fold_in(key, i), j)."""
    model, params = llama
    key = jax.random.key(3)
    out = generate(model, params, PROMPTS, key, dataclasses.replace(CONFIG, n=2)).completions
    assert len({tuple(row) for row in out}) == 6
    keys = [jax.random.fold_in(jax.random.fold_in(key, i), j) for i in range(3) for j in range(2)]
    twice = [prompt for prompt in PROMPTS for _ in range(2)]
    assert generate(model, params, twice, jnp.stack(keys), CONFIG).completions == out


def test_a_prompt_is_prefilled_once_for_all_its_samples(llama, monkeypatch):
    from relax.sampling import step

    prefilled = []
    prefill = step.prefill

    def counting(model, params, prompts, lengths):
        prefilled.extend(map(tuple, prompts))
        return prefill(model, params, prompts, lengths)

    monkeypatch.setattr(step, "prefill", counting)
    prompts = [[1, 2, 3, 4], [1, 2, 3, 5], [9, 8, 7, 6]]
    config = dataclasses.replace(CONFIG, n=5, slots=4)
    generate(llama[0], llama[1], prompts, jax.random.key(0), config)
    real = [row for row in prefilled if any(row)]
    assert sorted(row[:3] for row in real) == [(1, 2, 3), (1, 2, 3), (9, 8, 7)]


# --- where rows end ---


def test_an_eos_token_ends_its_row_and_belongs_to_the_completion_and_the_mask(llama):
    """Cut at the first of several ids, an unended row's own tokens are what the row gives."""
    model, params = llama
    free = generate(model, params, PROMPTS, jax.random.key(0), CONFIG)
    ends = (free.completions[0][2], free.completions[1][4])
    config = dataclasses.replace(CONFIG, eos_token_ids=ends)
    out = generate(model, params, PROMPTS, jax.random.key(0), config)
    for i, row in enumerate(free.completions):
        first = next((t for t, token in enumerate(row) if token in ends), None)
        count = len(row) if first is None else first + 1
        assert out.completions[i] == row[:count]
        assert out.mask[i].sum() == out.lengths[i] == count
        assert out.finish_reasons[i] == ("length" if first is None else "eos")
        np.testing.assert_allclose(out.logprobs[i, :count], free.logprobs[i, :count], atol=1e-5)
        assert not out.tokens[i, count:].any() and not out.logprobs[i, count:].any()
    assert out.finish_reasons[:2] == ("eos", "eos")


def text_of(ids):
    """Two letters per token, so that a stop string may begin and end within tokens."""
    return "".join(chr(97 + i // 8) + chr(97 + i % 8) for i in ids)


@pytest.mark.parametrize("segment", [1, 3, 32])
def test_a_stop_string_ends_a_row_across_the_borders_of_tokens(llama, segment):
    model, params = llama
    free = generate(model, params, PROMPTS, jax.random.key(0), CONFIG)
    stop = text_of(free.completions[0])[3:6]  # the end of token 1 and the whole of token 2
    config = dataclasses.replace(CONFIG, stop=(stop, "no such text"), segment=segment)
    out = generate(model, params, PROMPTS, jax.random.key(0), config, decode=text_of)
    for i, row in enumerate(free.completions):
        first = next((n for n in range(1, 9) if stop in text_of(row[:n])), None)
        assert out.completions[i] == row[:first]
        assert out.finish_reasons[i] == ("length" if first is None else "stop")
    assert out.lengths[0] <= 3


def test_an_eos_token_before_a_stop_string_ends_the_row(llama):
    model, params = llama
    free = generate(model, params, PROMPTS[:1], jax.random.key(0), CONFIG).completions[0]
    for place, reason in ((1, "eos"), (3, "stop")):
        config = SamplingConfig(
            max_new_tokens=8, stop=(text_of(free[2:3]),), eos_token_ids=(free[place],)
        )
        out = generate(model, params, PROMPTS[:1], jax.random.key(0), config, decode=text_of)
        first = min(free.index(free[place]), free.index(free[2]))
        assert (out.finish_reasons[0], out.lengths[0]) == (reason, first + 1)


def test_a_stop_string_that_is_or_holds_a_special_token_ends_a_row_at_that_token(llama):
    """It is matched in the text of all tokens, whatever is left out where texts are shown."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    model, params = llama
    free = generate(model, params, PROMPTS[:1], jax.random.key(0), CONFIG).completions[0]
    special = f"<{free[3]}>"
    vocabulary = {f"<{i}>" if i == free[3] else chr(97 + i): i for i in range(V)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=[special]
    )
    decode = stop_decoder(tokenizer)
    assert decode([free[2], free[3]]) == chr(97 + free[2]) + special
    assert tokenizer.decode([free[3]], skip_special_tokens=True) == ""
    assert free.index(free[3]) == 3
    for stop in (special, decode(free[2:4])):
        config = dataclasses.replace(CONFIG, stop=(stop,))
        out = generate(model, params, PROMPTS[:1], jax.random.key(0), config, decode=decode)
        assert (out.completions[0], out.finish_reasons) == (free[:4], ("stop",))


def test_logits_that_are_no_numbers_stop_generation_with_a_sentence(llama):
    model, params = llama
    broken = params | {"norm": {"scale": params["norm"]["scale"] * np.nan}}
    with pytest.raises(NonFiniteError, match="token 0 of completion 0 has the log-probability nan"):
        generate(model, broken, PROMPTS, jax.random.key(0), CONFIG)


@pytest.mark.parametrize(
    ("drawn", "waiting", "plan"),
    [
        ([0] * 8, False, (4, 13, 6)),  # until two rows are left, which fit a cache of two
        ([0] * 2, False, (4, 13, 8)),  # until all have ended
        ([0] * 8, True, (4, 13, 1)),
        ([0] * 5, True, (4, 13, 4)),  # three slots are free already
        ([7, 9], False, (3, 21, 8)),  # no row has more than three tokens to go
    ],
)
def test_a_segment_ends_when_another_one_pays(drawn, waiting, plan):
    prompt = np.zeros(9, np.int32)
    rows = [Row(i, i, prompt, 10, tokens=[1] * count) for i, count in enumerate(drawn)]
    assert plan_segment(rows, slots=8, waiting=waiting, most=4) == plan


def test_min_new_tokens_holds_back_eos_tokens_and_stop_strings(llama):
    model, params = llama
    free = generate(model, params, PROMPTS, jax.random.key(0), CONFIG)
    ends = tuple({row[1] for row in free.completions})
    config = dataclasses.replace(CONFIG, eos_token_ids=ends, min_new_tokens=5)
    out = generate(model, params, PROMPTS, jax.random.key(0), config)
    for row in out.completions:
        assert not set(row[:5]) & set(ends)
    config = dataclasses.replace(CONFIG, stop=(text_of(free.completions[0][:1]),))
    early = generate(model, params, PROMPTS[:1], jax.random.key(0), config, decode=text_of)
    late = dataclasses.replace(config, min_new_tokens=4)
    late = generate(model, params, PROMPTS[:1], jax.random.key(0), late, decode=text_of)
    assert (early.lengths[0], late.lengths[0]) == (1, 4)


def test_limits_are_each_rows_own(llama):
    model, params = llama
    free = generate(model, params, PROMPTS, jax.random.key(0), CONFIG).completions
    out = generate(model, params, PROMPTS, jax.random.key(0), CONFIG, limits=[2, 8, 5])
    assert out.completions == [free[0][:2], free[1], free[2][:5]]
    assert out.finish_reasons == ("length",) * 3


def test_the_loop_ends_when_all_rows_have_ended(llama, monkeypatch):
    """Of a segment of 40 steps, as many are computed as the longest row has tokens."""
    from relax.sampling import step

    model, params = llama
    positions = []
    run = step.run_segment

    def watching(*arguments, **options):
        out = run(*arguments, **options)
        positions.append(np.array(out[1].positions))
        return out

    monkeypatch.setattr(step, "run_segment", watching)
    config = SamplingConfig(max_new_tokens=40, segment=40, eos_token_ids=tuple(range(0, V, 3)))
    out = generate(model, params, PROMPTS, jax.random.key(0), config)
    assert set(out.finish_reasons) == {"eos"} and out.lengths.max() < 30
    assert len(positions) <= 2  # the second, where the last row moved to a smaller cache


def test_tokens_come_to_on_tokens_in_order_and_none_is_missing(llama):
    model, params = llama
    streamed = {0: [], 1: [], 2: []}
    config = dataclasses.replace(CONFIG, segment=3)
    out = generate(
        model,
        params,
        PROMPTS,
        jax.random.key(0),
        config,
        on_tokens=lambda row, tokens: streamed[row].extend(tokens),
    )
    assert list(streamed.values()) == out.completions


# --- compilations ---


def test_a_second_call_of_the_same_buckets_compiles_nothing(llama):
    model, params = llama
    compiled = []

    def listen(name, seconds, **_):
        if "backend_compile" in name or "compile_time" in name:
            compiled.append(name)

    def call(prompts, key, **options):
        config = SamplingConfig(max_new_tokens=9, top_p=0.9, temperature=0.7, n=2, **options)
        generate(model, params, prompts, key, config)

    call(PROMPTS, jax.random.key(0))
    key = jax.random.key(1)  # made before anything is counted
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        # Other prompts and another number of them, another key, other values of the options.
        call([[5, 5], [1, 2, 3, 4, 5, 6, 7], [2], [4]], key)
        call(PROMPTS, key, segment=32)
        assert compiled == []
        call([[5] * 40] * 3, key)
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_no_step_copies_the_cache(llama):
    """In the compiled segment no instruction but the writes of new columns makes an array of it."""
    from relax.sampling import step
    from relax.sampling.distribution import Rules

    model, params = llama
    cache, slots = step.empty(model, keys_of(5), 5, 64, False)
    ends = step.StopRules(jnp.zeros((0,), jnp.int32), jnp.int32(0))
    rules, never = Rules(temperature=jnp.float32(1)), jnp.zeros((5,), bool)
    arguments = (model, params, cache, slots, never, rules, ends, jnp.int32(1), jnp.int32(5))
    program = step.run_segment.lower(*arguments, top_k=0, N=4).compile().as_text()
    shapes = ("f32[5,2,4,64]", "f32[5,2,64,4]")  # keys and values
    assert all(shape in program for shape in shapes)
    made = [line for line in program.splitlines() if re.search(r" = \S+ copy\(", line)]
    assert made and not [line for line in made if any(shape in line for shape in shapes)]


# --- a real model ---


@pytest.mark.slow
def test_greedy_text_of_smollm2_equals_that_of_transformers():
    """64 tokens on ten prompts: each token is transformers' first choice after those before it."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = os.environ["RELAX_SMOLLM2"]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model, params = load_pretrained(directory)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]
    config = SamplingConfig(
        max_new_tokens=64, temperature=0.0, eos_token_ids=(theirs.config.eos_token_id,)
    )
    ours = generate(model, params, prompts, jax.random.key(0), config).completions
    for prompt, completion in zip(prompts, ours, strict=True):
        with torch.no_grad():
            logits = theirs(torch.tensor([[*prompt, *completion[:-1]]])).logits
        assert completion == logits[0, len(prompt) - 1 :].argmax(dim=-1).tolist()
        ended = completion[-1] == theirs.config.eos_token_id
        assert ended or len(completion) == 64


QUESTIONS = [
    "Who wrote Don Quixote?",
    "What is the capital of Australia, and why is it not Sydney?",
    "Write a haiku about the sea.",
    "Explain recursion to a child.",
    "List three prime numbers above 50.",
    "Translate 'good morning' into French, Spanish and German.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "What is 17 times 23?",
    "Hello!",
]
