"""One normal form of rows, from files, Arrow tables and Python, for every algorithm."""

import json
import re

import pytest
from test_data_prepare import CHATML, bot, byte_tokenizer, marked, user

from relax.data import FormatOptions, Limits, prepare, prepare_preferences, read_rows
from relax.data.prompts import prepare_prompts
from relax.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

# Writes tools, calls and content, as the templates of models with tools do.
TOOLS = """\
{%- if tools -%}{% for t in tools %}{{ t | tojson }}{% endfor %}{%- endif -%}
{%- for m in messages -%}<|im_start|>{{ m.role }}
{% if m.content %}{{ m.content }}{% endif -%}
{%- for c in m.tool_calls or [] -%}{"name": "{{ c.function.name }}", "arguments": {{ \
c.function.arguments | tojson }}}{%- endfor -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


def tool(name, properties, required=()):
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def calling(question, name, arguments, properties, required=()):
    return {
        "messages": [
            user(question),
            {"role": "assistant", "tool_calls": [call(name, arguments)]},
        ],
        "tools": [tool(name, properties, required)],
    }


PORT = {"port": {"type": "string"}}
AMOUNT = {"amount": {"type": "integer"}}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(TOOLS)


def texts(rows, tokenizer):
    examples, _ = prepare(rows, tokenizer)
    return [tokenizer.decode(example.input_ids.tolist()) for example in examples]


def through_parquet(rows, path):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return read_rows(path)


def through_jsonl(rows, path):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_rows(path)


def test_arguments_as_json_texts_are_trained_as_the_object(tokenizer):
    rows = [
        calling("?", "at", arguments, PORT)
        for arguments in ({"port": "Brest"}, '{"port": "Brest"}')
    ]
    given, text = texts(rows, tokenizer)
    assert given == text and '"arguments": {"port": "Brest"}' in text
    prompt = [{"prompt": row["messages"] + [user("and?")], "tools": row["tools"]} for row in rows]
    ids = prepare_prompts(prompt, tokenizer).prompt_ids
    assert ids[0] == ids[1]
    pairs = [
        {"prompt": [user("?")], "chosen": row["messages"][1:], "rejected": [bot("no")]}
        for row in rows
    ]
    one, other = prepare_preferences(pairs, tokenizer)[0].items
    assert one.chosen.tolist() == other.chosen.tolist()


def test_a_template_that_concatenates_the_arguments_gets_their_json_text():
    template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}{% endfor %}"
    )
    row = calling("?", "at", {"port": "Brest"}, PORT)
    (text,) = texts([{"messages": row["messages"]}], byte_tokenizer(template))
    assert text == 'at {"port": "Brest"}'


def test_arguments_that_are_no_json_object_are_refused_with_their_place(tmp_path):
    for arguments, reason in (('{"port"', "is broken JSON"), ('"x"', "that of a str")):
        row = calling("?", "at", arguments, PORT)
        with pytest.raises(DataError, match=r"a.jsonl:1: messages\[1\].tool_calls\[0\].*" + reason):
            through_jsonl([row], tmp_path / "a.jsonl")


def test_json_texts_in_place_of_messages_and_tools_are_read(tokenizer):
    row = calling("?", "at", {"port": "Brest"}, PORT)
    whole = {name: json.dumps(value) for name, value in row.items()}
    each = {name: [json.dumps(item) for item in value] for name, value in row.items()}
    assert len(set(texts([row, whole, each], tokenizer))) == 1


# Nulls that Arrow's alignment makes


ALIGNED = [
    calling("a", "at", {"port": "Brest"}, {"port": {"type": "string", "default": None}}),
    calling("b", "pay", {"amount": 5}, AMOUNT),
    {"messages": [user("c"), bot("none")], "tools": [tool("none", {})]},
]


def test_rows_with_different_tools_are_the_same_through_parquet(tokenizer, tmp_path):
    plain = through_jsonl(ALIGNED, tmp_path / "a.jsonl")
    arrow = through_parquet(ALIGNED, tmp_path / "a.parquet")
    assert texts(arrow, tokenizer) == texts(plain, tokenizer)
    assert "amount" not in texts(arrow, tokenizer)[0] and '"default": null' in json.dumps(
        arrow.rows[0]["tools"]
    )


def test_nulls_on_purpose_stay(tokenizer, tmp_path):
    optional = {"port": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}}
    rows = [
        calling("a", "at", {"port": None, "day": 1}, optional | {"day": {"enum": [1, None]}}),
        calling("b", "at", {"port": "Brest"}, {"port": {"type": "string", "default": "x"}}),
        calling("c", "pay", {"amount": None}, AMOUNT, ["amount"]),
        calling("d", "pay", {"amount": 3}, AMOUNT, ["amount"]),
    ]
    plain = through_jsonl(rows, tmp_path / "a.jsonl")
    arrow = through_parquet(rows, tmp_path / "a.parquet")
    for ours, theirs in zip(arrow.rows, plain.rows, strict=True):
        assert ours["tools"] == theirs["tools"]
        assert ours["messages"][1] == theirs["messages"][1]


def test_nulls_of_jsonl_rows_are_left_alone(tmp_path):
    row = calling("a", "at", {"port": None}, PORT | AMOUNT)
    rows = [row, calling("b", "at", {"port": "Brest"}, PORT)]
    assert through_jsonl(rows, tmp_path / "a.jsonl").rows == rows


def test_columns_that_are_no_conversation_keep_their_nulls(tmp_path):
    rows = [
        {"text": "a", "about": {"x": 1, "y": None}},
        {"text": "b", "about": {"x": None, "y": 2}},
    ]
    assert through_parquet(rows, tmp_path / "a.parquet").rows == rows


class Features(dict):
    def to_dict(self):
        return dict(self)


class Dataset(list):
    """As the `datasets` library has it: rows aligned, features that say what is a struct."""

    def __init__(self, rows, features):
        super().__init__(rows)
        self.features = Features(features)


def test_objects_of_the_datasets_library_are_read_like_their_parquet_files(tmp_path):
    aligned = pa.Table.from_pylist(ALIGNED).to_pylist()
    string, number = ({"dtype": kind, "_type": "Value"} for kind in ("string", "int64"))
    function = {"name": string, "arguments": {"port": string, "amount": number}}
    calls = {"_type": "List", "feature": {"type": string, "function": function}}
    message = {"role": string, "content": string, "tool_calls": calls}
    properties = {
        "port": {"type": string, "default": {"dtype": "null", "_type": "Value"}},
        "amount": {"type": string},
    }
    required = {"_type": "List", "feature": string}
    parameters = {"type": string, "properties": properties, "required": required}
    about = {"type": string, "function": {"name": string, "parameters": parameters}}
    features = {
        "messages": {"_type": "List", "feature": message},
        "tools": {"_type": "List", "feature": about},
    }
    rows = read_rows(Dataset(aligned, features))
    assert rows.rows == through_parquet(ALIGNED, tmp_path / "a.parquet").rows
    # A Json feature is read by the library itself: its nulls are as they were written.
    json_features = {"messages": {"_type": "List", "feature": {"_type": "Json"}}}
    given = [{"messages": [user("a") | {"note": None}]}, {"messages": [user("b") | {"note": 1}]}]
    assert read_rows(Dataset(given, json_features)).rows == given


def test_json_columns_of_datasets_5_2_are_read(tokenizer, tmp_path):
    """`datasets` 5.2 writes rows of different shape as JSON texts, marked in the metadata."""
    messages = [[json.dumps(m) for m in row["messages"]] for row in ALIGNED]
    tools = [[json.dumps(t) for t in row["tools"]] for row in ALIGNED]
    item = {"feature": {"_type": "Json"}, "_type": "List"}
    about = {"info": {"features": {"messages": item, "tools": item}}}
    table = pa.table({"messages": messages, "tools": tools})
    table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert texts(read_rows(tmp_path / "a.parquet"), tokenizer) == texts(ALIGNED, tokenizer)


def test_directories_of_save_to_disk_are_read(tmp_path):
    rows = [{"prompt": "1+1=", "completion": "2"}]
    for split in ("train", "test"):
        folder = tmp_path / split
        folder.mkdir()
        (folder / "state.json").write_text("{}")
        with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file:
            table = pa.Table.from_pylist(rows)
            with pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
        (folder / "cache-1234.arrow").write_bytes(b"not read")
    assert read_rows(tmp_path, "test").rows == rows


# Message content


def test_text_parts_are_joined_and_others_refused_by_name(tokenizer, tmp_path):
    parts = [{"type": "text", "text": "Nine "}, {"type": "text", "text": "metres."}]
    row = {"messages": [user("?"), bot(parts)]}
    assert texts([row], tokenizer) == texts([{"messages": [user("?"), bot("Nine metres.")]}],
                                            tokenizer)  # fmt: skip
    row["messages"][0] = user([{"type": "image", "url": "a.png"}])
    with pytest.raises(DataError, match=r"a.jsonl:1: messages\[0\].content\[0\] .*type 'image'"):
        through_jsonl([row], tmp_path / "a.jsonl")


def test_a_template_that_takes_parts_only_gets_parts():
    template = (
        "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}"
        "<|im_end|>{% endfor %}"
    )
    assert texts([{"messages": [user("Hi"), bot("Yo")]}], byte_tokenizer(template)) == [
        "Hi<|im_end|>Yo<|im_end|>"
    ]


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"text": "a\\ud83d"}', r"a.jsonl:1: a text holds U\+D83D, half of a surrogate pair"),
        ('{"messages": [{"role": "user", "content": "\\udc00"}]}', r"a.jsonl:1: .*U\+DC00"),
        ('{"prompt": "a", "\\ud83d": 1}', r"a.jsonl:1: .*U\+D83D"),
        ('{"messages": ["a", "b"]}', r"a.jsonl:1: 'messages\[0\]' must be an object, it is 'a'"),
    ],
)
def test_what_is_no_text_or_no_message_is_refused_with_its_place(tokenizer, tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=reason):
        prepare(read_rows(tmp_path / "a.jsonl"), tokenizer)


# Limits


def test_a_row_above_the_limit_is_refused_before_it_is_tokenised(tmp_path):
    limits = Limits(max_row_bytes=100)
    rows = [{"text": "short"}, {"text": "x" * 200}]
    with pytest.raises(DataError, match=r"a.jsonl:2: the row has more bytes, max_row_bytes=100"):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        read_rows(tmp_path / "a.jsonl", limits=limits)
    with pytest.raises(DataError, match=r"row 1: .*--max_row_bytes"):
        read_rows(rows, limits=limits)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet:2: "):
        read_rows(tmp_path / "a.parquet", limits=limits)


def test_depth_and_size_of_files_are_limited(tmp_path):
    deep = {"text": "a", "x": [[[[1, []]]]]}
    with pytest.raises(DataError, match="row 0: .*more than max_json_depth=3 levels deep"):
        read_rows([deep], limits=Limits(max_json_depth=3))
    assert read_rows([deep]).rows == [deep]
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 10)
    with pytest.raises(DataError, match="1 files hold 140 bytes, max_file_gib=1e-07"):
        read_rows(tmp_path / "a.jsonl", limits=Limits(max_file_gib=1e-7))


# Names of files and columns


def test_shards_of_two_splits_are_not_read_as_one(tmp_path):
    for name in ("train_sft-00000-of-00001", "train_gen-00000-of-00001"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    with pytest.raises(DataError, match="no split 'train' in .*: it has train_gen, train_sft"):
        read_rows(tmp_path)
    assert read_rows(tmp_path, "train_sft").rows == [{"text": "train_sft-00000-of-00001"}]


def test_only_a_line_feed_ends_a_line_of_a_text_file(tmp_path):
    lines = ["a\u2028b", "c\u0085d", "e\x0bf", "g\x0ch"]
    (tmp_path / "a.txt").write_text("\r\n".join(lines) + "\n\n", encoding="utf-8", newline="")
    assert [row["text"] for row in read_rows(tmp_path / "a.txt").rows] == lines


def test_csv_is_read_with_quoted_cells_over_lines(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,completion\n"1+1=\n",2\n"a ""b""",\n')
    rows = read_rows(tmp_path / "a.csv")
    assert rows.rows == [
        {"prompt": "1+1=\n", "completion": "2"},
        {"prompt": 'a "b"', "completion": None},
    ]
    assert [rows.origin(i).rpartition(":")[2] for i in range(2)] == ["3", "4"]


