"""Tool calls in the formats of the families, as their published templates write them."""

import json

import pytest

from relax.data.tool_calls import (
    TOOL_FORMATS,
    Turn,
    parse_tool_calls,
    register_tool_format,
    tool_format,
)

WEATHER = [("get_weather", {"city": "Brest, FR", "days": 2})]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    }
]
DEEP = '{"x": ' * 33 + "1" + "}" * 33
TEXTS = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Brest, FR", "days": 2}}'
    "\n</tool_call>",
    "llama3": '{"name": "get_weather", "parameters": {"city": "Brest, FR", "days": 2}}',
    "mistral": '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Brest, FR", '
    '"days": 2}}]',
    "lfm2": "<|tool_call_start|>[get_weather(city='Brest, FR', days=2)]<|tool_call_end|>",
    "gemma": "<start_function_call>call:get_weather{city:<escape>Brest, FR<escape>,days:2}"
    "<end_function_call>",
    "gemma4": '<|tool_call>call:get_weather{city:<|"|>Brest, FR<|"|>,days:2}<tool_call|>',
    "gpt_oss": "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    '{"city": "Brest, FR", "days": 2}<|call|>',
    "granite": '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Brest, FR", '
    '"days": 2}}]',
}
ARGUMENTS = '{"city": "Brest, FR", "days": 2}'
NAMED = f'{{"name": "get_weather", "arguments": {ARGUMENTS}}}'
OTHERS = [
    (
        "gpt_oss",
        " to=functions.get_weather<|channel|>commentary json<|message|>"
        '{"city": "Brest, FR", "days": 2}<|call|>',
    ),
    (
        "hermes",
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Brest, FR</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
    ),
    (
        "hermes",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nBrest, FR\n</parameter>\n"
        "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
    ),
    ("hermes", f"<tool_call>{NAMED}"),
    (
        "hermes",
        f'<tool_call>{{"name": "get_weather", "arguments": {json.dumps(ARGUMENTS)}}}</tool_call>',
    ),
    ("llama3", "<|python_tag|>" + NAMED.replace("arguments", "parameters")),
    ("mistral", f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}"),
    ("lfm2", f"<|tool_call_start|>[{NAMED}]<|tool_call_end|>"),
]


@pytest.mark.parametrize(("name", "text"), [*TEXTS.items(), *OTHERS])
def test_a_call_is_read_in_each_format(name, text):
    turn = parse_tool_calls(text, name, TOOLS)
    assert (turn.content, turn.errors) == ("", [])
    assert [tuple(call) for call in turn.calls] == WEATHER


def test_every_format_has_an_example():
    assert set(TEXTS) == set(TOOL_FORMATS)


@pytest.mark.parametrize("name", sorted(set(TEXTS) - {"llama3", "mistral", "granite"}))
def test_text_beside_calls_is_content_and_several_calls_are_all_read(name):
    turn = parse_tool_calls(f"Let me look. {TEXTS[name]}{TEXTS[name]}", name, TOOLS)
    assert turn.content == "Let me look."
    assert [tuple(call) for call in turn.calls] == WEATHER * 2


