"""Conversations of several turns: who wrote which token, and what is trained on."""

import jax
import numpy as np
import optax
import pytest

from relax.errors import ConfigError, DataError
from relax.models import Transformer, TransformerConfig
from relax.rewards import EpisodeRunner, Observation
from relax.sampling import SamplingConfig
from relax.trainers import GRPOTrainer
from relax.trainers.rl.episodes import rollout_episodes
from relax.trainers.rl.generation import make_partner
from relax.trainers.rl.partners import TextPartner

A, STOP, EOS, SHOWN = 3, 4, 1, 7  # ids; each is the text of a letter
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def encode(text):
    return [LETTERS.index(letter) for letter in text]


def decode(ids):
    return "".join(LETTERS[int(i)] for i in ids if i != EOS)


class Letters:
    eos_token_id = EOS

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": encode(text)}

    def decode(self, ids, skip_special_tokens=True):
        return decode(ids)


class Echo:
    """Answers a turn that ends in `e` with `hh`; another turn is the last, and worth its length."""

    stop = (LETTERS[STOP],)

    def __init__(self, log):
        self.log = log

    def reset(self, row):
        self.turns = []
        self.log.append(self.turns)
        return row.get("shown")

    def step(self, text):
        self.turns.append(text)
        if text.endswith(LETTERS[STOP]):
            return Observation(LETTERS[SHOWN] * 2, False)
        return Observation(None, True, float(len(text)))


@pytest.fixture(scope="module")
def model_and_params():
    model = Transformer(
        TransformerConfig(
            vocab_size=26,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
    )
    return model, jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]


def partner(log, environment=Echo):
    return TextPartner(EpisodeRunner((), lambda: environment(log)), encode, decode)


ITEM = {"prompt_ids": [[5, 6], [8]], "rows": [{"prompt": "fg", "shown": "kk"}, {"prompt": "i"}]}
# Few tokens are left, so that turns end in either way.
BIAS = {i: -np.inf for i in range(26) if i not in (A, STOP, EOS)}
SAMPLING = SamplingConfig(max_new_tokens=16, n=4, eos_token_ids=(EOS,), logit_bias=BIAS)


@pytest.fixture(scope="module")
def played(model_and_params):
    log = []
    found = rollout_episodes(
        *model_and_params, ITEM, jax.random.key(1), SAMPLING, partner(log), decode
    )
    return found, found.output, found.rewards, log


def test_answers_stand_behind_the_turns_they_answer_and_are_masked(played):
    _, out, _, log = played
    assert {len(turns) for turns in log} - {1}, "no episode of several turns"
    for row, turns in enumerate(log):
        ids = out.completions[row]
        written = [i for i, sampled in zip(ids, out.mask[row], strict=False) if sampled]
        shown = [i for i, sampled in zip(ids, out.mask[row], strict=False) if not sampled]
        assert (out.logprobs[row][~out.mask[row]] == 0).all()
        assert set(shown) <= {SHOWN} and set(written) <= {A, STOP, EOS}
        expected = []
        for turn in turns:
            expected += encode(turn) + ([SHOWN] * 2 if turn.endswith("e") else [EOS])
        assert ids == expected[: len(ids)]


def test_what_reset_shows_belongs_to_the_prompt(played):
    assert played[0].prompt_ids == [[5, 6, 10, 10], [8]]


def test_the_last_turns_reward_is_given_and_an_unfinished_episode_has_none(played):
    _, out, rewards, log = played
    for reward, reason, turns in zip(rewards, out.finish_reasons, log, strict=True):
        if reason == "eos":
            assert reward == len(turns[-1])
        else:
            assert reason == "length" and np.isnan(reward)


def test_log_probabilities_are_those_of_the_trainer_and_answers_are_not_trained_on(
    model_and_params,
):
    model, params = model_and_params
    trainer = GRPOTrainer(
        model,
        optax.sgd(0.1),
        reward_funcs=[lambda completions, **_: [None] * len(completions)],
        tokenizer=Letters(),
        environment_factory=lambda: Echo([]),
        sampling=SamplingConfig(max_new_tokens=16, eos_token_ids=(EOS,)),
        num_generations=4,
        params=params,
    )
    state = trainer.create_train_state(jax.random.key(2))
    (given,) = trainer.make_batches(state, ITEM)
    batch = given.batch
    shown = (batch["completion_ids"] == SHOWN) & ~batch["mask"]
    assert shown.any() and not batch["mask"][shown].any()
    assert given.metrics["rewards/environment/mean"] == pytest.approx(given.metrics["reward"])
    state, metrics = trainer.train_step(state, batch)
    assert metrics["sampling/logp_difference/max"] < 1e-4 and metrics["skipped_steps"] == 0


def test_an_environment_alone_gives_the_rewards_without_any_reward_function(model_and_params):
    model, params = model_and_params
    trainer = GRPOTrainer(
        model,
        optax.sgd(0.1),
        reward_funcs=[],
        tokenizer=Letters(),
        environment_factory=lambda: Echo([]),
        sampling=SamplingConfig(max_new_tokens=16, eos_token_ids=(EOS,)),
        num_generations=4,
        params=params,
    )
    state = trainer.create_train_state(jax.random.key(2))
    (given,) = trainer.make_batches(state, ITEM)
    assert np.isfinite(given.metrics["reward"])
    assert given.metrics["reward"] == pytest.approx(given.metrics["rewards/environment/mean"])


def test_beginnings_that_differ_within_a_group_are_refused(model_and_params):
    class Fickle(Echo):
        def reset(self, row):
            self.log.append(0)
            return "k" * len(self.log)

    with pytest.raises(DataError, match="the same messages, but Fickle.reset does not"):
        rollout_episodes(
            *model_and_params, ITEM, jax.random.key(1), SAMPLING, partner([], Fickle), decode
        )


def test_a_beginning_that_fits_no_row_costs_its_episodes(model_and_params):
    class Long(Echo):
        def reset(self, row):
            self.turns = []
            return "k" * 100 if row["prompt"] == "fg" else None

    found = rollout_episodes(
        *model_and_params, ITEM, jax.random.key(1), SAMPLING, partner([], Long), decode
    )
    lost, played = found.episodes[:4], found.episodes[4:]
    assert found.prompt_ids == ITEM["prompt_ids"]
    assert all(e.record()["failed"] and "a prompt of 102 tokens" in e.errors[0] for e in lost)
    assert not any(e.errors for e in played) and all(e.turns for e in played)
    assert np.isnan(found.rewards[:4]).all()


def test_flags_of_tools_are_refused_where_there_are_none():
    with pytest.raises(ConfigError, match="tool_format has no effect: environment 'Echo' has no t"):
        make_partner(Letters(), (EOS,), (), lambda: Echo([]), tool_format="hermes")
