"""Reward models: the loss, where the score is read, what is trained, how rows become pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import bits

from relax.config import RewardModelConfig, create_default_config, options
from relax.data import PreferenceLoader, prepare_preferences
from relax.data.preference import Preference, Preferences
from relax.errors import ConfigError, DataError
from relax.losses.reward import bradley_terry_loss, centering_loss
from relax.models.config import LoRA
from relax.models.heads import init_head, with_head
from relax.trainers import RewardTrainer

V = 23
PAIRS = [  # prompt, chosen, rejected; one has no prompt
    ([5, 6, 7], [1, 2], [3]),
    ([], [10, 2, 2], [4, 8, 9]),
    ([1], [2], [3, 4, 5, 6]),
    ([9, 8], [7, 7], [6, 1]),
    ([12], [13, 1], [1]),
]
MARGINS = [0.0, 0.5, 1.0, -0.5, 0.25]


def loader(rows, packs) -> PreferenceLoader:
    items = [
        Preference(*(np.array(part, np.int32) for part in pair), margin=margin)
        for pair, margin in zip(PAIRS, MARGINS, strict=True)
    ]
    return PreferenceLoader(
        Preferences(items, True, has_margins=True),
        rows,
        shuffle=False,
        packed_length=16 if packs else None,
    )


@pytest.fixture(scope="module")
def params(tiny_model, tiny_params):
    """With a head whose scores are far from each other."""
    return with_head(tiny_params, init_head(jax.random.key(1), tiny_model.config, std=1.0))


@pytest.fixture(scope="module")
def rewards(tiny_model, params) -> np.ndarray:
    """`[5, 2]`: the last hidden state of each text by itself, times the head, in numpy."""
    kernel = np.float64(params["score"]["kernel"])[:, 0]
    out = []
    for prompt, *answers in PAIRS:
        for answer in answers:
            ids = np.zeros((1, 8), np.int32)
            ids[0, : len(prompt + answer)] = prompt + answer
            hidden = tiny_model.apply({"params": params}, ids, method="hidden_states")
            out.append(np.float64(hidden)[0, len(prompt + answer) - 1] @ kernel)
    return np.array(out).reshape(5, 2)


def test_losses_have_the_golden_numbers():
    chosen, rejected = jnp.array([1.0, 0.2]), jnp.array([0.5, 0.6])
    plain = bradley_terry_loss(chosen, rejected).mean()
    np.testing.assert_allclose(plain, 0.693546, atol=1e-6)
    with_margin = bradley_terry_loss(chosen, rejected, jnp.array([0.3, 0.1])).mean()
    np.testing.assert_allclose(with_margin, 0.786108, atol=1e-6)
    centred = plain + 0.01 * centering_loss(chosen, rejected).mean()
    np.testing.assert_allclose(centred, 0.707996, atol=1e-6)


def test_layouts_and_micro_batches_make_the_update_of_each_text_by_itself(
    tiny_model, params, rewards
):
    """Also with an empty row, and where a pair has no prompt."""
    difference = rewards[:, 0] - rewards[:, 1]
    losses = np.log1p(np.exp(np.array(MARGINS) - difference)) + 0.1 * rewards.sum(axis=1) ** 2
    expected = {
        "loss": losses.mean(),
        "accuracy": (difference > 0).mean(),
        "margin": difference.mean(),
        "min_reward": rewards.min(),
        "mean_reward": rewards.mean(),
        "max_reward": rewards.max(),
        "num_tokens": sum(2 * len(p) + len(c) + len(r) for p, c, r in PAIRS),
    }
    assert 0 < expected["accuracy"] < 1
    states = []
    for rows, packs, steps in ((6, False, 3), (5, True, 1)):
        trainer = RewardTrainer(
            tiny_model,
            optax.sgd(0.1),
            params=params,
            center_rewards_coefficient=0.1,
            gradient_accumulation_steps=steps,
        )
        state = trainer.create_train_state(jax.random.key(0))
        state, metrics = trainer.train_step(state, *map(trainer.pack, loader(rows, packs)))
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
        states.append(state.params)
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_with_adapters_they_and_the_head_are_trained_and_nothing_else(tiny_model, params):
    model = tiny_model.clone(lora=LoRA(2, 4, 0.0, ("q_proj",)))
    trainer = RewardTrainer(model, optax.adam(0.1), params=params)
    state = trainer.create_train_state(jax.random.key(0))
    assert sorted(state.params) == ["layers_0", "score"] and "score" not in state.frozen["base"]
    before, frozen = bits(state.params), bits(state.frozen)
    for _ in range(2):  # the first update moves B alone
        state, _ = trainer.train_step(state, *map(trainer.pack, loader(6, False)))
    assert bits(state.frozen) == frozen
    assert not set(before) & set(bits(state.params))


def test_a_language_model_gets_a_head_in_place_of_its_output_matrix(tiny_model, tiny_params):
    untied = tiny_model.clone(
        config=tiny_model.config.__class__(
            **{**tiny_model.config.__dict__, "tie_word_embeddings": False}
        )
    )
    given = tiny_params | {"lm_head": jnp.ones((V, 16))}
    trainer = RewardTrainer(untied, optax.sgd(0.1), params=given)
    made = trainer.create_train_state(jax.random.key(0)).params
    assert made.keys() == {*tiny_params, "score"}
    assert made["score"]["kernel"].shape == (16, 1) and np.std(made["score"]["kernel"]) > 0.05
    fresh = RewardTrainer(untied, optax.sgd(0.1)).create_train_state(jax.random.key(0)).params
    assert jax.tree.structure(fresh) == jax.tree.structure(made)


def test_a_centering_coefficient_that_centres_nothing_is_refused(tiny_model):
    with pytest.raises(ValueError, match="must be above 0, or None for no centering, got 0"):
        RewardTrainer(tiny_model, optax.sgd(0.1), center_rewards_coefficient=0)


# --- rows ----------------------------------------------------------------------------------------


def texts(tokenizer, item) -> tuple[str, ...]:
    return tuple(tokenizer.decode(part.tolist()) for part in item[:3])


def test_margins_are_read_with_the_pairs(arithmetic_tokenizer):
    rows = [
        {"prompt": "1+1=", "chosen": "2", "rejected": "3", "margin": 2},
        {"prompt": "1+2=", "chosen": "3", "rejected": "4", "margin": 0.5},
    ]
    found, report = prepare_preferences(rows, arithmetic_tokenizer, for_reward_model=True)
    assert [item.margin for item in found.items] == [2.0, 0.5] and "margin" in report.columns
    (batch,) = PreferenceLoader(found, 3, shuffle=False)
    assert batch["margin"].tolist() == [2.0, 0.5, 0.0]
    other, report = prepare_preferences(rows, arithmetic_tokenizer)
    assert report.unused_columns == ("margin",) and found.digest != other.digest
    rows[1]["margin"] = None
    with pytest.raises(DataError, match="'margin' must be a number in every row, it is None"):
        prepare_preferences(rows, arithmetic_tokenizer, for_reward_model=True)


def test_pairs_without_a_common_beginning_have_an_empty_prompt(arithmetic_tokenizer):
    def read(**row):
        found, _ = prepare_preferences([row], arithmetic_tokenizer, for_reward_model=True)
        return texts(arithmetic_tokenizer, found.items[0])

    assert read(chosen="Well.", rejected="Badly.") == ("", "Well.<eos>", "Badly.<eos>")
    user, other = ({"role": "user", "content": text} for text in ("a", "b"))
    said = {"role": "assistant", "content": "c"}
    wholes = ("<user>a<assistant>c<eos>", "<user>b<assistant>c<eos>")
    assert read(chosen=[user, said], rejected=[other, said]) == ("", *wholes)
    assert read(chosen=[user, said], rejected=[user, said | {"content": "d"}])[0] == (
        "<user>a<assistant>"
    )
    assert (
        read(chosen_ids=[7, 8], rejected_ids=[7, 9])[1:]
        == read(prompt_ids=[7], chosen_ids=[8], rejected_ids=[9])[1:]
    )
    with pytest.raises(DataError, match="the prompt has no token"):
        prepare_preferences([{"chosen": "Well.", "rejected": "Badly."}], arithmetic_tokenizer)


@pytest.mark.parametrize(
    ("later", "reason"),
    [
        ({"margin": 2.0}, "row 0: 'margin' must be a number in every row, it is None"),
        ({"margin": float("nan")}, "row 0: 'margin' must be a number in every row"),
        ({"prompt": "Hi. "}, "row 1: the row has 'prompt', and the first row has none"),
    ],
)
def test_a_column_of_later_rows_is_refused_by_row_and_never_left_out(
    later, reason, arithmetic_tokenizer
):
    rows = [{"chosen": "1+1=2", "rejected": "1+1=3"}, {"chosen": "a b", "rejected": "a c"} | later]
    with pytest.raises(DataError, match=reason):
        prepare_preferences(rows, arithmetic_tokenizer, for_reward_model=True)
    ids = [{f"{name}_ids": [1, i] for i, name in enumerate(("chosen", "rejected"))}] * 2
    rows = [ids[0], ids[1] | {"prompt_ids": [5]}]
    with pytest.raises(DataError, match="row 1: the row has 'prompt_ids', and the first row"):
        prepare_preferences(rows, arithmetic_tokenizer, for_reward_model=True)


# --- options -------------------------------------------------------------------------------------


def test_defaults_are_those_of_trl():
    plain = RewardModelConfig()
    assert (plain.hyperparams.learning_rate, plain.data.max_length) == (1e-4, 1024)
    assert plain.reward_model.center_rewards_coefficient is None
    assert plain.peft.lora_dropout == 0.0
    assert "center_rewards_coefficient" in options(RewardModelConfig)


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"use_peft": True, "merge_lora": False}, "merge_lora must be true: .* saved whole"),
        ({"center_rewards_coefficient": 0.0}, "center_rewards_coefficient must be above 0"),
        ({"pack_pairs": True, "max_length": None}, "pack_pairs needs max_length"),
        ({"lora_r": 4}, "use_peft is false"),
    ],
)
def test_what_has_no_effect_or_contradicts_is_refused(fields, reason):
    named = {"model_path": "DIR", "dataset_path": "FILE"}  # else it is the embedded run's
    with pytest.raises(ConfigError, match=reason):
        create_default_config(config_class=RewardModelConfig, **named, **fields)
