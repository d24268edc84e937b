"""Which tokens are the assistant's, with templates that mark them and with those that do not."""

import pytest
from test_data_prepare import CHATML, MARKED, bot, byte_tokenizer, marked, one, user

from relax.data import FormatOptions, arithmetic_tokenizer, prepare, turns
from relax.errors import ConfigError, DataError

SYSTEM = {"role": "system", "content": "S"}
CHAT = [user("a"), bot("b"), user("c"), bot("d")]


def trained(messages, template, row=(), **options):
    tokenizer = byte_tokenizer(template)
    options = {"assistant_only_loss": True} | options
    return one({"messages": messages, **dict(row)}, tokenizer, **options)


def refusal(messages, template, **options):
    with pytest.raises(DataError) as caught:
        trained(messages, template, **options)
    return str(caught.value)


def test_turns_are_found_where_the_template_has_no_marks():
    """The system prompt is made up by the template, and words repeat."""
    assert trained([user("b"), bot("b"), user("b"), bot("b")], CHATML) == (
        "<|im_start|>system\nBe kind<|im_end|>\n"
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n«b<|im_end|>\n»"
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n«b<|im_end|>\n»"
    )


def test_rendering_finds_what_a_template_marks():
    marks, none = arithmetic_tokenizer(), arithmetic_tokenizer()
    for mark, other in (("endgeneration -%", "endif -%"), ("generation -%", "if true -%")):
        none.chat_template = none.chat_template.replace(mark, other)
    assert "generation -%" not in none.chat_template
    messages = [SYSTEM, user("1+1="), bot("2"), user(" 2+1= "), bot(" 3\n")]
    texts = [one({"messages": messages}, t, assistant_only_loss=True) for t in (marks, none)]
    assert texts[0] == texts[1] and texts[0].count("«") == 2


# In the manner of well-known templates, by what makes each of them difficult.
TRIMS = CHATML.replace("message['content'] +", "message['content'] | trim +")
INSTRUCT = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
END_OF_TEXT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|im_end|>{% endif %}"
)
LAST_ENDS_OTHERWISE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}"
    "{% if loop.last and m.role == 'assistant' %}<|im_start|>{% else %}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
NO_END = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_end|>{% else %}A:{% endif %}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
ONLY_LAST_THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.mark.parametrize(
    "template, messages, text",
    [
        (TRIMS, [SYSTEM, user(" a "), bot("  b\n")], "«b<|im_end|>\n»"),
        (INSTRUCT, CHAT, "[INST] a [/INST]« b<|im_end|>»[INST] c [/INST]« d<|im_end|>»"),
        (END_OF_TEXT, CHAT, "«b<|im_end|>\n»<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
         "«d<|im_end|>\n<|im_end|>»"),
        (LAST_ENDS_OTHERWISE, CHAT, "assistant«:b<|im_end|>»<|im_start|>user:c<|im_end|>"
         "<|im_start|>assistant«:d<|im_start|>»"),
        (NO_END, CHAT, "<|im_end|>aA:«b<|im_end|>»cA:«d»"),
        (CHATML, [bot("hi"), user("a"), bot("b")], "<|im_start|>assistant\n«hi<|im_end|>\n»"),
    ],
)  # fmt: skip
def test_a_turn_is_what_the_model_generates_up_to_its_end_token(template, messages, text):
    assert text in trained(messages, template)


THOUGHTS = [
    user("a"),
    bot("b") | {"reasoning_content": "once"},
    user("c"),
    bot("d") | {"reasoning_content": "now"},
]


def test_thoughts_that_a_template_strips_and_tags_of_its_prompt_are_not_trained():
    assert trained(THOUGHTS, ONLY_LAST_THOUGHT) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«b<|im_end|>\n»"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n<think>\n"
        "«now\n</think>\n\nd<|im_end|>\n»"
    )


def test_thoughts_are_kept_stripped_or_kept_behind_the_last_question():
    template = CHATML.replace("message['content'] +", "message.reasoning_content | default('-') +"
                              " '|' + message['content'] +")  # fmt: skip
    spoken = {"keep": ("once|b", "now|d"), "strip": ("-|b", "-|d"), "last_only": ("-|b", "now|d")}
    for thinking, (first, last) in spoken.items():
        text = trained(THOUGHTS, template, thinking=thinking)
        assert f"«{first}<|im_end|>" in text and f"«{last}<|im_end|>" in text
    inline = [user("a"), bot("<think>\nt\n</think>\n\nb"), user("c"), bot("u</think>d")]
    text = trained(inline, CHATML, thinking="strip")
    assert "«b<|im_end|>" in text and "«d<|im_end|>" in text
    _, report = prepare(
        [{"messages": THOUGHTS}], byte_tokenizer(template),
        FormatOptions(assistant_only_loss=True, thinking="last_only"),
    )  # fmt: skip
    assert "1 messages are without the thoughts that they had (thinking=last_only)" in report.notes