def test_several_calls_of_one_text_are_read():
    two = '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"x": [1, null]}}'
    assert parse_tool_calls(two, "llama3").calls == [("f", {}), ("g", {"x": [1, None]})]
    two = "<|tool_call_start|>[f(), g(x={'a': [True, null]})]<|tool_call_end|>"
    assert parse_tool_calls(two, "lfm2").calls == [("f", {}), ("g", {"x": {"a": [True, None]}})]
    two = '[TOOL_CALLS][{"name": "f"}, {"name": "g"}]'
    assert parse_tool_calls(two, "mistral").calls == [("f", {}), ("g", {})]


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_text_without_a_call_is_content_as_it_is(name):
    text = ' 1 < 2, {"a": 1} and [f(x=1)] \n'
    assert parse_tool_calls(text, name) == Turn(text, [], [])
    assert parse_tool_calls(TEXTS[name], None) == Turn(TEXTS[name], [], [])


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("hermes", '<tool_call>{"name": "f", "arg</tool_call>', "must be JSON"),
        ("hermes", "<tool_call>[1]</tool_call>", "must be an object with a name, got 1"),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "of f must be an obj"),
        ("hermes", "<tool_call><function=f><parameter", "must be <function=name>"),
        ("hermes", "<tool_call>" + "[" * 100_000, "must be JSON"),
        ("llama3", '{"name": "f", "parameters": {', "must be JSON"),
        ("lfm2", "<|tool_call_start|>[f(1)]<|tool_call_end|>", "list of calls like f"),
        ("lfm2", "<|tool_call_start|>[f(x=g())]<|tool_call_end|>", "list of calls like f"),
        ("lfm2", "<|tool_call_start|>[f(x=1j)]<|tool_call_end|>", "not a value of JSON"),
        ("lfm2", "<|tool_call_start|>[" + "(" * 5000, "list of calls like f"),
        ("gemma", "<start_function_call>f(1)<end_function_call>", "must be call:name"),
        ("gemma", "<start_function_call>call:f{x:}<end_function_call>", "of f cannot be read"),
        ("gpt_oss", "<|channel|>commentary to=functions.f <|message|>{x}<|call|>", "must be JSON"),
        ("mistral", "[TOOL_CALLS] nonsense", "must be JSON"),
        ("lfm2", "<|tool_call_start|>[f(x={[1]})]<|tool_call_end|>", "not a value of JSON"),
        ("lfm2", "<|tool_call_start|>[f(x={[1]: 2})]<|tool_call_end|>", "not a value of JSON"),
        ("lfm2", "<|tool_call_start|>[f(x=1e999)]<|tool_call_end|>", "of f must be JSON"),
        ("lfm2", f"<|tool_call_start|>[f(x=0x{'f' * 9999})]<|tool_call_end|>", "of f must be JSON"),
        ("hermes", f'<tool_call>{{"name": "f", "arguments": "{"[" * 9999}"}}', "must be an object"),
        ("hermes", f'<tool_call>{{"name": "f", "arguments": {DEEP}}}', "more than 32 levels deep"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": NaN}}', "NaN is not a value"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1e999}}', "of f must be JSON"),
        ("llama3", '{"name": "f", "parameters": {"x": -Infinity}}', "-Infinity is not a value"),
        ("gemma", "<start_function_call>call:f{x:NaN}<end_function_call>", "NaN is not a value"),
        ("gpt_oss", '<|channel|>commentary to=f<|message|>{"x": NaN}', "NaN is not a value"),
    ],
)
def test_a_malformed_call_is_an_error_in_words(name, text, reason):
    turn = parse_tool_calls(text, name)
    assert turn.calls == []
    (error,) = turn.errors
    assert reason in error and len(error) < 600


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("<tool_call>\n", "hermes"),
        ("Environment: ipython", "llama3"),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ("<|tool_call_start|>", "lfm2"),
        ("<|tool_call>", "gemma4"),
        ("<|tool_call|>", "granite"),
        ("<|start|>assistant<|channel|>final", "gpt_oss"),
        ("{{ message.content }}", None),
        (None, None),
    ],
)
def test_the_template_decides_on_the_format(template, name):
    assert tool_format(template) == name


