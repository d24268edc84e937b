"""Tokenizers load without running foreign code; the embedded one and its data set are exact."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from relax.data import arithmetic_rows, arithmetic_tokenizer, load_tokenizer, prepare
from relax.errors import DataError, ModelLoadError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    arithmetic_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_the_embedded_tokenizer_survives_saving_and_loading(saved):
    made, loaded = arithmetic_tokenizer(), AutoTokenizer.from_pretrained(saved)
    assert loaded.get_vocab() == made.get_vocab() and len(made) == 261
    assert loaded.special_tokens_map == made.special_tokens_map
    assert loaded.chat_template == made.chat_template
    for text in ["27+45=", "<user>1<eos>", " é\n\t<pad", ""]:
        ids = made(text)["input_ids"]
        assert loaded(text)["input_ids"] == ids
        assert loaded.decode(ids) == made.decode(ids) == text


def test_the_embedded_tokenizer_has_a_padding_token_of_its_own():
    tokenizer = arithmetic_tokenizer()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


def test_an_arithmetic_example_is_about_ten_tokens_and_trains_answer_and_end():
    tokenizer = arithmetic_tokenizer()
    row = {
        "prompt": [{"role": "user", "content": "27+45="}],
        "completion": [{"role": "assistant", "content": "72"}],
    }
    examples, report = prepare([row], tokenizer, vocab_size=len(tokenizer))
    text = tokenizer.decode(examples[0].input_ids.tolist())
    assert text == "<user>27+45=<assistant>72<eos>"
    seven, two, eos = tokenizer("72<eos>")["input_ids"]
    assert examples[0].labels.tolist() == [-100] * 8 + [seven, two, eos]
    assert report.ends_trained


def test_arithmetic_rows_are_all_sums_and_the_held_out_ones_are_apart():
    def sums(rows):
        return [tuple(map(int, r["prompt"][0]["content"][:-1].split("+"))) for r in rows]

    train, test = arithmetic_rows("train"), arithmetic_rows("test")
    assert (len(train), len(test)) == (9500, 500)
    assert sorted(sums(train) + sums(test)) == [(a, b) for a in range(100) for b in range(100)]
    held_out = set(sums(test))
    assert {(b, a) for a, b in held_out} == held_out  # so that a+b gives nothing away on b+a
    for row, (a, b) in zip(test, sums(test), strict=True):
        assert row["completion"][0]["content"] == str(a + b)


def test_arithmetic_rows_are_a_function_of_the_seed():
    assert arithmetic_rows("test", 3) == arithmetic_rows("test", 3) != arithmetic_rows("test", 4)
    assert [r["prompt"][0]["content"] for r in arithmetic_rows("test")[:3]] == [
        "53+1=",
        "1+99=",
        "82+93=",
    ]
    with pytest.raises(DataError, match="'train' and 'test', not 'dev'"):
        arithmetic_rows("dev")


def test_a_chat_template_comes_from_a_file_or_another_tokenizer(saved, tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text("{{ messages[0].content }}")
    assert load_tokenizer(saved, path).chat_template == "{{ messages[0].content }}"
    assert load_tokenizer(saved, saved).chat_template == arithmetic_tokenizer().chat_template
    with pytest.raises(DataError, match="cannot read a chat template from .*missing.jinja"):
        load_tokenizer(saved, tmp_path / "missing.jinja")


def test_an_end_token_must_exist(saved):
    assert load_tokenizer(saved, eos_token="<user>").eos_token == "<user>"
    with pytest.raises(DataError, match="eos_token '</s>' is not a token"):
        load_tokenizer(saved, eos_token="</s>")


def test_a_directory_without_a_tokenizer_is_one_clear_error(tmp_path):
    with pytest.raises(ModelLoadError, match="no tokenizer in .*needs tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ModelLoadError, match="no tokenizer in 'some/model'"):
        load_tokenizer("some/model")


def test_a_tokenizer_that_its_library_cannot_load_or_use_is_one_sentence(
    saved, tmp_path, monkeypatch
):
    """Whatever is raised: a panic of the Rust library is not even an Exception."""
    import transformers

    damaged = shutil.copytree(saved, tmp_path / "damaged")
    file = damaged / "tokenizer.json"
    file.write_text(file.read_text().replace('"BPE"', '"BPPE"', 1))
    with pytest.raises(ModelLoadError, match="no tokenizer in .*damaged"):
        load_tokenizer(damaged)

    class PanicException(BaseException):
        pass

    def panics(self, *args, **kwargs):
        raise PanicException("index out of bounds")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "__call__", panics)
    with pytest.raises(ModelLoadError, match="no tokenizer in .*: index out of bounds"):
        load_tokenizer(saved)


def test_a_tokenizer_of_links_out_of_its_directory_is_refused(saved, tmp_path):
    linked = shutil.copytree(saved, tmp_path / "linked")
    (linked / "tokenizer_config.json").unlink()
    (linked / "tokenizer_config.json").symlink_to(saved / "tokenizer_config.json")
    for load in (load_tokenizer, lambda path: load_tokenizer(saved, path)):
        with pytest.raises(ModelLoadError, match="tokenizer_config.json is a link that leads out"):
            load(linked)


def test_a_tokenizer_that_brings_code_does_not_run_it(saved, tmp_path):
    arithmetic_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    config["tokenizer_class"] = "Tokenizer"
    path.write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tokenizer: ...")
    try:
        load_tokenizer(tmp_path)
    except ModelLoadError:
        pass
    assert not (tmp_path / "ran").exists()