CALLS = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user"
    "{% endif %}<r>{{ m.content }}</r>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>{{ m.reasoning_content }}"
    "</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls %}<c>{{ c.function.name }}{{ c.function.arguments | tojson }}</c>"
    "{% endfor %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def call(**arguments):
    return {"type": "function", "function": {"name": "at", "arguments": arguments}}


def test_calls_and_results_in_rewritten_turns_are_told_apart():
    """As in Qwen3: only what is behind the last question has thoughts, and results are one turn."""
    messages = [
        user("q"),
        {"role": "assistant", "content": "", "tool_calls": [call(x=1), call(x=2)],
         "reasoning_content": "t"},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        bot("e") | {"reasoning_content": "u"},
        user("q"),
        {"role": "assistant", "tool_calls": [call(x=3)], "content": None},
    ]  # fmt: skip
    text = trained(messages, CALLS.replace("{{ m.content }}", "{{ m.content or '' }}"))
    assert text == (
        '<|im_start|>user\nq<|im_end|><|im_start|>assistant\n«<c>at{"x": 1}</c><c>at{"x": 2}</c>'
        "<|im_end|>»<|im_start|>user<r>1</r><r>2</r><|im_end|><|im_start|>assistant\n"
        "«e<|im_end|>»<|im_start|>user\nq<|im_end|><|im_start|>assistant\n"
        '«<think></think><c>at{"x": 3}</c><|im_end|>»'
    )


def test_a_header_that_differs_in_every_rendering_is_told_by_what_the_template_asks_with():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ messages | length }}:{{ m.content }}"
        "<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ messages | length }}:{% endif %}"
    )
    text = trained(CHAT[:2], template)
    assert text == "<|im_start|>user2:a<|im_end|><|im_start|>assistant2:«b<|im_end|>»"


@pytest.mark.parametrize(
    "template", [CHATML, TRIMS, INSTRUCT, END_OF_TEXT, LAST_ENDS_OTHERWISE, NO_END, MARKED]
)
def test_long_rows_are_found_by_fewer_renderings_as_by_all_of_them(template, monkeypatch):
    messages = [m for i in range(5) for m in (user(f" {i % 2} "), bot(f" {i % 3}\n"))]
    options = {"truncation_mode": "turns"}  # finds turns where there are marks too
    monkeypatch.setattr(turns, "_FEW", 99)
    expected = trained(messages, template, **options)
    monkeypatch.setattr(turns, "_FEW", 0)
    assert trained(messages, template, **options) == expected and expected.count("«") == 5


# What cannot be proven


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{% for m in messages %}<|im_start|>{{ m.role }}{{ loop.revindex }}{{ m.content }}"
         "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant9{% endif %}",
         r"the prompt of messages\[1\] and the whole part at character"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
         r"it writes nothing for messages\[1\]"),
    ],
)  # fmt: skip
def test_a_turn_that_cannot_be_told_is_refused_with_the_place(template, reason):
    with pytest.raises(DataError, match=rf"row 0: .* messages\[1\] of the assistant.*{reason}"):
        trained([user("a"), bot("b")], template)


def test_a_template_that_always_asks_for_another_turn_is_refused():
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
        "{{ m.content }}<|im_end|>{% endif %}<|im_end|><|im_start|>{% endfor %}"
    )
    said = "messages[1] of the assistant, so its end cannot be told"
    for messages in (CHAT, CHAT[:2]):
        assert said in refusal(messages, template)
    unasked = CHATML.replace("{% if add_generation_prompt %}", "{% if true %}")
    assert said in refusal(CHAT[:2], unasked)


def test_a_token_across_the_end_of_a_turn_is_refused():
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = byte_tokenizer(template, merges=[("b", "c")])
    with pytest.raises(DataError, match="row 0: a token holds both 'b', the end of"):
        one({"messages": CHAT}, tokenizer, assistant_only_loss=True)


