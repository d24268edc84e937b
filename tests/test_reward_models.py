"""Directories of reward models, and reward models as reward functions."""

import dataclasses
import functools
import json

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.data import Limits, load_tokenizer, prepare_preferences
from relax.engine.reward_model import ModelReward, reward_functions
from relax.errors import ConfigError, DataError, ModelLoadError
from relax.models import Transformer, load_pretrained, save_pretrained
from relax.models.families import FAMILIES
from relax.models.heads import init_head, scores, trunk, with_head
from relax.models.huggingface.classifiers import load_classifier, padded, save_classifier
from relax.rewards import RewardRunner

LENGTHS = np.array([14, 3, 9, 14])
PAD = 60  # in the vocabulary of the tiny families, and the last token of no row


def classifier_of(name: str):
    """A random one of transformers, with one label."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    fields = families.fields_of(name) | {"num_labels": 1, "pad_token_id": PAD}
    config = AutoConfig.for_model(**fields)
    make = AutoModelForSequenceClassification.from_config
    return make(config, attn_implementation="eager").eval()


def scores_of(theirs) -> np.ndarray:
    import torch

    ids = np.where(np.arange(14)[None, :] < LENGTHS[:, None], families.IDS % PAD, PAD)
    mask = torch.tensor(np.arange(14)[None, :] < LENGTHS[:, None])
    with torch.no_grad():
        return theirs(torch.tensor(ids).long(), attention_mask=mask).logits.numpy()[:, 0]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gemma3_text", "phi3", "mixtral"])
def test_scores_equal_those_of_transformers_and_directories_go_both_ways(name, tmp_path):
    pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification

    theirs = classifier_of(name)
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = load_classifier(tmp_path / "theirs")

    @jax.jit
    def ours(params, ids):
        segments = (jnp.arange(14)[None, :] < LENGTHS[:, None]).astype(jnp.int32)
        hidden = model.apply({"params": params}, ids, None, segments, method="hidden_states")
        return scores(params, hidden)[jnp.arange(4), LENGTHS - 1]

    reference = scores_of(theirs)
    assert np.ptp(reference) > 0.1, "too flat to tell anything"
    np.testing.assert_allclose(ours(params, families.IDS % PAD), reference, atol=1e-4)
    path = save_classifier(tmp_path / "ours", model, params)
    again, report = AutoModelForSequenceClassification.from_pretrained(
        path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(again) is type(theirs) and again.config.num_labels == 1
    again.config.pad_token_id = PAD  # there was no tokenizer to tell
    np.testing.assert_array_equal(scores_of(again), reference)


def test_the_class_of_every_family_is_one_of_transformers():
    pytest.importorskip("torch")
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSES,
    )

    from relax.models.huggingface.classifiers import WITHOUT, class_of

    assert {name: class_of(FAMILIES[name]) for name in FAMILIES.keys() - WITHOUT} == {
        name: CLASSES[name] for name in FAMILIES.keys() - WITHOUT
    }
    assert WITHOUT <= FAMILIES.keys() and not WITHOUT & CLASSES.keys()
    with pytest.raises(ConfigError, match="no sequence classifier of model_type 'granite'"):
        class_of(FAMILIES["granite"])


# --- directories ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_model(tiny_model, tmp_path_factory, arithmetic_tokenizer):
    """A random one over the bytes of the embedded tokenizer, and its directory."""
    model = Transformer(dataclasses.replace(tiny_model.config, vocab_size=261))
    params = jax.jit(model.init)(jax.random.key(3), jnp.zeros((1, 8), jnp.int32))["params"]
    params = with_head(params, init_head(jax.random.key(4), model.config, std=1.0))
    path = tmp_path_factory.mktemp("models") / "judge"
    return model, params, save_classifier(path, model, params, arithmetic_tokenizer)


def test_what_is_saved_is_what_is_loaded(reward_model):
    model, params, path = reward_model
    again, loaded = load_classifier(path)
    assert again.config == trunk(model).config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    fields = json.loads((path / "config.json").read_text())
    assert (fields["pad_token_id"], fields["eos_token_id"]) == (0, 1)


def test_a_classifier_is_no_language_model_and_the_other_way_round(reward_model, tmp_path):
    model, params, path = reward_model
    with pytest.raises(ModelLoadError, match="a sequence classifier, which scores texts"):
        load_pretrained(path)
    params = {name: value for name, value in params.items() if name != "score"}
    save_pretrained(tmp_path / "writer", model, params)
    with pytest.raises(ModelLoadError, match="holds no reward model"):
        load_classifier(tmp_path / "writer")


@pytest.mark.parametrize(
    "changes, count",
    [({"id2label": {"0": "bad", "1": "good"}}, 2), ({"id2label": None}, 2), ({"num_labels": 3}, 3)],
)
def test_several_labels_are_refused(reward_model, tmp_path, changes, count):
    fields = json.loads((reward_model[2] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | changes))
    with pytest.raises(ModelLoadError, match=f"this classifier has {count} labels"):
        load_classifier(tmp_path)


def test_a_directory_without_its_head_is_refused(reward_model, tmp_path):
    model, params, path = reward_model
    params = {name: value for name, value in params.items() if name != "score"}
    save_pretrained(tmp_path / "m", model, params)
    (tmp_path / "m" / "config.json").write_text((path / "config.json").read_text())
    with pytest.raises(ModelLoadError, match="1 missing: score.weight"):
        load_classifier(tmp_path / "m")


def test_an_end_token_never_pads(arithmetic_tokenizer):
    """transformers reads the score before padding, and so would read it before the end."""
    assert padded(arithmetic_tokenizer) is arithmetic_tokenizer
    own = padded(arithmetic_tokenizer)
    own = type(own)(tokenizer_object=own.backend_tokenizer, eos_token="<eos>", pad_token="<eos>")
    assert padded(own).pad_token is None and own.pad_token == "<eos>"
    own.add_special_tokens({"bos_token": "<user>"})
    assert padded(own).pad_token == "<user>"


# --- as a reward function ------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def states_of(model, params, ids):
    return model.apply({"params": params}, ids, method="hidden_states")


def score_of(reward_model, text: str, tokenizer) -> float:
    """One text by itself, in numpy."""
    model, params, _ = reward_model
    found = tokenizer(text)["input_ids"]
    ids = np.zeros((1, 48), np.int32)
    ids[0, : len(found)] = found
    hidden = np.float64(states_of(model, params, ids))[0, len(found) - 1]
    return (hidden @ np.float64(params["score"]["kernel"])).item()


def messages(text: str) -> tuple[list[dict], list[dict]]:
    prompt, completion = text.split("|")
    return (
        [{"role": "user", "content": prompt}],
        [{"role": "assistant", "content": completion}],
    )


def test_batches_of_unequal_lengths_have_the_scores_of_each_text(
    reward_model, arithmetic_tokenizer
):
    """Ended or cut short, as texts and as messages, beside a Python function."""
    tokenizer = arithmetic_tokenizer
    judge = ModelReward(reward_model[2], tokenizer)
    cases = [
        ("1+1=", "2<eos>"),
        ("12+30=", "42"),
        ("1+1=", "a long answer, longer than eight<eos>"),
    ]
    ids = [tokenizer(completion)["input_ids"] for _, completion in cases]
    plain = [completion.removesuffix("<eos>") for _, completion in cases]

    def length(completions):
        return [float(len(text)) for text in completions]

    with RewardRunner([judge, length], [2.0, 0.1]) as runner:
        assert runner.names == ["judge", "length"] and "judge" not in " ".join(runner.notes)
        batch = runner.score([prompt for prompt, _ in cases], plain, ids)
    expected = [score_of(reward_model, prompt + text, tokenizer) for prompt, text in cases]
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(batch.rewards[:, 0], expected, atol=1e-5)
    np.testing.assert_allclose(
        batch.total, 2 * np.array(expected) + [0.1 * len(text) for text in plain], atol=1e-5
    )
    pairs = [messages(f"{prompt}|{text}") for (prompt, _), text in zip(cases, plain, strict=True)]
    rendered = [f"<user>{prompt}<assistant>{text}" for prompt, text in cases]
    expected = [score_of(reward_model, text, tokenizer) for text in rendered]
    np.testing.assert_allclose(judge(*zip(*pairs, strict=True), ids), expected, atol=1e-5)


def test_text_of_a_policy_with_other_tokens_is_tokenised_again(reward_model, tmp_path):
    tokenizer = load_tokenizer(reward_model[2])
    other = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<pad>"
    )
    other.add_tokens(["1+1"])
    judge = ModelReward(reward_model[2], other)
    with RewardRunner([judge]) as runner:
        assert runner.notes == [judge.note] and "tokenises the text" in judge.note
    prompt, completion = messages("1+1=|2")
    cases = {
        (other.eos_token_id,): "<user>1+1=<assistant>2<eos>",
        (77,): "<user>1+1=<assistant>2",
    }
    for ids, text in cases.items():
        found = judge.encode(prompt, completion, ids)
        assert found == tokenizer(text)["input_ids"]
    assert judge.encode("1+1=", "2", (77,)) == tokenizer("1+1=2")["input_ids"]


@pytest.mark.parametrize("text", ["2", "2<eos>"])
def test_a_text_is_scored_as_the_rows_that_reward_models_are_trained_on(
    text, reward_model, arithmetic_tokenizer
):
    """With its end token once, whether the text has one or not."""
    judge = ModelReward(reward_model[2], arithmetic_tokenizer)
    row = {"prompt": "1+1=", "chosen": text, "rejected": "3"}
    [item] = prepare_preferences([row], arithmetic_tokenizer, for_reward_model=True)[0].items
    trained = [*item.prompt, *item.chosen]
    assert arithmetic_tokenizer.decode(trained) == "1+1=2<eos>"
    assert judge.encode("1+1=", text) == trained
    judge.reads_tokens = False
    assert judge.encode("1+1=", text, [24, 1]) == trained


def test_a_reward_model_renders_within_the_limits_of_the_run(reward_model, arithmetic_tokenizer):
    limits = Limits(template_output_ratio=1)
    [judge] = reward_functions(
        [f"model:{reward_model[2]}"], arithmetic_tokenizer, (1,), limits=limits
    )
    judge.tokenizer.chat_template = "{% for a in range(2000) %}0123456789{% endfor %}"
    with pytest.raises(DataError, match="template_output_ratio=1 times"):
        judge(*([m] for m in messages("1+1=|2")))


def test_what_a_template_puts_behind_an_end_follows_an_ended_completion(
    reward_model, arithmetic_tokenizer
):
    judge = ModelReward(reward_model[2], arithmetic_tokenizer)
    template = judge.tokenizer.chat_template
    judge.tokenizer.chat_template = template.replace("'<eos>'", "'<eos>\\n'")
    prompt, completion = messages("1+1=|2")
    for ids, text in (([24, 1], "<eos>\n"), ([24], "")):
        found = judge.encode(prompt, completion, ids)
        before = judge.tokenizer("<user>1+1=<assistant>")["input_ids"]
        rest = judge.tokenizer(text)["input_ids"]
        assert found == [*before, 24, *rest]


def test_a_text_longer_than_the_model_is_a_failure_that_is_counted(reward_model):
    judge = ModelReward(reward_model[2], load_tokenizer(reward_model[2]))
    judge.model = judge.model.clone(
        config=dataclasses.replace(judge.model.config, max_position_embeddings=8)
    )
    with RewardRunner([judge], max_errors=1.0) as runner:
        batch = runner.score(["1+1=", "1+1="], ["2", "much longer than it can be"])
    assert [failure.index for failure in batch.failures] == [1]
    assert "has 8 positions" in batch.failures[0].reason


def test_models_are_named_by_a_prefix_and_loaded_before_anything_runs(
    reward_model, arithmetic_tokenizer, tmp_path
):
    specs = ["exact_match", f"model:{reward_model[2]}"]
    name, judge = reward_functions(specs, arithmetic_tokenizer, (1,))
    assert name == "exact_match" and judge.__name__ == "judge"
    with pytest.raises(ModelLoadError, match="no model directory"):
        reward_functions([f"model:{tmp_path / 'none'}"], arithmetic_tokenizer, (1,))
    with pytest.raises(ConfigError, match="names no directory"):
        reward_functions(["model:"], arithmetic_tokenizer, (1,))
    with pytest.raises(ConfigError, match="give relax.engine.reward_model.ModelReward"):
        RewardRunner(["model:there"])