def test_completions_that_repeat_the_messages_of_the_prompt_are_taken_once(tokenizer):
    """Whole conversations next to a prompt of messages: nothing is rendered or trained twice."""
    system, asked = {"role": "system", "content": "Be kind"}, user("Hi")
    for prompt, repeated in (([asked], [asked]), ([system, asked], [asked])):
        pair = {"prompt": prompt, "chosen": [bot("Yo")], "rejected": [bot("No")]}
        whole = pair | {n: [*repeated, *pair[n]] for n in ("chosen", "rejected")}
        expected = prepare_preferences([pair], tokenizer)[0]
        found, report = prepare_preferences([whole], tokenizer)
        assert found.digest == expected.digest
        note = "1 rows repeat the messages of the prompt in their completions: taken once"
        assert note in report.notes
        rows = [{"prompt": prompt, "completion": [*repeated, bot("Yo")]}]
        (one,), _ = prepare(rows, tokenizer)
        (other,), _ = prepare([{"prompt": prompt, "completion": [bot("Yo")]}], tokenizer)
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.labels.tolist() == other.labels.tolist()


def test_messages_that_their_row_excludes_are_not_trained_in_any_format(tokenizer):
    """`weight` as in OpenAI's fine-tuning files, `train` as in axolotl's."""
    for key, value, trains in (("weight", 1, True), ("weight", 0, False), ("train", False, False)):
        answer = bot("Yo") | {key: value}
        turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo", key: value}]
        for row in (
            {"messages": [user("Hi"), answer]},
            {"conversations": turns},
            {"prompt": [user("Hi")], "completion": [user("So?"), answer]},
        ):
            ((ids, labels),), _ = prepare([row], tokenizer)
            where = [i for i, token in enumerate(ids.tolist()) if tokenizer.decode([token]) == "Y"]
            assert (labels[where] != -100).tolist() == [trains]
    half = {"conversations": [*turns[:1], turns[1] | {"train": 0.5}]}
    with pytest.raises(
        DataError, match=r"row 0: conversations\[1\] has 'train' 0.5, and a message"
    ):
        prepare([half], tokenizer)


