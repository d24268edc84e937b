"""What becomes of a row: its tokens, its labels, and the sentence that refuses it."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from relax.data import FormatOptions, arithmetic_tokenizer, prepare, read_rows
from relax.errors import ConfigError, DataError

CHATML = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}\
{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
MARKED = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}\
{% if message['role'] == 'assistant' %}\
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}\
{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
START, END = "<|im_start|>", "<|im_end|>"


def byte_tokenizer(template=CHATML, merges=(), **kwargs):
    """One token per byte, then the merges, then the special tokens; pad is eos, as in SmolLM2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, *("".join(m) for m in merges)])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    names = {"bos_token": START, "eos_token": END, "pad_token": END}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=template, **(names | kwargs)
    )


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def marked(example, tokenizer):
    """The example as text in which trained tokens stand in «»."""
    text, inside = "", False
    for token, label in zip(example.input_ids.tolist(), example.labels.tolist(), strict=True):
        assert label in (-100, token)
        if (label != -100) != inside:
            inside = not inside
            text += "«" if inside else "»"
        text += tokenizer.decode([token])
    return text + ("»" if inside else "")


def one(row, tokenizer, **options):
    examples, report = prepare([row], tokenizer, FormatOptions(**options))
    assert len(examples) == report.num_examples == 1
    return marked(examples[0], tokenizer)


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


# Plain rows


def test_a_text_is_trained_whole_but_for_its_first_token_and_ends(tokenizer):
    assert one({"text": "abc"}, tokenizer) == "a«bc<|im_end|>»"


def test_an_end_token_that_is_there_is_not_doubled(tokenizer):
    assert one({"text": "ab<|im_end|>"}, tokenizer) == "a«b<|im_end|>»"


def test_another_column_of_texts_is_read_by_its_name(tokenizer):
    assert one({"text": "no", "body": "yes"}, tokenizer, text_field="body") == "y«es<|im_end|>»"


def test_another_end_token_is_appended_to_texts(tokenizer):
    assert one({"text": "ab"}, tokenizer, eos_token=START) == "a«b<|im_start|>»"


def test_plain_completions_alone_are_trained_and_end(tokenizer):
    assert one({"prompt": "2+2=", "completion": "4"}, tokenizer) == "2+2=«4<|im_end|>»"


def test_prompts_are_trained_too_where_asked(tokenizer):
    row = {"prompt": "2+2=", "completion": "4"}
    assert one(row, tokenizer, completion_only_loss=False) == "2«+2=4<|im_end|>»"


def test_the_labels_of_a_plain_completion_are_these_numbers(tokenizer):
    examples, _ = prepare([{"prompt": "ab", "completion": "c"}], tokenizer)
    a, b, c = (tokenizer.convert_tokens_to_ids(x) for x in "abc")
    end = tokenizer.eos_token_id
    assert examples[0].input_ids.tolist() == [a, b, c, end]
    assert examples[0].labels.tolist() == [-100, -100, c, end]


def test_a_token_of_both_prompt_and_completion_is_trained_and_counted():
    merging = byte_tokenizer(merges=[("=", "4")])
    rows = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "2+3=", "completion": "5"}]
    examples, report = prepare(rows, merging)
    assert marked(examples[0], merging) == "2+2«=4<|im_end|>»"
    assert marked(examples[1], merging) == "2+3=«5<|im_end|>»"
    assert report.merged == 1


def test_texts_need_an_end_token():
    endless = byte_tokenizer(eos_token=None)
    with pytest.raises(DataError, match="plain texts need an end token.*--eos_token"):
        prepare([{"text": "a"}], endless)
    with pytest.raises(DataError, match="eos_token '</s>' is not a token"):
        prepare([{"text": "a"}], endless, FormatOptions(eos_token="</s>"))


# Conversations


def test_messages_are_rendered_by_the_template_and_trained_whole(tokenizer):
    expected = (
        "<|im_start|>«system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nYo<|im_end|>\n»"
    )
    assert one({"messages": [user("Hi"), bot("Yo")]}, tokenizer) == expected
    sharegpt = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
    assert one({"conversations": sharegpt}, tokenizer) == expected


def test_completion_messages_alone_are_trained_with_their_end(tokenizer):
    row = {"prompt": [user("Hi")], "completion": [bot("Yo")]}
    assert one(row, tokenizer) == (
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n«Yo<|im_end|>\n»"
    )


