"""A GGUF file's tokenizer cuts and joins texts as the model's own did."""

import random
import string

import numpy as np
import pytest

from relax.data import load_tokenizer
from relax.errors import ModelLoadError
from relax.tools.gguf.file import read_gguf
from relax.tools.gguf.tokenizer import gguf_tokenizer

pytest.importorskip("gguf")

from tests import gguf_files  # noqa: E402

EMBEDDING = {"token_embd.weight": np.zeros((2, 32), np.float32)}
CONTROL, USER_DEFINED, BYTE = 3, 4, 6
LETTERS = [*string.ascii_lowercase, *string.ascii_uppercase, *"0123456789!.'Ġ", "Ċ"]
BPE = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": [*LETTERS, "<end>", "<own>", "ab", "abc", "Ġa"],
    "token_type": [1] * len(LETTERS) + [CONTROL, USER_DEFINED, 1, 1, 1],
    "merges": ["a b", "Ġ a"],
    "eos_token_id": len(LETTERS),
}
BYTES = [f"<0x{i:02X}>" for i in range(256)]
PIECES = {  # by score, with two ways to "abcd" and with ties nowhere
    **{"▁": -20.0, "a": -21.0, "b": -22.0, "c": -23.0, "d": -24.0, "\n": -25.0},
    **{"bc": -1.0, "ab": -2.0, "cd": -3.0, "abc": -4.0, "bcd": -5.0, "▁a": -6.0, "abcd": -7.0},
    **{"▁▁": -8.0, "▁ab": -9.0, "aa": -10.0, "aaaa": -11.0, "da": -12.0, "▁▁▁▁": -13.0},
}
SPM = {
    "model": "llama",
    "tokens": ["<unk>", "<s>", "</s>", "<own>", "  \n", *BYTES, *PIECES],
    "token_type": [2, 3, 3, USER_DEFINED, USER_DEFINED, *[BYTE] * 256, *[1] * len(PIECES)],
    "scores": [0.0] * (5 + 256) + list(PIECES.values()),
    "unknown_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def load(path, fields, **changes):
    given = {k: v for k, v in (fields | changes).items() if v is not None}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in given.items()}
    template = metadata.pop("tokenizer.ggml.template", None)
    metadata |= {} if template is None else template
    file = gguf_files.write(path / "a.gguf", "llama", metadata, EMBEDDING)
    return gguf_tokenizer(read_gguf(file))


def pieces(tokenizer, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])


TEXT = "He's here'S x12345   6\n\n  camelCase ./\n"
SAME = ["ĊĊ", "Ġ", "ĠcamelCase", "Ġ./Ċ"]
ONE_BY_ONE = ["1", "2", "3", "4", "5"]
CUTS = {
    "gpt-2": [
        *["He", "'s", "Ġhere", "'", "S", "Ġx", "12345", "ĠĠ", "Ġ6", "ĊĊĠ", "ĠcamelCase"],
        *["Ġ./", "Ċ"],
    ],
    "smollm": [
        *["He", "'s", "Ġhere", "'", "S", "Ġx", *ONE_BY_ONE, "ĠĠĠ", "6", "ĊĊĠ", "ĠcamelCase"],
        *["Ġ./", "Ċ"],
    ],
    "llama-bpe": ["He", "'s", "Ġhere", "'S", "Ġx", "123", "45", "ĠĠ", "Ġ", "6", *SAME],
    "qwen2": ["He", "'s", "Ġhere", "'S", "Ġx", *ONE_BY_ONE, "ĠĠ", "Ġ", "6", *SAME],
    "tekken": [
        *["He", "'s", "Ġhere", "'S", "Ġx", *ONE_BY_ONE, "ĠĠ", "Ġ", "6", "ĊĊ", "Ġ"],
        *["Ġcamel", "Case", "Ġ./Ċ"],
    ],
}


@pytest.mark.parametrize("pre", CUTS)
def test_a_text_is_cut_into_words_as_the_file_says(tmp_path, pre):
    """Digits, contractions in capitals, runs of spaces and of newlines, and capitals within."""
    backend = load(tmp_path, BPE, pre=pre, bos_token_id=0).backend_tokenizer
    assert [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(TEXT)] == CUTS[pre]


def test_pairs_are_merged_in_order_and_no_further_than_the_merges_say(tmp_path):
    assert pieces(load(tmp_path, BPE), "abc a b") == ["ab", "c", "Ġa", "Ġ", "b"]


def test_a_word_that_is_a_token_is_one_for_llama_3(tmp_path):
    tokenizer = load(tmp_path, BPE, pre="llama-bpe", add_bos_token=False)
    assert pieces(tokenizer, "abc abcd") == ["abc", "Ġ", "ab", "c", "d"]


def test_a_text_is_composed_for_qwen_alone(tmp_path):
    tokens = [*BPE["tokens"], "Ã", "©", "Ì", "ģ"]
    changes = {"tokens": tokens, "token_type": BPE["token_type"] + [1] * 4}
    assert pieces(load(tmp_path, BPE, **changes), "e\u0301") == ["e", "Ì", "ģ"]
    assert pieces(load(tmp_path, BPE, pre="qwen2", **changes), "e\u0301") == ["Ã", "©"]


@pytest.mark.parametrize("fields", [BPE, SPM])
def test_control_tokens_are_special_and_own_tokens_only_whole(tmp_path, fields):
    control = "<end>" if fields is BPE else "</s>"
    tokenizer = load(tmp_path, fields, add_space_prefix=False)
    ids = tokenizer(f"a<own>b{control}", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "<own>", "b", control]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<own>b"
    assert tokenizer.eos_token == control