def test_tool_calls_of_conversations_with_from_and_value_are_rendered_or_reported(tokenizer):
    call = {"function": {"name": "look_up", "arguments": {"port": "Brest"}}}
    rows = [
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "", "tool_calls": [call]},
            ]
        }
    ]
    assert '{"name": "look_up", "arguments": {"port": "Brest"}}' in texts(rows, tokenizer)[0]
    notes = prepare(rows, byte_tokenizer(CHATML))[1].notes
    assert any("does not render the tool_calls of 1 rows" in note for note in notes)


def test_pairs_in_csv_files_are_those_of_jsonl_files(tokenizer, tmp_path):
    pair = {"chosen": [user("Hi"), bot("Yo")], "rejected": [user("Hi"), bot("No")]}
    texts = [json.dumps(messages).replace('"', '""') for messages in pair.values()]
    file = tmp_path / "pairs.csv"
    file.write_text(f'chosen,rejected,margin\n"{texts[0]}","{texts[1]}",0.5\n')
    found, report = prepare_preferences(file, tokenizer, for_reward_model=True)
    wanted = prepare_preferences([pair | {"margin": 0.5}], tokenizer, for_reward_model=True)[0]
    assert found.digest == wanted.digest and found.items[0].margin == 0.5
    assert any("as JSON texts: read as JSON" in note for note in report.notes)
    file.write_text("prompt,completion,label\na,[1],True\nb,[2],false\n")
    found, _ = prepare_preferences(file, tokenizer, unpaired=True)
    assert [item.is_desirable for item in found.items] == [True, False]
    assert [tokenizer.decode(item.chosen) for item in found.items] == [
        "[1]<|im_end|>",
        "[2]<|im_end|>",
    ]


