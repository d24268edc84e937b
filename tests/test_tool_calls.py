"""Tool calls in the formats of the families, as their published templates write them."""

import json

import pytest

from relax.data.tool_calls import TOOL_FORMATS, Turn, parse_tool_calls, tool_format

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
