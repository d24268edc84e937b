"""Rows in the forms of other tools: read as they are, or converted by `relax data convert`."""

import datetime
import json

import pytest
from runs import write_rows
from test_data_prepare import CHATML, bot, byte_tokenizer, marked, one, user

from relax.data import FormatOptions, prepare, read_rows
from relax.errors import ConfigError, DataError
from relax.tools.convert import main

HI = [user("Hi"), bot("Yo")]
SYSTEM = {"role": "system", "content": "S"}
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
TEXT = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n" + (
    "<|im_start|>assistant\nYo<|im_end|>\n"
)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def test_the_system_column_is_the_system_message_of_conversations_that_have_none(tokenizer):
    rows = [
        {"system": "S", "conversations": SHAREGPT},
        {"system": "no", "conversations": [{"from": "system", "value": "S"}, *SHAREGPT]},
        {"system": "S", "messages": HI},
    ]
    for row in rows:
        examples, report = prepare([row], tokenizer, FormatOptions(system_prompt="never"))
        assert tokenizer.decode(examples[0].input_ids) == TEXT
        assert "system" in report.columns and not report.unused_columns
        assert any(note.startswith("the column system is") for note in report.notes)
    assert tokenizer.decode(prepare([{"system": None, "messages": HI}, rows[2]], tokenizer)[0][0][0]
                            ).startswith("<|im_start|>system\nBe kind")  # fmt: skip
    with pytest.raises(DataError, match="row 0: 'system' must be a string, it is 3"):
        prepare([{"system": 3, "messages": HI}], tokenizer)


def test_messages_have_roles_or_froms_in_either_column(tokenizer):
    expected = one({"messages": HI}, tokenizer)
    assert one({"conversations": HI}, tokenizer) == expected
    assert one({"messages": SHAREGPT}, tokenizer) == expected


def test_a_response_is_a_completion(tokenizer):
    plain = byte_tokenizer(None)
    examples, report = prepare([{"prompt": "1+1=", "response": "2"}], plain)
    assert marked(examples[0], plain) == "1+1=«2<|im_end|>»"
    assert any(note.startswith("response is read as the completion") for note in report.notes)
    text = one({"prompt": "Hi", "response": "Yo"}, tokenizer)
    assert text.endswith("user\nHi<|im_end|>\n<|im_start|>assistant\n«Yo<|im_end|>\n»")
    assert one({"prompt": HI[:1], "response": HI[1:]}, tokenizer) == text


def test_chatml_texts_are_recognised(tokenizer):
    _, report = prepare([{"text": TEXT}], tokenizer)
    assert any("rows are ChatML texts, trained whole: `relax data" in note for note in report.notes)
    with pytest.raises(ConfigError, match="format text: `relax data convert` makes messages"):
        prepare([{"text": TEXT}], tokenizer, FormatOptions(assistant_only_loss=True))


def test_rows_of_all_forms_are_converted(tmp_path, capsys):
    rows = [
        {"system": "S", "conversations": SHAREGPT, "id": 7},
        {"instruction": "Add", "input": "2, 3", "output": "5"},
        {"prompt": "Hi", "response": "Yo", "system": "S"},
        {"prompt": "Hi", "completion": "Yo"},
        {"text": TEXT},
        {"messages": HI, "tools": [{"name": "at"}]},
    ]
    source, target = tmp_path / "rows.jsonl", tmp_path / "new.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["convert", str(source), str(target)]) == 0
    assert "6 rows with messages are in" in capsys.readouterr().out
    assert read_rows(target).rows == [
        {"messages": [SYSTEM, *HI], "id": 7},
        {"messages": [user("Add\n\n2, 3"), bot("5")]},
        {"messages": [SYSTEM, *HI]},
        {"messages": HI},
        {"messages": [SYSTEM, *HI]},
        {"messages": HI, "tools": [{"name": "at"}]},
    ]
    tokenizer = byte_tokenizer(CHATML)
    assert len(prepare(target, tokenizer, FormatOptions(assistant_only_loss=True))[0]) == 6
    assert main(["convert", str(source), str(target)]) == 2
    assert "must be a new .jsonl file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"question": "Hi"}, ":1: the row is of no known form: it has 'question'"),
        ({"text": TEXT + "lost"}, ":1: the ChatML text has 'lost' at character"),
        ({"messages": ["Hi"]}, ":1: 'messages[0]' must be an object, it is 'Hi'"),
        ({"prompt": ["Hi"], "response": "Yo"}, ":1: 'prompt[0]' must be an object, it is 'Hi'"),
        ({"instruction": "a", "output": 3}, ":1: 'output' must be a string, it is 3"),
    ],
)
def test_rows_that_cannot_be_converted_are_refused_with_their_place(row, reason, tmp_path, capsys):
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps(row))
    assert main(["convert", str(source), str(tmp_path / "new.jsonl")]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "new.jsonl").exists()


def test_a_json_object_of_columns_is_read_as_its_rows(tmp_path):
    path = tmp_path / "rows.json"
    pairs = [{"prompt": "a", "completion": "1"}, {"prompt": "b", "completion": "2"}]
    for columns in (
        {"prompt": ["a", "b"], "completion": ["1", "2"]},
        {"prompt": {"0": "a", "1": "b"}, "completion": {"0": "1", "1": "2"}},  # pandas
    ):
        path.write_text(json.dumps(columns, indent=1))
        assert read_rows(path).rows == pairs
    path.write_text(json.dumps({"messages": [HI, HI]}))
    assert read_rows(path).rows == [{"messages": HI}] * 2
    for row in ({"messages": HI}, {"input_ids": [1, 2], "labels": [1, 2]}, pairs[0]):
        path.write_text(json.dumps(row))
        assert read_rows(path).rows == [row]
    path.write_text(json.dumps({"prompt": ["a", "b"], "completion": ["1"]}))
    with pytest.raises(DataError, match="columns have different lengths: {'prompt': 2, 'compl"):
        read_rows(path)


def test_several_sources_are_written_one_after_the_other(tmp_path, capsys):
    files = [write_rows(tmp_path / f"{name}.jsonl", [{"prompt": name, "response": "2"}])
             for name in "ab"]  # fmt: skip
    out = tmp_path / "out.jsonl"
    assert main(["convert", ",".join(map(str, files)), str(out)]) == 0
    made = [json.loads(line)["messages"][0]["content"] for line in out.read_text().splitlines()]
    assert made == ["a", "b"]
    assert main(["convert", f"{files[0]}:1,{files[1]}:2", str(tmp_path / "weighted.jsonl")]) == 2
    assert "rows are written once each, got weights" in capsys.readouterr().err


def test_a_value_that_json_does_not_have_is_refused_with_its_place(tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    table = pyarrow.table({"prompt": ["a"], "response": ["b"],
                           "day": [datetime.date(2026, 1, 2)]})  # fmt: skip
    parquet.write_table(table, tmp_path / "a.parquet")
    assert main(["convert", str(tmp_path / "a.parquet"), str(tmp_path / "out.jsonl")]) == 2
    said = capsys.readouterr().err
    assert "a.parquet:1: column 'day' holds a date, which JSON does not have" in said
    assert not (tmp_path / "out.jsonl").exists()