def test_prompts_that_end_with_an_assistants_message_are_reported(tokenizer):
    prompt, a, b = [user("Hi"), bot("Yo")], [bot("A")], [bot("B")]
    pair, starts = {"chosen": a, "rejected": b}, ([user("Hi")], [user("Ho")])
    reports = [
        prepare_prompts([{"prompt": prompt}], tokenizer),
        prepare([{"prompt": prompt, "completion": a}], tokenizer)[1],
        prepare_preferences([{"prompt": prompt} | pair], tokenizer)[1],
        prepare_preferences([{"chosen": prompt + a, "rejected": prompt + b}], tokenizer)[1],
        prepare_preferences(
            [{"prompt": [*start, bot("Yo")], "completion": a, "label": True} for start in starts],
            tokenizer,
            unpaired=True,
        )[1],
    ]
    for report in reports:
        (note,) = [note for note in report.notes if "message of the assistant" in note]
        assert re.match("the prompts of [12] rows end with .* a completion begins a new one", note)
    assert not prepare([{"messages": prompt}], tokenizer)[1].notes


def test_alpacas_columns_are_a_prompt_and_a_completion_and_the_report_says_so():
    rows = [
        {"instruction": "Add", "input": "2, 3", "output": "5"},
        {"instruction": "Hi", "input": "", "output": "Yo"},
    ]
    plain, chat = byte_tokenizer(None), byte_tokenizer(CHATML)
    examples, report = prepare(rows, plain)
    assert [marked(e, plain) for e in examples] == ["Add\n\n2, 3«5<|im_end|>»", "Hi«Yo<|im_end|>»"]
    assert any("instruction and input are read as the prompt" in note for note in report.notes)
    examples, _ = prepare(rows, chat)
    assert marked(examples[1], chat).endswith(
        "user\nHi<|im_end|>\n<|im_start|>assistant\n«Yo<|im_end|>\n»"
    )