# Policies and weights


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_the_last_turn_alone_and_turns_without_weight(template):
    first, last = "assistant\n«b<|im_end|>", "assistant\n«d<|im_end|>"
    for key, value in (("weight", 0), ("train", False)):
        text = trained([user("a"), bot("b") | {key: value}, user("c"), bot("d")], template)
        assert first not in text and last in text
        text = trained([*CHAT[:3], bot("d") | {key: value}], template)
        assert first in text and last not in text
    text = trained(CHAT, template, train_on="last_assistant")
    assert first not in text and last in text
    with pytest.raises(ConfigError, match="train_on last_assistant needs assistant_only_loss"):
        FormatOptions(train_on="last_assistant")


def test_a_message_without_weight_is_left_out_of_any_loss():
    tokenizer = byte_tokenizer(CHATML)
    row = {"messages": [SYSTEM, user("a"), bot("b") | {"weight": 0}, user("c"), bot("d")]}
    assert prepare([row], tokenizer)[1].trained_on.startswith("every token but those of messages")
    assert one(row, tokenizer) == (
        "<|im_start|>«system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n»"
        "b<|im_end|>\n«<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n»"
    )
    row = {"prompt": [user("a")], "completion": [bot("b") | {"weight": 0}, user("c"), bot("d")]}
    assert "assistant\nb<|im_end|>\n«<|im_start|>user\nc" in one(row, tokenizer)


@pytest.mark.parametrize(
    "message, options, reason",
    [
        (bot("b") | {"weight": 0.5}, {}, "'weight' 0.5, and a message is trained on or not"),
        (user("b") | {"train": False}, {}, "'train' False, and its role is 'user': only an"),
        (user("b") | {"weight": 1}, {"assistant_only_loss": True}, "only the assistant's messages"),
    ],
)
def test_weights_that_cannot_be_honoured_are_refused(message, options, reason):
    rows = [{"messages": [user("a"), message, bot("d")]}]
    with pytest.raises(DataError, match=r"row 0: messages\[1\] has " + f".*{reason}"):
        prepare(rows, byte_tokenizer(), FormatOptions(**options))


def test_marks_that_are_of_no_single_message_cannot_be_left_out():
    across = "{% generation %}" + CHATML + "{% endgeneration %}"
    reason = r"characters 0 to \d+, which the chat template marks .* belong to messages \[1, 3\]"
    with pytest.raises(DataError, match=reason):
        trained(CHAT, across, train_on="last_assistant")


# Truncation


def test_whole_turns_are_kept_where_asked():
    tokenizer = byte_tokenizer(CHATML)
    options = {"truncation_mode": "turns", "assistant_only_loss": True}
    whole = one({"messages": [SYSTEM, *CHAT]}, tokenizer, max_length=None, **options)
    first = "«b<|im_end|>\n»"
    half = whole[: whole.index(first) + len(first)]
    length = len(tokenizer(half.replace("«", "").replace("»", ""))["input_ids"])
    rows = [{"messages": [SYSTEM, *CHAT]}, {"messages": [SYSTEM, user("a" * length), bot("b")]}]
    for limit in (length, length + 9):
        examples, report = prepare(rows, tokenizer, FormatOptions(max_length=limit, **options))
        assert [marked(example, tokenizer) for example in examples] == [half]
        assert report.truncated == 1
        assert report.dropped == {"no whole turn within max_length": 1}
    marked_template = byte_tokenizer(MARKED)
    rows = [{"messages": [user("a")]}, {"messages": CHAT}]
    options = FormatOptions(truncation_mode="turns")
    assert len(prepare(rows, marked_template, options)[0]) == 2  # one is short, without a turn
    with pytest.raises(ConfigError, match="truncation_mode turns needs conversations, but row 0"):
        prepare([{"text": "a"}], tokenizer, FormatOptions(truncation_mode="turns"))


# The report


def test_the_report_counts_turns_and_how_they_were_found():
    options = FormatOptions(assistant_only_loss=True, train_on="last_assistant")
    for template, how in ((CHATML, "by rendering"), (MARKED, "by marks")):
        _, report = prepare([{"messages": CHAT}] * 3, byte_tokenizer(template), options)
        assert report.turns == {how: 6, "untrained": 3}
    note = "the chat template leaves out the thoughts of 1 assistant messages: first row 0"
    options = FormatOptions(assistant_only_loss=True)
    _, report = prepare([{"messages": THOUGHTS}], byte_tokenizer(ONLY_LAST_THOUGHT), options)
    assert any(text.startswith(note) for text in report.notes)