def test_the_labels_of_a_conversation_equal_the_template_and_no_more(tokenizer):
    """No beginning or end token is added to what the template writes."""
    row = {"messages": [user("Hi"), bot("Yo")]}
    examples, _ = prepare([row], tokenizer)
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert examples[0].input_ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_system_prompt_stands_before_conversations_without_one(tokenizer):
    row = {"prompt": [user("Hi")], "completion": [bot("Yo")]}
    assert one(row, tokenizer, system_prompt="S").startswith("<|im_start|>system\nS<|im_end|>\n")
    row["prompt"] = [{"role": "system", "content": "own"}, user("Hi")]
    assert one(row, tokenizer, system_prompt="S").startswith("<|im_start|>system\nown<|im_end|>")


def test_only_marked_words_are_trained_with_assistant_only_loss():
    tokenizer = byte_tokenizer(MARKED)
    row = {"messages": [user("a"), bot("b"), user("c"), bot("d")]}
    assert one(row, tokenizer, assistant_only_loss=True) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«b<|im_end|>»\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n«d<|im_end|>»\n"
    )


def test_completion_and_assistant_masks_are_both_needed_where_both_are_on():
    tokenizer = byte_tokenizer(MARKED)
    row = {"prompt": [user("a"), bot("b"), user("c")], "completion": [bot("d")]}
    text = one(row, tokenizer, assistant_only_loss=True)
    assert text.endswith("<|im_start|>assistant\n«d<|im_end|>»\n") and text.count("«") == 1
    text = one(row, tokenizer, assistant_only_loss=True, completion_only_loss=False)
    assert text.count("«") == 2


def test_an_end_of_turn_outside_of_the_mask_is_noted():
    outside = MARKED.replace(
        "message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n'",
        "message['content'] }}{% endgeneration %}{{ '<|im_end|>\n'",
    )
    assert outside != MARKED
    rows = [{"messages": [user("a"), bot("a longer answer")]}]
    options = FormatOptions(assistant_only_loss=True)
    _, report = prepare(rows, byte_tokenizer(outside), options)
    assert report.endless == 1 and not report.ends_trained
    assert (
        "1 rows have no trained end token, so the model does not learn to stop there"
        in report.notes
    )
    _, report = prepare(rows, byte_tokenizer(MARKED), options)
    assert report.endless == 0 and report.ends_trained and report.last_trained_token == END


def test_assistant_only_loss_needs_a_row_with_an_assistant():
    options = FormatOptions(assistant_only_loss=True)
    with pytest.raises(DataError, match=r"row 0: .*found no assistant message.*\['user'\]"):
        prepare([{"messages": [user("a")]}], byte_tokenizer(MARKED), options)


def test_where_a_template_rewrites_the_prompt_what_both_begin_with_is_the_prompt():
    """DeepSeek's and Qwen's open a thought for a prompt that a later answer does not have."""
    rewriting = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}T{% endif %}"
    )
    row = {"prompt": [user("Hi")], "completion": [bot("Yo")]}
    tokenizer = byte_tokenizer(rewriting)
    examples, report = prepare([row], tokenizer)
    assert marked(examples[0], tokenizer) == "Hi«Yo<|im_end|>»" and report.merged == 1


def test_a_row_that_the_template_refuses_is_named():
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="row 0: the chat template refuses .*roles must alternate"):
        prepare([{"messages": [user("a")]}], byte_tokenizer(strict))


def test_tools_and_template_arguments_of_a_row_reach_the_template():
    template = "{{ tools[0]['name'] }}{{ flag }}{{ messages[0]['content'] }}"
    row = {
        "messages": [user("u")],
        "tools": json.dumps([{"name": "calc"}]),
        "chat_template_kwargs": {"flag": "F"},
    }
    assert one(row, byte_tokenizer(template)) == "c«alcFu»"