def test_a_text_prompt_beside_whole_conversations_is_taken_from_them(tokenizer):
    """UltraFeedback and UltraChat."""
    pair = {
        "prompt": "Hi",
        "chosen": [user("Hi"), bot("Yo")],
        "rejected": [user("Hi"), bot("No")],
    }
    found, report = prepare_preferences([pair], tokenizer)
    del pair["prompt"]
    assert found.digest == prepare_preferences([pair], tokenizer)[0].digest
    assert any("the prompt is that of the conversations" in note for note in report.notes)
    chat = {"prompt": "Hi", "messages": [user("Hi"), bot("Yo")]}
    examples, report = prepare([chat], tokenizer)
    assert texts([{"messages": chat["messages"]}], tokenizer) == [
        tokenizer.decode(examples[0].input_ids.tolist())
    ]
    assert "messages are used, the prompt next to them is not" in report.notes


def test_tools_and_masks_that_begin_in_a_later_row_are_used(tokenizer):
    rows = [{"messages": [user("a"), bot("b")]}, ALIGNED[0]]
    _, report = prepare(rows, tokenizer)
    assert "tools" in report.columns and report.unused_columns == ()
    pairs = [
        {"prompt": [user("a")], "chosen": [bot("b")], "rejected": [bot("c")]},
        {
            "prompt": [user("a")],
            "chosen": [bot("b")],
            "rejected": [bot("c")],
            "tools": [tool("at", {})],
        },
    ]
    assert "tools" in prepare_preferences(pairs, tokenizer)[1].columns
    masked = [{"input_ids": [1, 2]}, {"input_ids": [1, 2], "completion_mask": [0, 1]}]
    with pytest.raises(DataError, match="row 0: column 'completion_mask' is missing"):
        prepare(masked, tokenizer, FormatOptions())


def test_changes_are_noted_in_every_report(tokenizer):
    row = calling("?", "at", '{"port": "Brest"}', PORT)
    note = "1 rows hold arguments of tool calls as JSON texts: read as objects"
    assert note in prepare([row], tokenizer)[1].notes
    prompt = {"prompt": row["messages"] + [user("!")]}
    assert note in prepare_prompts([prompt], tokenizer).notes
    assert note in prepare_prompts([prompt], tokenizer).report()
    pair = {"prompt": prompt["prompt"], "chosen": [bot("a")], "rejected": [bot("b")]}
    assert note in prepare_preferences([pair], tokenizer)[1].notes
