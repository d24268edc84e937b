"""lm_eval: the model class `relax` and its tasks, held to lm_eval's own class `hf`."""

import json
import math
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.engine.tasks.harness import HarnessModel, sampling_options
from relax.errors import ConfigError, DataError
from relax.models import Transformer, TransformerConfig, save_pretrained
from relax.tools.evaluate.config import EvalConfig
from relax.tools.evaluate.evaluate import evaluate

LENGTH = 40
CONFIG = TransformerConfig(
    vocab_size=261,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    tie_word_embeddings=True,
    max_position_embeddings=LENGTH,
)
TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ raise_exception('no system messages') }}{%- endif -%}
{{ '<' + message['role'][0] + '>' + message['content'] + '<eos>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<a>' }}{%- endif -%}"""


def make_tokenizer():
    """Bytes, `ab` as one token, and a BOS before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<bos>", "<eos>", "<u>", "<a>"]
    symbols = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[("a", "b")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        additional_special_tokens=["<u>", "<a>"],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
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
def directory(tiny, tmp_path_factory):
    return save_pretrained(tmp_path_factory.mktemp("harness") / "model", *tiny, make_tokenizer())


@pytest.fixture(scope="module")
def harness(directory):
    return HarnessModel(str(directory), batch_size=4, max_gen_toks=6)


@pytest.fixture(scope="module")
def table(tiny):
    """`ids -> [len(ids), V]`, the log-probabilities after each token of a text alone."""
    model, params = tiny
    apply = jax.jit(lambda ids: jax.nn.log_softmax(model.apply({"params": params}, ids)[0]))

    def of(ids):
        row = np.zeros((1, LENGTH), np.int32)
        row[0, : len(ids)] = ids
        return np.asarray(apply(row), np.float64)[: len(ids)]

    return of


def request(*args):
    return types.SimpleNamespace(args=args)


def ids_of(text):
    """Tokens without BOS; `ab` counts as one."""
    return make_tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_log_likelihoods_are_those_of_the_forward_pass(harness, table):
    """BOS stands before every text, once; spaces go to the continuation; tokens may merge."""
    merged = ids_of("ab")
    assert len(merged) == 1  # so x a b c is x ab c
    cases = [
        (("1+1=", "2"), [0, *ids_of("1+1=")], ids_of("2")),
        (("1+1= ", "2"), [0, *ids_of("1+1=")], ids_of(" 2")),
        (("", "12"), [0], ids_of("12")),
        (("<bos>1", "2"), [0, *ids_of("1")], ids_of("2")),
        (("xa", "bc"), [0, *ids_of("xa")], ids_of("c")),  # x ab c: as many tokens go as x a has
        (("1" * 60, "23"), ids_of("1" * (LENGTH - 1)), ids_of("23")),
    ]
    notes = []
    harness.tell = notes.append
    found = harness.loglikelihood([request(*args) for args, _, _ in cases])
    for (logprob, greedy), (args, context, continuation) in zip(found, cases, strict=True):
        whole = [*context, *continuation][:-1]
        rows = table(whole)[len(whole) - len(continuation) :]
        expected = rows[np.arange(len(continuation)), continuation].sum()
        assert logprob == pytest.approx(expected, abs=1e-4), args
        assert greedy == bool((rows.argmax(axis=1) == continuation).all())
    assert notes == [f"1 contexts are truncated: their first tokens do not fit the {LENGTH} of the "
                     "model"]  # fmt: skip


def test_rolling_likelihood_predicts_every_token_once(harness, table):
    """A text of two and a half windows: the last one reaches back as far as the model takes."""
    text = "".join(chr(97 + i * 7 % 26) for i in range(100))
    ids = [0, *ids_of(text)]  # BOS is predicted too, from a BOS, as in hf
    total = 0.0
    for start in range(0, len(ids), LENGTH):
        stop = min(start + LENGTH, len(ids))
        context = [0, *ids][max(stop - LENGTH, 0) : stop]
        rows = table(context)[-(stop - start) :]
        total += rows[np.arange(stop - start), ids[start:stop]].sum()
    found = harness.loglikelihood_rolling([request(text), request("<bos>1")])
    assert found[0] == pytest.approx(total, abs=1e-3)
    # A text that begins with BOS gets no second one; it too is predicted.
    assert found[1] == pytest.approx(table([0, 0])[np.arange(2), [0, *ids_of("1")]].sum(), abs=1e-4)


def greedy(table, text, most):
    ids = [0, *ids_of(text)]
    for _ in range(most):
        ids.append(int(table(ids)[-1].argmax()))
    return ids[-most:]


def test_completions_end_before_the_first_text_of_until(harness, table):
    tokenizer, text = make_tokenizer(), ""
    for number in range(50):  # most completions of random weights repeat one character
        prompt = str(number)
        text = tokenizer.decode(greedy(table, prompt, 6), skip_special_tokens=True)
        if len(text) == 6 and len(set(text)) > 1 and "\ufffd" not in text:
            break
    kept = text[: len(text) - len(text.lstrip(text[0]))]
    stop = text[len(kept)]
    assert 0 < len(kept) < 6 and stop not in kept
    found = harness.generate_until(
        [
            request(prompt, {"until": [], "do_sample": False}),
            request(prompt, {"until": [stop, "?"], "max_gen_toks": 6}),
            request(prompt, {"until": "", "max_new_tokens": 3, "temperature": 0.0}),
        ]
    )
    assert found == [text, kept, text[:3]]
    sampled = {"do_sample": True, "temperature": 5.0, "max_gen_toks": 6}
    found = harness.generate_until([request("12", sampled), request("12", sampled)])
    assert found[0] != found[1]


def test_options_of_a_generation_are_read_as_lm_eval_reads_them():
    greedy = (("temperature", 0.0),)
    assert sampling_options({}, 256) == (256, (), greedy)
    assert sampling_options({"do_sample": False, "temperature": 1.0, "top_p": 0.9}, 8) == (
        8,
        (),
        greedy,
    )
    assert sampling_options({"temperature": 0.5, "top_p": 0.9, "max_tokens": 4}, 8) == (
        4,
        (),
        (("temperature", 0.5), ("top_p", 0.9)),
    )
    assert sampling_options({"do_sample": True, "num_beams": 1}, 8)[2] == (("temperature", 1.0),)
    with pytest.raises(ConfigError, match="num_beams 4 is not supported"):
        sampling_options({"num_beams": 4}, 8)


def test_conversations_go_through_the_chat_template(harness):
    notes = []
    harness.tell = notes.append
    user = {"role": "user", "content": "1+1="}
    system = {"role": "system", "content": "sum"}
    assert harness.apply_chat_template([user]) == "<u>1+1=<eos><a>"
    opened = [user, {"role": "assistant", "content": "It is "}]
    assert harness.apply_chat_template(opened, add_generation_prompt=False) == (
        "<u>1+1=<eos><a>It is "
    )
    assert harness.apply_chat_template([system, user]) == "<u>1+1=<eos><a>"
    harness.apply_chat_template([system, user])
    assert notes == ["the chat template refuses system messages, which are left out"]
    assert harness.chat_template(True) == TEMPLATE and harness.chat_template(False) is None
    assert "/" not in harness.tokenizer_name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_lenght": 3}, "Did you mean max_length"),
        ({"dtype": "int8"}, "dtype must be float32 or bfloat16"),
        ({"batch_size": "many"}, "batch_size must be a number from 1 or auto"),
        ({"max_length": 1000}, "from 1 to the model's 40"),
    ],
)
def test_arguments_that_are_wrong_are_refused(directory, arguments, words):
    with pytest.raises(ConfigError, match=words):
        HarnessModel(str(directory), **arguments)


