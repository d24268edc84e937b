"""Rows are read from where they are; what is broken is named by file and line."""

import json
import sys
import types

import pytest

from relax.data import read_rows
from relax.errors import DataError

ROWS = [{"text": "a"}, {"text": "é"}]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_json_lines_are_read_with_the_line_of_each_row(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n\n  \n{"text": "é"}')
    read = read_rows(str(path))
    assert read.rows == ROWS
    assert [read.origin(i) for i in range(2)] == [f"{path}:1", f"{path}:4"]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    assert (
        read_rows(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + jsonl(ROWS).encode())).rows == ROWS
    )


def test_a_json_list_is_read_with_the_line_of_each_row(tmp_path):
    path = write(tmp_path / "a.json", '[\n  {"text": "a"},\n\n  {\n "text": "é"\n}\n]\n')
    read = read_rows(path)
    assert read.rows == ROWS
    assert [read.origin(i) for i in range(2)] == [f"{path}:2", f"{path}:4"]


def test_json_lines_in_a_json_file_are_read(tmp_path):
    assert read_rows(write(tmp_path / "a.json", jsonl(ROWS))).rows == ROWS


def test_parquet_is_read_with_the_number_of_each_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    read = read_rows(path)
    assert read.rows == ROWS and read.origin(1) == f"{path}:2"


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"pip install 'relax-trainers\[parquet\]'"):
        read_rows(write(tmp_path / "a.parquet", b"PAR1"))


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("a.jsonl", '{"t": "a"}\n{"t": "a", "t": "b"}\n', "a.jsonl:2: .*the key 't' occurs twice"),
        ("a.json", '[{"m": [{"r": 1, "r": 2}]}]', "a.json:1: .*the key 'r' occurs twice"),
        ("a.csv", "t,u,t\na,b,c\n", "a.csv: two columns are named 't'"),
    ],
)
def test_a_name_that_occurs_twice_is_refused_since_one_value_would_be_lost(
    name, content, reason, tmp_path
):
    with pytest.raises(DataError, match=reason):
        read_rows(write(tmp_path / name, content))


def test_two_columns_of_one_name_in_parquet_are_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["t", "t"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet: two columns are named 't'"):
        read_rows(tmp_path / "a.parquet")


def test_a_split_with_a_missing_file_is_refused(tmp_path):
    for number in (0, 2):
        write(tmp_path / f"train-0000{number}-of-00003.jsonl", GOOD)
    with pytest.raises(DataError, match="train' has 2 of 3 files, file 00001 of 00003 is missing"):
        read_rows(tmp_path)
    write(tmp_path / "train-00001-of-00003.jsonl", GOOD)
    assert len(read_rows(tmp_path)) == 3
    assert len(read_rows(tmp_path / "train-00002-of-00003.jsonl")) == 1


def test_a_damaged_parquet_file_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match="a.parquet: not a readable parquet file"):
        read_rows(write(tmp_path / "a.parquet", b"PAR1 and then nothing"))