def test_a_row_cannot_bring_its_own_template(tokenizer):
    row = {"messages": [user("u")], "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}
    with pytest.raises(DataError, match="row 0: the chat template refuses .*chat_template"):
        prepare([row], tokenizer)


def test_a_template_is_rendered_in_a_sandbox():
    escaping = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(DataError, match="row 0: the chat template refuses .*unsafe"):
        prepare([{"messages": [user("a")]}], byte_tokenizer(escaping))


def test_conversations_need_a_template():
    with pytest.raises(DataError, match="need a chat template.*--chat_template_path"):
        prepare([{"messages": [user("a")]}], byte_tokenizer(None))


# Rows of tokens


@pytest.mark.parametrize(
    "row, labels",
    [
        ({"input_ids": [1, 2, 3, 4]}, [-100, 2, 3, 4]),
        ({"input_ids": [1, 2, 3, 4], "assistant_masks": [0, 0, 1, 1]}, [-100, -100, 3, 4]),
        ({"input_ids": [1, 2, 3, 4], "completion_mask": [0, 0, 0, 1]}, [-100, -100, -100, 4]),
        (
            {"input_ids": [1, 2, 3], "assistant_masks": [0, 1, 1], "completion_mask": [1, 1, 0]},
            [-100, 2, -100],
        ),
        (
            {"input_ids": [1, 2, 3], "labels": [-100, 2, -100], "completion_mask": [0, 0, 1]},
            [-100, 2, -100],
        ),
        ({"input_ids": [1, 2, 9], "attention_mask": [1, 1, 0]}, [-100, 2]),
    ],
)
def test_given_labels_win_over_masks_and_masks_are_combined(tokenizer, row, labels):
    examples, _ = prepare([row], tokenizer, vocab_size=10)
    assert examples[0].labels.tolist() == labels


def test_a_completion_mask_is_not_used_where_the_loss_is_on_everything(tokenizer):
    row = {"input_ids": [1, 2, 3], "completion_mask": [0, 0, 1]}
    examples, _ = prepare([row], tokenizer, FormatOptions(completion_only_loss=False))
    assert examples[0].labels.tolist() == [-100, 2, 3]


def test_a_row_without_trained_token_within_max_length_is_dropped_and_counted(tokenizer):
    rows = [
        {"input_ids": [1, 2, 3, 4, 5], "completion_mask": [0, 0, 0, 1, 1]},
        {"input_ids": [1, 2, 3, 4, 5], "completion_mask": [0, 0, 1, 1, 1]},
        {"input_ids": [1, 2], "completion_mask": [1, 0]},  # a first token is no target
    ]
    examples, report = prepare(rows, tokenizer, FormatOptions(max_length=3))
    assert [example.labels.tolist() for example in examples] == [[-100, -100, 3]]
    assert report.dropped == {"no trained token within max_length": 1, "no trained token": 1}
    assert (report.num_rows, report.num_examples, report.truncated) == (3, 1, 1)


def test_a_token_outside_of_the_embedding_is_refused_before_training(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"input_ids": [1, 2]}\n{"input_ids": [1, 300]}\n')
    with pytest.raises(DataError, match="a.jsonl:2: token id 300 .*embedding of 300 rows"):
        prepare(read_rows(path), tokenizer, vocab_size=300)
    prepare(read_rows(path), tokenizer, vocab_size=301)
    with pytest.raises(DataError, match="row 0: token id -1 "):
        prepare([{"input_ids": [1, -1]}], tokenizer)


def test_shifted_labels_are_refused(tokenizer):
    row = {"input_ids": [1, 2, 3], "labels": [2, 3, -100]}
    with pytest.raises(DataError, match="row 0: label 2 is neither .* labels must not be shifted"):
        prepare([row], tokenizer)


# Truncation


@pytest.mark.parametrize(
    "mode, text, truncated, dropped",
    [("keep_start", "a«bc»", 1, {}), ("keep_end", "e«f<|im_end|>»", 1, {})],
)
def test_long_rows_are_cut_and_counted(tokenizer, mode, text, truncated, dropped):
    rows = [{"text": "abcdef"}, {"text": "ab"}]
    options = FormatOptions(max_length=3, truncation_mode=mode)
    examples, report = prepare(rows, tokenizer, options)
    assert [marked(e, tokenizer) for e in examples] == [text, "a«b<|im_end|>»"]
    assert (report.truncated, report.dropped) == (truncated, dropped)
    assert report.lengths[100] == 7  # before cutting


def test_long_rows_are_dropped_and_counted_where_asked(tokenizer):
    rows = [{"text": "abcdef"}, {"text": "ab"}]
    options = FormatOptions(max_length=3, truncation_mode="drop")
    examples, report = prepare(rows, tokenizer, options)
    assert [marked(e, tokenizer) for e in examples] == ["a«b<|im_end|>»"]
    assert (report.truncated, report.dropped) == (0, {"longer than max_length": 1})


def test_long_rows_are_an_error_where_asked(tokenizer):
    options = FormatOptions(max_length=3, truncation_mode="error")
    with pytest.raises(DataError, match="row 1: the row has 7 tokens, max_length=3: raise"):
        prepare([{"text": "ab"}, {"text": "abcdef"}], tokenizer, options)


def test_without_max_length_nothing_is_cut(tokenizer):
    examples, report = prepare([{"text": "x" * 5000}], tokenizer, FormatOptions(max_length=None))
    assert len(examples[0].input_ids) == 5001 and report.truncated == 0


def test_a_set_without_any_trained_token_says_why(tokenizer):
    rows = [{"prompt": "a long question", "completion": "b"}]
    with pytest.raises(
        DataError, match=r"none of 1 rows .*raise max_length=4 .*longest row has 17"
    ):
        prepare(rows, tokenizer, FormatOptions(max_length=4))
    rows = [{"input_ids": [1, 2], "labels": [-100, -100]}]
    with pytest.raises(DataError, match="none of 1 rows .*1 no trained token.*check the masks"):
        prepare(rows, tokenizer)


# Rows that are not what they should be


GOOD_CHAT = {"messages": [user("a"), bot("b")]}


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"mesages": []}], r":1: no known column: 'mesages' \(did you mean 'messages'\?\)"),
        ([{"q": "a", "x": 1}], r":1: no known column: the row has 'q', 'x'.*dataset_text_field"),
        ([{"text": "a"}, {"txt": "b"}], r":2: column 'text' is missing.*did you mean 'txt'\?"),
        ([{"text": "a"}, {"text": None}], r":2: column 'text' is missing"),
        ([{"text": "a"}, {"text": 5}], r":2: 'text' must be a string, it is 5"),
        ([{"text": ["a"]}], r":1: 'text' must be a string, it is \['a'\]"),
        ([{"prompt": "a", "completon": "b"}], r"'completion' is missing.*mean 'completon'\?"),
        ([{"prompt": "a"}], r":1: column 'completion' is missing; the row has 'prompt'"),
        ([{"prompt": [user("a")], "completion": "b"}], r"'completion' must be a list of messages"),
        ([{"prompt": "a", "completion": [bot("b")]}], r"'completion' must be a string"),
        ([{"messages": []}], r":1: 'messages' must be a list of messages, it is \[\]"),
        ([{"messages": "hello"}], r":1: 'messages' must be a list of messages, it is 'hello'"),
        ([{"messages": ["hello"]}], r":1: 'messages\[0\]' must be an object, it is 'hello'"),
        ([GOOD_CHAT, {"messages": [{"content": "a"}]}], r":2: messages\[0\] needs a string 'role'"),
        ([GOOD_CHAT, {"messages": [user(None)]}], r":2: messages\[0\] needs a string 'content'"),
        (
            [GOOD_CHAT, {"messages": [user(5)]}],
            r":2: 'messages\[0\].content' must be a string, .* 5",
        ),
        ([{"input": "a", "output": "b"}], r":1: no known column: the row has 'input', 'output'\."),
        ([{"conversations": [{"from": "alien", "value": "a"}]}], r"from 'alien', not one of"),
        ([{"input_ids": "12"}], r":1: 'input_ids' must be a list of 32-bit integers"),
        ([{"input_ids": [1, 2.5]}], r":1: 'input_ids' must be a list of 32-bit integers"),
        ([{"input_ids": [1, 2**40]}], r":1: 'input_ids' must be a list of 32-bit integers"),
        ([{"input_ids": [1, 2], "labels": [1]}], r":1: 'labels' has 1 items, 'input_ids' has 2"),
        ([GOOD_CHAT | {"tools": 1}], r":1: 'tools' must be a list, it is 1"),
    ],
)
def test_every_row_is_checked_before_anything_is_tokenised(tokenizer, tmp_path, rows, message):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"a\.jsonl:\d: ") as error:
        prepare(read_rows(path), tokenizer)
    assert error.match(message)


