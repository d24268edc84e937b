"""Rows that are continued from their caches: equal to rows that are computed anew."""

import dataclasses

import jax
import numpy as np
import pytest

from relax.errors import ConfigError
from relax.sampling import SamplingConfig, Session, batch, generate
from tests.families import tiny_family

CONFIG = SamplingConfig(max_new_tokens=6, eos_token_ids=(2,), slots=4, segment=4)
PROMPTS = [[3, 1, 4, 1, 5], [9, 7], [3, 1, 4, 1, 5]]
APPENDED = [[8, 3, 5], [6], [*range(3, 17)]]
MODELS = (
    "llama",
    "mistral",
    "lfm2",
    "qwen3_5_text",
    "gemma4_text",
    "gpt_oss",
)  # attention, windows, convolutions, delta rule, keys and values of other layers, sinks


@pytest.fixture(scope="module", params=MODELS)
def family(request):
    return tiny_family(request.param)


def key(turn, row):
    return jax.random.fold_in(jax.random.key(turn), row)


def finished(session, rows):
    while any(row.reason is None for row in rows):
        assert session.advance()
    return rows


def letters(ids):
    return "".join(chr(97 + i) for i in ids)


def check(model, params, config, rows, turn):
    """The rows' last turns are those of `generate` from all of their tokens before."""
    out = generate(
        model,
        params,
        [row.prompt for row in rows],
        jax.numpy.stack([key(turn, i) for i in range(len(rows))]),
        config,
        decode=letters,
    )
    for row, tokens, logprobs, reason in zip(
        rows, out.completions, out.logprobs, out.finish_reasons, strict=True
    ):
        assert (row.tokens, row.reason) == (tokens, reason)
        np.testing.assert_allclose(row.logprobs, logprobs[: len(tokens)], atol=1e-4)


def play(model, params, config):
    session = Session(model, params, config, decode=letters)
    rows = [session.open(ids, key(0, i)) for i, ids in enumerate(PROMPTS)]
    check(model, params, config, finished(session, rows), 0)
    for turn in (1, 2):
        for i, row in enumerate(rows):
            whole = [*row.prompt, *row.tokens, *APPENDED[i]]
            session.extend(row, APPENDED[i], key(turn, i))
            assert row.prompt.tolist() == whole
        check(model, params, config, finished(session, rows), turn)
    return session


def test_continued_rows_equal_rows_computed_anew(family):
    model, params = family
    session = play(model, params, CONFIG)
    # Equal prompts are computed once; the last token of a turn enters the cache when it goes on.
    assert session.counts["prefilled"] == 4 + 1
    assert session.counts["appended"] == 2 * sum(map(len, APPENDED))


def test_long_texts_are_appended_in_parts(tiny_model, tiny_params, monkeypatch):
    monkeypatch.setattr(batch, "EXTENSION", 8)
    play(tiny_model, tiny_params, CONFIG)


def test_a_turn_that_ends_at_a_stop_string_is_continued_without_what_came_after(family):
    model, params = family
    # Single letters end turns in the middle of a segment.
    stop = tuple(letters(range(20, 60)))
    session = play(model, params, dataclasses.replace(CONFIG, stop=stop))
    # The state of another mixer has what came after, so such a row is computed again.
    attends = all(layer.mixer == "attention" for layer in model.config.layers)
    assert (session.counts["appended"] == 2 * sum(map(len, APPENDED))) == attends


def test_more_rows_than_slots_wait_and_closed_rows_make_room(tiny_model, tiny_params):
    session = Session(tiny_model, tiny_params, CONFIG, slots=2)
    rows = [session.open([3, 4 + i], key(0, i)) for i in range(5)]
    assert session.free_slots == 2 - 5
    order = []
    while len(order) < 5:
        for row, _ in session.advance():
            if row.reason is not None:
                order.append(rows.index(row))
                session.close(row)
    assert sorted(order) == [*range(5)] and not session.under_way() and session.free_slots == 2
    check(tiny_model, tiny_params, CONFIG, rows, 0)


def test_rows_wait_while_others_keep_their_slots(tiny_model, tiny_params):
    session = Session(tiny_model, tiny_params, CONFIG, slots=2)
    rows = [session.open([3, 4 + i], key(0, i)) for i in range(3)]
    finished(session, rows[:2])
    assert not session.under_way() and session.advance() == []
    session.close(rows[0])
    assert session.under_way()
    check(tiny_model, tiny_params, CONFIG, finished(session, rows[2:]) and rows, 0)


def test_a_row_that_is_closed_while_it_is_decoded_disturbs_no_other(tiny_model, tiny_params):
    config = dataclasses.replace(CONFIG, eos_token_ids=(), segment=2)
    session = Session(tiny_model, tiny_params, config)
    rows = [session.open([3, 4 + i], key(0, i)) for i in range(3)]
    session.advance()
    session.close(rows[1])
    check(tiny_model, tiny_params, config, finished(session, [rows[0]]), 0)
    with pytest.raises(ConfigError, match="must have ended before it is extended"):
        session.extend(rows[1], [3], key(1, 1))


def test_appended_tokens_count_for_the_repetition_penalty(tiny_model, tiny_params):
    play(tiny_model, tiny_params, dataclasses.replace(CONFIG, repetition_penalty=1.5))


def test_what_does_not_fit_the_model_is_refused(tiny_model, tiny_params):
    session = Session(tiny_model, tiny_params, CONFIG)
    with pytest.raises(ConfigError, match="must hold ids from 0 to 22, got 99"):
        session.open([99], key(0, 0))
    (row,) = finished(session, [session.open([3], key(0, 0))])
    room = tiny_model.config.max_position_embeddings
    with pytest.raises(ConfigError, match=f"do not fit the {room} positions"):
        session.extend(row, [3] * room, key(1, 0))