def test_what_has_no_likelihood_is_refused(harness):
    for context, continuation in (("xa", "b"), ("", "")):
        with pytest.raises(DataError, match="no token of its own"):
            harness.loglikelihood([request(context, continuation)])
    with pytest.raises(DataError, match="a continuation has 41 tokens"):
        harness.loglikelihood([request("", "1" * 41)])
    with pytest.raises(ConfigError, match="max_gen_toks 40 must be less than the 40"):
        harness.generate_until([request("1", {"max_gen_toks": 40})])


def write_tasks(directory):
    """YAML tasks with data beside them: multiple choice, perplexity and completions."""
    rng = np.random.default_rng(2)
    rows = [
        {
            "question": f"{a}+{b}=",
            "choices": [str(a + b), str(a), "ab c"],
            "answer": int(rng.integers(3)),
            "target": "9",
            "text": "".join(map(str, rng.integers(0, 10, int(rng.integers(5, 90))))),
        }
        for a, b in rng.integers(1, 50, (7, 2)).tolist()
    ]
    data = directory / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"""\
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
"""
    choices = """\
task: tiny_choices
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: " "
metric_list:
  - metric: acc
  - metric: acc_norm
"""
    rolling = """\
task: tiny_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""
    until = """\
task: tiny_until
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{target}}"
generation_kwargs:
  until: ["\\n", "7"]
  max_gen_toks: 8
  do_sample: false
metric_list:
  - metric: exact_match