@pytest.mark.parametrize(
    ("fields", "changes", "around"),
    [
        (BPE, {}, ""),
        (BPE, {"pre": "llama-bpe", "bos_token_id": 0}, "b"),
        (BPE, {"pre": "llama-bpe", "bos_token_id": 0, "add_bos_token": False}, ""),
        (BPE, {"bos_token_id": 0, "add_bos_token": True, "add_eos_token": True}, "be"),
        (SPM, {}, "b"),
        (SPM, {"add_bos_token": False, "add_eos_token": True}, "e"),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says_or_its_kind_does(tmp_path, fields, changes, around):
    tokenizer = load(tmp_path, fields, **changes)
    bare = tokenizer("abc", add_special_tokens=False)["input_ids"]
    expected = [tokenizer.bos_token_id] * ("b" in around) + bare
    expected += [tokenizer.eos_token_id] * ("e" in around)
    assert tokenizer("abc")["input_ids"] == expected


def by_score(text: str) -> list[str]:
    """SentencePiece's rule: the best piece that two neighbours make, the first where equal."""
    symbols = list(text.replace(" ", "▁"))
    while True:
        pairs = [a + b for a, b in zip(symbols, symbols[1:], strict=False)]
        best = max((pair for pair in pairs if pair in PIECES), key=PIECES.get, default=None)
        if best is None:
            break
        i = pairs.index(best)
        symbols[i : i + 2] = [best]
    known = [[s] if s in PIECES else [f"<0x{b:02X}>" for b in s.encode()] for s in symbols]
    return [piece for several in known for piece in several]


def test_pieces_are_merged_in_the_order_of_their_scores(tmp_path):
    tokenizer, rng = load(tmp_path, SPM, add_space_prefix=False), random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("aabcd  é\n", k=rng.randint(1, 12)))
        if "  \n" not in text:  # an own token, which is found first
            assert pieces(tokenizer, text) == by_score(text), text
            assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert pieces(tokenizer, "a   \nb") == ["a", "▁", "  \n", "b"]


def test_a_space_goes_before_a_text_unless_the_file_says_no(tmp_path):
    with_prefix = load(tmp_path, SPM)
    assert pieces(with_prefix, "ab") == ["▁ab"]
    assert pieces(with_prefix, "</s>b") == ["</s>", "▁", "b"]
    ids = with_prefix("ab cd")["input_ids"]
    assert with_prefix.decode(ids, skip_special_tokens=True) == "ab cd"
    assert pieces(load(tmp_path, SPM, add_space_prefix=False), "ab") == ["ab"]


@pytest.mark.parametrize("fields", [BPE, SPM])
def test_a_saved_tokenizer_gives_the_same_tokens(tmp_path, fields):
    tokenizer = load(tmp_path, fields, template={"tokenizer.chat_template": "{{ 1 }}"})
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    text = "ab  abc<own>abcd a\n b"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.chat_template == "{{ 1 }}"


def test_all_chat_templates_are_kept_by_name(tmp_path):
    both = {"tokenizer.chat_template": "a", "tokenizer.chat_template.tool_use": "b"}
    tokenizer = load(tmp_path, BPE, template=both)
    assert tokenizer.chat_template == {"default": "a", "tool_use": "b"}
    assert load(tmp_path, BPE).chat_template is None


@pytest.mark.parametrize(
    ("fields", "changes", "told"),
    [
        (BPE, {"pre": "mystery"}, "tokenizer.ggml.pre is 'mystery': its way of splitting text"),
        (BPE, {"pre": None}, "tokenizer.ggml.pre is None"),
        (BPE, {"model": "bert"}, "tokenizer.ggml.model must be gpt2 or llama, got 'bert'"),
        (BPE, {"model": None}, "tokenizer.ggml.model must be gpt2 or llama, got None"),
        (BPE, {"lowercase": True}, "tokenizer.ggml.lowercase must be absent"),
        (BPE, {"add_sep_token": True}, "tokenizer.ggml.add_sep_token must be absent"),
        (BPE, {"eos_token_id": 999}, "tokenizer.ggml.eos_token_id must be below the number of"),
        (BPE, {"tokens": ["a", "a"], "token_type": [1, 1], "eos_token_id": 0}, "must differ"),
        (BPE, {"token_type": [1]}, "token_type must have one entry per token, got 1 for"),
        (BPE, {"tokens": [1, 2], "eos_token_id": 0}, "tokens must be a list of str"),
        (BPE, {"merges": ["a q"]}, "merges must join two tokens to one, got ('a', 'q')"),
        (BPE, {"merges": ["ab"]}, "merges must join two tokens to one, got ('ab',)"),
        (BPE, {"add_bos_token": True}, "a text gets a bos_token, and there is no"),
        (BPE, {"add_bos_token": "yes"}, "add_bos_token must be true or false, got 'yes'"),
        (SPM, {"scores": None}, "tokenizer.ggml.scores must have one entry per token, got 0"),
        (SPM, {"remove_extra_whitespaces": True}, "remove_extra_whitespaces must be absent"),
    ],
)
def test_what_would_give_other_tokens_is_refused(tmp_path, fields, changes, told):
    with pytest.raises(ModelLoadError) as caught:
        load(tmp_path, fields, **changes)
    assert told in str(caught.value) and "a.gguf" in str(caught.value)
