"""`relax eval`: likelihoods, metrics with standard errors, and what is refused."""

import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from relax.data.prompts import Prompts
from relax.engine.tasks.likelihood import LikelihoodScorer, windows
from relax.engine.tasks.results import exponential, mean, ratio
from relax.engine.tasks.row_tasks import _pairs
from relax.errors import ConfigError, DataError, ModelLoadError
from relax.models import Transformer, TransformerConfig, save_pretrained
from relax.tools.evaluate.config import EvalConfig
from relax.tools.evaluate.evaluate import evaluate

CONFIG = TransformerConfig(
    vocab_size=261,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    tie_word_embeddings=True,
    max_position_embeddings=48,
)


@pytest.fixture(scope="module")
def tiny():
    model = Transformer(CONFIG)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), leaf.dtype), shapes
    )
    return model, params


@pytest.fixture(scope="module")
def directory(tiny, arithmetic_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("eval") / "model"
    return save_pretrained(path, *tiny, arithmetic_tokenizer)


@pytest.fixture(scope="module")
def direct(tiny):
    """`(context, continuation) -> log-probability, all most likely`, one text at a time."""
    model, params = tiny
    apply = jax.jit(lambda ids: jax.nn.log_softmax(model.apply({"params": params}, ids)[0]))

    def likelihood(context, continuation):
        whole = [*context, *continuation]
        row = np.zeros((1, 48), np.int32)
        row[0, : len(whole)] = whole
        table = np.asarray(apply(row), np.float64)[len(context) - 1 : len(whole) - 1]
        chosen = table[np.arange(len(continuation)), continuation]
        return chosen.sum(), bool((table.argmax(1) == continuation).all())

    return likelihood


def test_likelihoods_are_those_of_each_text_alone(tiny, direct):
    """Whatever stands beside it in a batch, in the order in which the pairs were given."""
    rng = np.random.default_rng(1)
    pairs = [
        (rng.integers(0, 261, a).tolist(), rng.integers(0, 261, b).tolist())
        for a, b in [(3, 1), (20, 9), (1, 14), (5, 5), (30, 2)]
    ]
    model, params = tiny
    table = model.apply({"params": params}, np.array([pairs[0][0]]))[0, -1]
    pairs.append((pairs[0][0], [int(table.argmax())]))  # the most likely token
    found = LikelihoodScorer(model, params, batch_size=4)(pairs)
    for likelihood, pair in zip(found, pairs, strict=True):
        expected, greedy = direct(*pair)
        assert likelihood.logprob == pytest.approx(expected, abs=1e-4)
        assert likelihood.is_greedy == greedy
    assert [likelihood.is_greedy for likelihood in found] == [False] * 5 + [True]


def test_every_token_of_a_text_is_predicted_once():
    ids = list(range(1, 12))
    for length in (1, 2, 3, 5, 11, 20):
        parts = windows(ids, 0, length)
        assert [token for _, continuation in parts for token in continuation] == ids
        assert all(len(a) + len(b) - 1 <= length for a, b in parts)
        assert parts[0][0] == [0]
        before = [0, *ids]
        at = 0
        for context, continuation in parts:
            assert context == before[at + 1 - len(context) : at + 1]
            at += len(continuation)
    assert windows([], 0, 4) == []


def test_standard_errors_are_those_of_the_textbook():
    """Of 1, 2, 3, 6: mean 3, s² = (4 + 1 + 0 + 9) / 3, so s / √4 = √(14/3) / 2."""
    value, error = mean([1.0, 2.0, 3.0, 6.0])
    assert value == 3.0 and error == pytest.approx(math.sqrt(14 / 3) / 2)
    assert mean([2.0]) == (2.0, None)
    # With equal weights it is the mean; else 6 / 4 = 1.5, with residuals 0.5 and -0.5.
    assert ratio([1.0, 2.0, 3.0, 6.0], [1] * 4) == pytest.approx((3.0, math.sqrt(14 / 3) / 2))
    assert ratio([2.0, 4.0], [1, 3]) == pytest.approx((1.5, math.sqrt(2 * 0.5) / 4))
    assert exponential(mean([1.0, 3.0])) == pytest.approx((math.e**2, math.e**2))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_three_kinds_of_tasks_and_their_results(directory, tmp_path, direct, capsys):
    """Completions scored by a reward, choices by likelihood, and texts by perplexity."""
    sums = write(
        tmp_path / "sums.jsonl",
        [{"prompt": f"{i}+1=", "answer": "7" if i else ""} for i in range(3)],
    )
    rows = [
        {"prompt": "1+1=", "choices": ["2", "33"], "answer": 0},
        {"prompt": "1+2=", "choices": ["2", "3", "44"], "answer": "3"},
    ]
    (tmp_path / "reward.py").write_text(
        "def short(completions, **columns):\n    return [float(len(c) < 3) for c in completions]\n"
    )
    (tmp_path / "texts.txt").write_text("1+1=2\n10+10=20\n")
    config = EvalConfig().replace(
        model_name_or_path=str(directory),
        tasks=[sums, write(tmp_path / "choices.jsonl", rows), str(tmp_path / "texts.txt")],
        reward_funcs=[f"{tmp_path}/reward.py:short"],
        chat=False,
        max_new_tokens=4,
        eval_batch_size=4,
        output_file=str(tmp_path / "out.json"),
    )
    config.check()
    by_task = list(evaluate(config).values())
    assert [(result.kind, result.n) for result in by_task] == [
        ("rewards", 3),
        ("choices", 2),
        ("perplexity", 2),
    ]
    scored = [sample["rewards"]["short"] for sample in by_task[0].samples]
    assert by_task[0].metrics["short"] == mean(scored)
    ids = {text: [5 + sorted_bytes(text[i]) for i in range(len(text))] for text in TEXTS}
    for sample, row in zip(by_task[1].samples, rows, strict=True):
        expected = [direct(ids[row["prompt"]], ids[c])[0] for c in row["choices"]]
        np.testing.assert_allclose(sample["logprobs"], expected, atol=1e-4)
        right = row["choices"].index("3") if row["answer"] == "3" else row["answer"]
        assert sample["acc"] == (np.argmax(expected) == right)
    nats = [-direct([1], ids[text])[0] for text in ("1+1=2", "10+10=20")]
    metrics = by_task[2].metrics
    assert metrics["token_perplexity"].value == pytest.approx(math.exp(sum(nats) / 13), rel=1e-4)
    assert metrics["bits_per_byte"].value == pytest.approx(sum(nats) / 13 / math.log(2), rel=1e-4)
    assert metrics["word_perplexity"].value == pytest.approx(math.exp(sum(nats) / 2), rel=1e-4)
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["results"][config.tasks.tasks[1]]["metrics"]["acc"]["value"] in (0.0, 0.5, 1.0)
    assert saved["config"]["sampling"]["seed"] == 0 and saved["versions"]["jax"] == jax.__version__
    assert len(saved["samples"][sums]) == 3
    assert "token_perplexity" in capsys.readouterr().out


TEXTS = ("1+1=", "1+2=", "2", "33", "3", "44", "1+1=2", "10+10=20")


def sorted_bytes(character: str) -> int:
    """The place of a printable byte among the symbols of a byte-level alphabet."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet()).index(character)


@pytest.mark.parametrize(
    ("name", "rows", "error", "words"),
    [
        ("sums.jsnol", None, ConfigError, "there is no task .*Did you mean sums.jsonl"),
        ("a.jsonl", [{"prompt": "1"}], ConfigError, "need reward_funcs"),
        ("a.jsonl", [{"messages": []}], DataError, "a.jsonl:1"),
        ("a.jsonl", [{"prompt": "1", "choices": ["a"], "answer": 1}], DataError, "one of the 1"),
        ("a.jsonl", [{"prompt": "1", "choices": "a", "answer": 0}], DataError, "a list of texts"),
        ("a.jsonl", [{"prompt": "1" * 60, "choices": ["a"], "answer": 0}], DataError, "takes 48"),
    ],
)
def test_a_task_that_is_none_is_refused_before_a_model_is_loaded(
    directory, tmp_path, monkeypatch, name, rows, error, words
):
    monkeypatch.setattr("relax.engine.model_source.load_pretrained", None)
    write(tmp_path / "sums.jsonl", [{"prompt": "1"}])
    if rows is not None:
        write(tmp_path / name, rows)
    config = EvalConfig().replace(
        model_name_or_path=str(directory), tasks=[str(tmp_path / name)], chat=False
    )
    with pytest.raises(error, match=words) as caught:
        evaluate(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "reward", "words"),
    [
        ({"prompt": "1", "answer": "1"}, "exact_mtch", "unknown reward 'exact_mtch'"),
        ({"prompt": "1"}, "exact_match", "needs the column 'answer'"),
        ({"prompt": "1" * 46, "answer": "1"}, "exact_match", "a.jsonl:2: the prompt of 46 tokens"),
        ({"prompt": "1"}, "reward.py:one", "must return a list"),
    ],
)
def test_completions_that_cannot_be_scored_are_refused_before_a_model_is_loaded(
    directory, tmp_path, monkeypatch, row, reward, words
):
    monkeypatch.setattr("relax.engine.model_source.load_pretrained", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward.py").write_text("def one(completions, **columns):\n    return [1.0]\n")
    tasks = [write(tmp_path / "a.jsonl", [row | {"prompt": "1"}, row])]
    config = EvalConfig().replace(
        model_name_or_path=str(directory), tasks=tasks, reward_funcs=[reward], chat=False,
        max_new_tokens=4,
    )  # fmt: skip
    with pytest.raises((ConfigError, DataError), match=words):
        evaluate(config)


class Merging:
    """A tokenizer of one token a letter, in which `un` and `unit` are one token."""

    chat_template = None

    def __call__(self, text, add_special_tokens=True):
        found = re.findall("unit|un|.", text) if isinstance(text, str) else map(self, text)
        if not isinstance(text, str):
            return {"input_ids": [one["input_ids"] for one in found]}
        return {"input_ids": [ord(p) if len(p) == 1 else 200 + len(p) for p in found]}


def test_a_choice_that_merges_with_its_prompt_is_scored_by_the_merged_token():
    """All choices of the row start before it; those of other rows where the prompt ends."""
    tokenizer = Merging()
    texts = ["a un", "a b "]
    ids = tokenizer(texts)["input_ids"]
    prompts = Prompts(ids, [{"prompt": text} for text in texts], conversational=False)
    one, two = ([ord(c) for c in text] for text in ("a ", "a b"))
    assert _pairs(tokenizer, prompts, 0, ["it", "do"], "a:1") == [
        (one, [204]),
        (one, [202, ord("d"), ord("o")]),
    ]
    expected = [(two, [ord(" "), ord(c)]) for c in "xy"]
    assert _pairs(tokenizer, prompts, 1, ["x", "y"], "a:2") == expected


def test_a_choice_that_leaves_no_token_of_its_prompt_or_adds_none_is_refused():
    tokenizer = Merging()
    prompts = Prompts([[202]], [{"prompt": "un"}], conversational=False)
    with pytest.raises(DataError, match="a:1: the prompt 'un' has no token that"):
        _pairs(tokenizer, prompts, 0, ["kindness", "it"], "a:1")
    with pytest.raises(DataError, match="a:1: the choice '' adds no token"):
        _pairs(tokenizer, prompts, 0, ["a", ""], "a:1")


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_texts_without_a_word_have_no_word_perplexity_and_a_note(directory, tmp_path, capsys):
    tasks = [write(tmp_path / "a.jsonl", [{"text": "  "}, {"text": " \n"}])]
    config = EvalConfig().replace(model_name_or_path=str(directory), tasks=tasks)
    (result,) = evaluate(config).values()
    assert set(result.metrics) == {"token_perplexity", "byte_perplexity", "bits_per_byte"}
    assert "the texts have no words: no word_perplexity" in capsys.readouterr().err


def test_what_is_not_said_is_asked_for():
    for options, words in (
        ({"tasks": ["a"]}, "model_name_or_path must name a model"),
        ({"model_name_or_path": "m"}, "tasks must name a file"),
        ({"model_name_or_path": "m", "tasks": ["a", "a"]}, "tasks must differ"),
    ):
        with pytest.raises(ConfigError, match=words):
            EvalConfig().replace(**options).check()


def test_a_model_that_cannot_chat_or_holds_nan_is_refused_in_one_sentence(directory, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(directory, copy)
    rows = [{"prompt": "1+1=", "choices": ["2", "3"], "answer": 0}]
    tasks = [write(tmp_path / "a.jsonl", rows)]
    config = EvalConfig().replace(model_name_or_path=str(copy), tasks=tasks, chat=True)
    (copy / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(DataError, match="the chat template refuses the row: no") as caught:
        evaluate(config)
    assert "\n" not in str(caught.value)
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(
        DataError, match="need a chat template and the tokenizer has none"
    ) as caught:
        evaluate(config)
    assert "\n" not in str(caught.value)
    tensors = load_file(copy / "model.safetensors")
    name = min(tensors)
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="NaN") as caught:
        evaluate(config.replace(chat=False))
    assert "\n" not in str(caught.value)