"""
    paths = {}
    for name, text in (("choices", choices), ("rolling", rolling), ("until", until)):
        paths[name] = directory / f"{name}.yaml"
        paths[name].write_text(text + common)
    return paths


@pytest.fixture
def lm_eval(monkeypatch, tmp_path):
    module = pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chat", [False, True])
def test_scores_and_likelihoods_are_those_of_hf(lm_eval, directory, tmp_path, chat):
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    paths = write_tasks(tmp_path)
    config = EvalConfig().replace(
        model_name_or_path=str(directory),
        tasks=[str(path) for path in paths.values()],
        eval_batch_size=4,
        chat=chat,
        output_file=str(tmp_path / "out.json"),
    )
    config.check()
    ours = evaluate(config)
    hf = HFLM(str(directory), dtype="float32", device="cpu", batch_size=4)
    manager = TaskManager(include_defaults=False, include_path=str(tmp_path))
    theirs = lm_eval.evaluate(
        lm=hf, task_dict=manager.load([f"tiny_{name}" for name in paths]), bootstrap_iters=0,
        apply_chat_template=chat, fewshot_as_multiturn=chat,
    )  # fmt: skip
    for name in ("tiny_choices", "tiny_rolling", "tiny_until"):
        result = ours[f"lm_eval/{name}"]
        assert result.n == 7
        for metric, (value, _) in result.metrics.items():
            assert value == pytest.approx(theirs["results"][name][f"{metric},none"], rel=1e-4)
        assert len(result.metrics) >= 1
        pairs = list(zip(result.samples, theirs["samples"][name], strict=True))
        for sample, other in pairs:
            assert sample["arguments"] == other["arguments"]
            a, b = sample["filtered_resps"], other["filtered_resps"]
            if name == "tiny_until":
                assert a == b
            else:
                np.testing.assert_allclose(np.ravel(a), np.ravel(b), atol=1e-3)
    saved = json.loads((tmp_path / "out.json").read_text())
    assert set(saved["results"]) == set(ours) and "lm_eval" in saved["versions"]
    assert math.isfinite(ours["lm_eval/tiny_choices"].metrics["acc"].stderr)


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_finds_the_class_by_its_name(lm_eval, directory, tmp_path, monkeypatch, capsys):
    """`relax lm_eval` is lm_eval's own command, with the class registered."""
    from relax.__main__ import main

    write_tasks(tmp_path)
    status = main(
        ["lm_eval", "--model", "relax", "--model_args", f"pretrained={directory}",
         "--batch_size", "4", "--tasks", "tiny_choices", "--include_path", str(tmp_path),
         "--limit", "2"]
    )  # fmt: skip
    assert status == 0 and "tiny_choices" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(1800)
@pytest.mark.skipif("RELAX_SMOLLM2" not in os.environ, reason="RELAX_SMOLLM2 names no model")
def test_scores_of_smollm2_are_those_of_hf(lm_eval, tmp_path):
    """With a context of 64 tokens, which the texts exceed."""
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from relax.engine.tasks.harness_tasks import model_class

    paths, model = write_tasks(tmp_path), os.environ["RELAX_SMOLLM2"]
    manager = TaskManager(include_defaults=False, include_path=str(tmp_path))
    options = {"batch_size": 4, "max_length": 64}
    found = []
    for lm in (
        model_class()(model, **options),
        HFLM(model, dtype="float32", device="cpu", **options),
    ):
        tasks = manager.load([f"tiny_{name}" for name in paths])
        found.append(lm_eval.evaluate(lm=lm, task_dict=tasks, bootstrap_iters=0, limit=3))
    ours, theirs = found
    for name, scores in theirs["results"].items():
        for metric in [m for m in scores if m.endswith(",none") and "stderr" not in m]:
            assert ours["results"][name][metric] == pytest.approx(scores[metric], rel=1e-4)
        for a, b in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            if name == "tiny_until":
                assert a["filtered_resps"] == b["filtered_resps"]
            else:
                a, b = np.ravel(a["filtered_resps"]), np.ravel(b["filtered_resps"])
                np.testing.assert_allclose(a, b, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_a_task_that_lm_eval_lacks_is_refused_with_the_nearest(lm_eval, directory):
    config = EvalConfig().replace(
        model_name_or_path=str(directory), tasks=["lm_eval/hellaswagg", "lm_eval_tasks.yaml"]
    )
    with pytest.raises(ConfigError) as caught:
        evaluate(config)
    assert "Did you mean lm_eval/hellaswag?" in str(caught.value)
    assert "the file does not exist" in str(caught.value)


def test_without_lm_eval_its_tasks_name_the_extra(directory, monkeypatch):
    import sys

    from relax.engine.tasks.harness_tasks import model_class

    model_class.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    config = EvalConfig().replace(model_name_or_path=str(directory), tasks=["lm_eval/a"])
    with pytest.raises(ConfigError, match=r"relax-trainers\[eval\]"):
        evaluate(config)
    model_class.cache_clear()