@pytest.mark.parametrize(
    "row, options, message",
    [
        (
            {"text": "a"},
            {"completion_only_loss": True},
            "needs rows with 'prompt' and 'completion'",
        ),
        ({"text": "a"}, {"assistant_only_loss": True}, "assistant_only_loss needs conversations"),
        ({"text": "a"}, {"system_prompt": "S"}, "system_prompt needs conversations"),
        (GOOD_CHAT, {"eos_token": START}, "eos_token ends plain texts"),
        (GOOD_CHAT, {"truncation_mode": "left"}, "unknown truncation_mode 'left'"),
        (GOOD_CHAT, {"max_length": 1}, "max_length must be at least 2, got 1"),
    ],
)
def test_an_option_without_effect_is_refused(tokenizer, row, options, message):
    with pytest.raises(ConfigError, match=message):
        prepare([row], tokenizer, FormatOptions(**options))


def test_a_named_text_column_that_is_missing_is_not_replaced_by_another(tokenizer):
    with pytest.raises(DataError, match="row 0: column 'body' is missing; the row has 'text'"):
        prepare([{"text": "a"}], tokenizer, FormatOptions(text_field="body"))


# The embedded tokenizer goes the same way


def test_the_embedded_tokenizer_marks_the_assistants_words():
    row = {"messages": [{"role": "system", "content": "S"}, user("1+1="), bot("2")]}
    assert one(row, arithmetic_tokenizer(), assistant_only_loss=True) == (
        "<system>S<user>1+1=<assistant>«2<eos>»"
    )