GOOD = '{"text": "a"}\n'


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", GOOD + '{"text": "a",}\n' + GOOD, r"a.jsonl:2: broken JSON: .* at column 1\d"),
        ("a.jsonl", GOOD + '{"text": "a', r"a.jsonl:2: broken JSON in the last line.*truncated"),
        ("a.jsonl", GOOD + '{"text": "\0"}\n', r"a.jsonl:2: byte 11 is NUL: the file is damaged"),
        ("a.jsonl", GOOD.encode() + b'{"t": "\xff"}\n', r"a.jsonl:2: not UTF-8: byte 8 is 0xff"),
        ("a.jsonl", GOOD.encode("utf-16"), r"a.jsonl:1: not UTF-8"),
        ("a.jsonl", GOOD + "[1, 2]\n", r"a.jsonl:2: a row must be a JSON object, this is a list"),
        ("a.jsonl", "", r"a.jsonl: the file holds no rows"),
        ("a.jsonl", "\n\n", r"a.jsonl: the file holds no rows"),
        ("a.jsonl", "[" * 100_000 + "\n", r"a.jsonl:1: broken JSON: nested too deeply"),
        ("a.jsonl", "1" * 5000 + "\n", r"a.jsonl:1: broken JSON: "),
        ("a.json", "[" + GOOD + ',"b"]', r"a.json:2: a row must be a JSON object, this is a str"),
        ("a.json", '[{"a": 1},\n{"b" 2}]', r"a.json:2: broken JSON: .* at column 6"),
        (
            "a.json",
            '[{"a": 1}\n{"b": 2}]',
            r"a.json:2: broken JSON: the list of rows is not closed",
        ),
        ("a.json", '[{"a": 1},\n', r"a.json:2: broken JSON"),
        ("a.json", '[{"a": 1}]\n[]', r"a.json:1: broken JSON: text follows the end"),
        ("a.json", "[]", r"a.json: the file holds no rows"),
        ("a.json", b"[\n\xff]", r"a.json:2: not UTF-8"),
        ("a.xlsx", "text\na\n", r"cannot read .*a.xlsx.* ends in .jsonl"),
        ("a.csv", "text,b\na,b\nc\n", r"a.csv:3: the row has 1 cells, the first line names 2 col"),
        ("a.csv", 'text\n"a\n', r"a.csv:2: broken CSV: unexpected end of data"),
    ],
)
def test_a_broken_file_is_refused_with_file_and_line(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read_rows(write(tmp_path / name, content))


def texts(*args, **kwargs):
    return [row["text"] for row in read_rows(*args, **kwargs).rows]


def directory(root, **files):
    for name, text in files.items():
        write(root / (name.replace("__", "/") + ".jsonl"), jsonl([{"text": text}]))
    return root


def test_files_of_a_directory_belong_to_the_split_of_their_name(tmp_path):
    write(tmp_path / "train-00000-of-00002.jsonl", jsonl([{"text": "1"}]))
    write(tmp_path / "train-00001-of-00002.jsonl", jsonl([{"text": "2"}, {"text": "3"}]))
    write(tmp_path / "test.jsonl", jsonl([{"text": "4"}]))
    write(tmp_path / "README.md", "no rows")
    write(tmp_path / "dataset_infos.json", "{}")
    assert texts(tmp_path) == ["1", "2", "3"]
    assert texts(tmp_path, "test") == ["4"]
    read = read_rows(tmp_path)
    assert read.origin(2) == f"{tmp_path}/train-00001-of-00002.jsonl:2"
    with pytest.raises(DataError, match="no split 'dev' in .*: it has test, train"):
        read_rows(tmp_path, "dev")


def test_a_split_may_be_a_folder(tmp_path):
    directory(tmp_path, train__0000="1", test__0000="2")
    assert (texts(tmp_path), texts(tmp_path, "test")) == (["1"], ["2"])


def test_a_split_of_exactly_that_name_comes_before_longer_names(tmp_path):
    directory(tmp_path, train="1", train_sft="2")
    assert (texts(tmp_path), texts(tmp_path, "train_sft")) == (["1"], ["2"])


def test_files_without_split_names_are_all_train(tmp_path):
    directory(tmp_path, b="2", a="1")
    assert texts(tmp_path) == ["1", "2"]
    with pytest.raises(DataError, match="no split 'test' in .*: it has a, b"):
        read_rows(tmp_path, "test")


def test_a_configuration_is_a_folder_and_must_be_chosen_where_there_are_several(tmp_path):
    directory(tmp_path, main__train="1", other__train="2")
    assert texts(tmp_path, config="other") == ["2"]
    with pytest.raises(DataError, match="choose one with dataset_config: main, other"):
        read_rows(tmp_path)
    with pytest.raises(DataError, match="no configuration 'mian'"):
        read_rows(tmp_path, config="mian")


def test_a_directory_without_data_files_is_refused(tmp_path):
    with pytest.raises(DataError, match="no .jsonl, .json or .parquet file in"):
        read_rows(tmp_path)


def test_one_file_is_the_split_it_is_asked_for_as_unless_it_is_named_train(tmp_path):
    assert read_rows(write(tmp_path / "held_out.jsonl", jsonl(ROWS)), "test").rows == ROWS
    with pytest.raises(DataError, match="holds the split 'train' by its name, not 'test'"):
        read_rows(write(tmp_path / "train.jsonl", jsonl(ROWS)), "test")


def test_what_is_neither_a_file_nor_a_hub_name_is_one_clear_error(tmp_path):
    for name in (tmp_path / "missing", "missing.jsonl", "a/b/c"):
        with pytest.raises(DataError, match="is neither a file nor a directory: check the path"):
            read_rows(name)


def test_an_unreachable_hub_name_is_one_clear_error(monkeypatch, tmp_path):
    hub = types.ModuleType("huggingface_hub")

    def snapshot_download(name, **kwargs):
        raise ConnectionError("no network\nlong explanation")

    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(DataError, match=r"^'some/data' is neither .* on the hub: no network$"):
        read_rows("some/data")


def test_a_hub_name_is_read_from_its_snapshot(monkeypatch, tmp_path):
    hub = types.ModuleType("huggingface_hub")
    asked = {}

    def snapshot_download(name, **kwargs):
        asked.update(kwargs, name=name)
        return str(directory(tmp_path, **{"data__train-00000-of-00001": "1"}))

    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert texts("some/data") == ["1"]
    assert asked["name"] == "some/data" and asked["repo_type"] == "dataset"
    assert "*.parquet" in asked["allow_patterns"] and "*.py" not in asked["allow_patterns"]


class LikeADataset:
    """What a `datasets.Dataset` is to a reader: rows by iteration, and a length."""

    def __iter__(self):
        return iter(ROWS)

    def __len__(self):
        return len(ROWS)


@pytest.mark.parametrize(
    "dataset", [ROWS, tuple(ROWS), iter(ROWS), LikeADataset(), {"train": ROWS, "test": []}]
)
def test_python_objects_are_read(dataset):
    read = read_rows(dataset)
    assert read.rows == ROWS and read.origin(1) == "row 1"


@pytest.mark.parametrize(
    "dataset, message",
    [
        ([{"text": "a"}, "b"], "row 1: is a str, not a dict"),
        ([], "no rows"),
        ({"test": ROWS}, "no split 'train', it has test"),
        ({"train": {"text": ["a"]}}, "an iterable of dicts, got a dict"),
        (7, "an iterable of dicts, got a int"),
    ],
)
def test_python_objects_that_are_no_rows_are_refused(dataset, message):
    with pytest.raises(DataError, match=message):
        read_rows(dataset)