def test_channels_of_gpt_oss_are_thoughts_calls_and_content():
    """As in OpenAI's description of the format, harmony."""
    call = "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}"
    text = "<|channel|>analysis<|message|>I need f.<|end|>" + call
    assert parse_tool_calls(f"{text}<|call|>", "gpt_oss") == Turn("", [("f", {})], [], "I need f.")
    said = "<|start|>assistant<|channel|>commentary<|message|>Let me see.<|end|>"
    text = f"<|channel|>analysis<|message|>I need f.<|end|>{said}{call}"
    turn = parse_tool_calls(text, "gpt_oss")
    assert turn == Turn("Let me see.", [("f", {})], [], "I need f.")
    final = "<|start|>assistant<|channel|>final<|message|>It is 3."
    text = f"<|channel|>analysis<|message|>One and\ntwo.<|end|>{final}"
    for end in ("", "<|return|>", "<|end|>"):
        assert parse_tool_calls(text + end, "gpt_oss") == Turn("It is 3.", [], [], "One and\ntwo.")


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("hermes", "<tool_call>w\n<arg_key>city</arg_key>\n<arg_value>Par", "must end with"),
        ("hermes", "<tool_call>w\n<arg_key>city</arg_key></tool_call>", "of w must each be"),
        ("hermes", "lead <tool_call>x", "the call of x must end with </tool_call>"),
        ("hermes", "<tool_call><function=w><parameter=city>Paris</function>", "of w must each be"),
        ("hermes", "<tool_call><function=w>garbage</function></tool_call>", "of w must each be"),
        ("hermes", "<tool_call>[]</tool_call>", "at least one call"),
        ("lfm2", "<|tool_call_start|>[]<|tool_call_end|>", "the list is empty"),
        ("mistral", "[TOOL_CALLS]", "must be JSON"),
        ("mistral", "[TOOL_CALLS]f[ARGS]", "of f must be JSON"),
        ("granite", "<|tool_call|>[]", "at least one call"),
    ],
)
def test_a_cut_or_empty_call_is_an_error_and_never_a_call_with_fewer_arguments(name, text, reason):
    turn = parse_tool_calls(text, name)
    assert turn.calls == [] and [reason in error for error in turn.errors] == [True]


def test_a_call_in_tags_may_have_no_arguments():
    for text in ("f", "<function=f></function>", "<function=f>\n</function>"):
        turn = parse_tool_calls(f"<tool_call>{text}</tool_call>", "hermes")
        assert (turn.calls, turn.errors) == ([("f", {})], [])


def test_an_exception_of_any_parser_is_an_error_of_the_call(monkeypatch):
    monkeypatch.setitem(TOOL_FORMATS, "broken", None)  # which also takes it away at the end

    @register_tool_format("broken", "<call>", begins="<call>")
    def parse(text, tools):
        yield 3, 9, "an error of its own."
        raise KeyError("oops")

    turn = parse_tool_calls("Hm <call>x", "broken")
    reason = "a tool call cannot be read: KeyError: 'oops'."
    assert turn == Turn("Hm", [], ["an error of its own.", reason])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", r'<tool_call>{"name": "f\ud83d", "arguments": {"\udc00": ["\ud83d"]}}'),
        ("lfm2", r"<|tool_call_start|>[f(x={'\udc00': ['\ud83d']})]"),
        ("gpt_oss", r'<|channel|>commentary to=f<|message|>{"\udc00": ["\ud83d"]}'),
        ("hermes", r'<tool_call>{"name": "f\ud83d", "arguments": 1}'),
    ],
)
def test_half_of_a_surrogate_pair_becomes_a_replacement_character(name, text):
    turn = parse_tool_calls(text, name)
    assert len(turn.calls) + len(turn.errors) == 1
    shown = json.dumps(turn, ensure_ascii=False)
    assert "\N{REPLACEMENT CHARACTER}" in shown and shown.encode()


def test_a_whole_surrogate_pair_is_a_character():
    text = r'<tool_call>{"name": "f", "arguments": {"x": "\ud83d\ude00"}}'
    assert parse_tool_calls(text, "hermes").calls == [("f", {"x": "\N{GRINNING FACE}"})]


def test_long_white_space_around_channels_is_read():
    """In linear time: with cubic time this does not end."""
    space = "\n" * 20_000
    assert parse_tool_calls(space, "gpt_oss") == Turn(space, [], [])
    assert parse_tool_calls(f"<|channel|>{'a' * 20_000}{space}", "gpt_oss").calls == []
    text = f"<|start|>assistant{space}to=f{space}<|channel|>commentary{space}json{space}<|message|>"
    assert parse_tool_calls(text + "{}", "gpt_oss") == Turn("", [("f", {})], [])


@pytest.mark.parametrize("header", ["commentary to=g", "commentaryto=g", "commentary  to=g json"])
def test_a_recipient_stands_behind_the_channel_too(header):
    turn = parse_tool_calls(f"Hm<|channel|>{header}<|message|>{{}}<|call|>", "gpt_oss")
    assert turn == Turn("Hm", [("g", {})], [])
