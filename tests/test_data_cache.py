"""Tokenised rows are kept on disk, found by all they depend on, and never used when damaged."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from runs import additions, environment, finish, flags, metrics, model_bytes, write_rows

from relax.data import (
    DataLoader,
    FormatOptions,
    PreferenceLoader,
    PromptLoader,
    arithmetic_tokenizer,
    prepare,
    prepare_preferences,
    prepare_prompts,
    read_rows,
)
from relax.data.cache import ExampleCache, cache_key
from relax.data.limits import Limits
from relax.data.mixing import parse_sources
from relax.data.sources import read_sources
from relax.data.stored import View
from relax.errors import DataError
from relax.rewards.protocol import describe_columns


@pytest.fixture
def file(tmp_path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", additions(50))


@pytest.fixture
def kept(tmp_path):
    """A directory, and a function that prepares rows with it; returns what was said too."""

    def make(source, tokenizer, options=None, **reading):
        said = []
        cache = ExampleCache(tmp_path / "cache", said.append)
        rows = source if hasattr(source, "rows") else read_rows(source, stored_from=0, **reading)
        examples, report = prepare(rows, tokenizer, options or FormatOptions(), cache=cache)
        return examples, report, said

    return make


def same(one, other) -> bool:
    pairs = zip(one.columns, other.columns, strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def test_kept_rows_and_their_report_are_those_made_in_memory(kept, file, arithmetic_tokenizer):
    plain, plain_report = prepare(read_rows(file), arithmetic_tokenizer)
    first, first_report, said = kept(file, arithmetic_tokenizer)
    again, again_report, said_again = kept(file, arithmetic_tokenizer)
    assert "are kept in" in said[0] and "are read from" in said_again[0]
    assert same(plain, first) and same(plain, again)
    assert plain_report == first_report == again_report
    assert plain.checksums == first.checksums == again.checksums
    assert not first.input_ids.flags.owndata and not first.input_ids.flags.writeable


def test_a_hit_reads_no_row(kept, file, arithmetic_tokenizer, monkeypatch):
    from relax.data import readers

    kept(file, arithmetic_tokenizer)
    monkeypatch.setattr(readers, "parse_row", lambda *_: pytest.fail("a row was read"))
    _, _, said = kept(file, arithmetic_tokenizer)
    assert "are read from" in said[0]


def test_loaders_give_the_same_batches_of_kept_rows(kept, file, arithmetic_tokenizer):
    plain, _ = prepare(read_rows(file), arithmetic_tokenizer)
    mapped, _, _ = kept(file, arithmetic_tokenizer)
    for options in (
        {},
        {"packing": "bfd", "max_length": 32},
        {"packing": "wrapped", "max_length": 7},
    ):
        one, other = (DataLoader(rows, 8, seed=3, **options) for rows in (plain, mapped))
        assert (len(one), one.num_tokens, one.num_trained_tokens) == (
            len(other), other.num_tokens, other.num_trained_tokens)  # fmt: skip
        for a, b in zip(one, other, strict=True):
            assert all(np.array_equal(a[name], b[name]) for name in a)


def test_all_that_tokens_depend_on_is_in_the_key(file, tmp_path):
    rows, tokenizer = read_rows(file, stored_from=0), arithmetic_tokenizer()
    keys = {cache_key(rows.key, tokenizer, FormatOptions(), None)}
    keys.add(cache_key(rows.key, tokenizer, FormatOptions(), 99))
    keys.add(cache_key(rows.key, tokenizer, FormatOptions(max_length=9), None))
    other = write_rows(tmp_path / "other.jsonl", additions(51))
    keys.add(cache_key(read_rows(other, stored_from=0).key, tokenizer,
                          FormatOptions(), None))  # fmt: skip
    keys.add(cache_key(rows.select([0, 1]).key, tokenizer, FormatOptions(), None))
    keys.add(cache_key(rows.select([0, 2]).key, tokenizer, FormatOptions(), None))
    tokenizer.chat_template += " "
    keys.add(cache_key(rows.key, tokenizer, FormatOptions(), None))
    tokenizer.add_tokens(["<new>"])
    keys.add(cache_key(rows.key, tokenizer, FormatOptions(), None))
    assert len(keys) == 8
    moved = shutil.copy(file, tmp_path / "moved.jsonl")  # the same bytes, elsewhere
    assert read_rows(moved, stored_from=0).key == rows.key


@pytest.mark.parametrize("name", ["input_ids.npy", "labels.npy", "offsets.npy", "trained.npy",
                                  "about.json"])  # fmt: skip
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "header"])
def test_a_damaged_cache_is_said_and_made_again(kept, file, arithmetic_tokenizer, tmp_path, name,
                                               damage):  # fmt: skip
    whole, _ = prepare(read_rows(file), arithmetic_tokenizer)
    kept(file, arithmetic_tokenizer)
    (entry,) = (tmp_path / "cache").iterdir()
    path, raw = entry / name, bytearray((entry / name).read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        raw[{"flipped": -9, "header": 3}.get(damage, 0)] ^= 1
        path.write_bytes(raw[:-5] if damage == "cut" else raw)
    found, _, said = kept(file, arithmetic_tokenizer)
    assert len(said) == 2 and "damaged" in said[0] and "made again" in said[0]
    assert same(whole, found)
    assert "are read from" in kept(file, arithmetic_tokenizer)[2][0]


def test_nothing_of_a_failed_preparation_stays(kept, tmp_path, arithmetic_tokenizer):
    rows = [*additions(1200), {"prompt": "1+1=", "completion": 2}]
    file = write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(DataError, match=r"bad.jsonl:1201: 'completion' must be a string"):
        kept(file, arithmetic_tokenizer)
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_processes_that_make_one_cache_do_no_harm(file, tmp_path):
    program = f"""
from relax.data import arithmetic_tokenizer, prepare, read_rows
from relax.data.cache import ExampleCache
rows = read_rows({str(file)!r}, stored_from=0)
examples, _ = prepare(rows, arithmetic_tokenizer(), cache=ExampleCache({str(tmp_path / "c")!r}))
print(examples.checksums)
"""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment()
        )
        for _ in range(2)
    ]
    printed = [one.communicate(timeout=200)[0] for one in started]
    assert printed[0] == printed[1] != ""
    assert len(list((tmp_path / "c").iterdir())) == 1


def test_rows_in_files_are_those_that_are_read_into_memory(tmp_path):
    """Blank lines, a byte order mark, text parts and ShareGPT; by index and in passes."""
    part = [{"type": "text", "text": "Hi"}]
    rows = [{"messages": [{"role": "user", "content": part}]} for _ in range(3)]
    file = tmp_path / "a.jsonl"
    text = "\n\n".join(json.dumps(row) for row in rows)
    file.write_text("\ufeff" + text, encoding="utf-8")
    plain, stored = read_rows(file), read_rows(file, stored_from=0)
    assert plain.rows == [*stored.rows] == [stored.rows[i] for i in range(3)] == stored.rows[:]
    assert [plain.origin(i) for i in range(3)] == [stored.origin(i) for i in range(3)]
    assert stored.origin(2) == f"{file}:5"
    assert plain.notes == stored.rows.notes


def test_rows_in_parquet_files_lose_the_nulls_that_alignment_added(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [{"tools": [{"a": i, "b": None} if i % 2 else {"a": None, "b": i}], "prompt": str(i)}
            for i in range(10)]  # fmt: skip
    for n, part in enumerate((rows[:7], rows[7:])):
        table, name = pyarrow.Table.from_pylist(part), f"train-0000{n}-of-00002.parquet"
        parquet.write_table(table, tmp_path / name, row_group_size=3)
    plain, stored = read_rows(tmp_path), read_rows(tmp_path, stored_from=0)
    assert plain.rows == [*stored.rows] == [stored.rows[i] for i in range(10)]
    assert plain.rows[1]["tools"] == [{"a": 1}]
    assert [plain.origin(i) for i in range(10)] == [stored.origin(i) for i in range(10)]


@pytest.mark.parametrize("text, words", [
    ("", "holds no rows"), ("\n \n", "holds no rows"), ('{"text": "a"}\n{"te', ":2: broken JSON"),
    ('{"text": "a"}\n[1]\n', ":2: a row must be a JSON object"),
    ('{"text": "a"}\n{"text": "' + "b" * 100 + '"}\n', ":2: the row has"),
])  # fmt: skip
def test_broken_files_are_refused_with_the_line(kept, tmp_path, arithmetic_tokenizer, text, words):
    file = tmp_path / "a.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=words):
        kept(file, arithmetic_tokenizer, limits=Limits(max_row_bytes=60))


@pytest.mark.programs
def test_mixtures_are_kept_with_the_rows_of_each_source(kept, tmp_path, arithmetic_tokenizer):
    a, b = (write_rows(tmp_path / f"{n}.jsonl", additions(i)) for n, i in (("a", 20), ("b", 10)))
    for weights in ((1, 1), (1, 3)):
        rows = read_sources(parse_sources(f"{a}:{weights[0]},{b}:{weights[1]}"), stored_from=0)
        examples, _, said = kept(rows, arithmetic_tokenizer)
        assert examples.mixture.sizes == (20, 10)
        assert [int(w) for w in examples.mixture.weights] == [*weights]
    assert "are read from" in said[0]  # weights are no part of the tokens


def test_runs_with_and_without_kept_rows_end_with_the_same_bytes(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", additions(40))
    given = flags(dataset_name=file, test_size=0.25, max_steps=4, learning_rate=1e-3,
                  per_device_train_batch_size=4, logging_steps=2, save_steps=2)  # fmt: skip
    cache = f"--dataset_cache_dir={tmp_path / 'cache'}"
    plain, first, again = (tmp_path / name for name in ("plain", "first", "again"))
    finish(*given, "--dataset_cache_dir=none", f"--output_dir={plain}")
    assert finish(*given, cache, f"--output_dir={first}").count("tokenised rows are kept") == 2
    assert finish(*given, cache, f"--output_dir={again}").count("tokenised rows are read") == 2
    assert model_bytes(plain) == model_bytes(first) == model_bytes(again)
    assert metrics(plain) == metrics(again)
    digests = [json.loads((run / "data.json").read_text()) for run in (plain, first, again)]
    assert digests[0] == digests[1] == digests[2]
    shutil.rmtree(again / "checkpoints" / "4")
    finish(*given, "--dataset_cache_dir=none", f"--output_dir={again}", "--resume=auto")
    assert model_bytes(again) == model_bytes(plain)


def test_a_directory_that_cannot_be_written_is_said_and_the_rows_are_used(
    kept, file, arithmetic_tokenizer, tmp_path
):
    (tmp_path / "cache").write_text("a file")
    examples, report, said = kept(file, arithmetic_tokenizer)
    assert len(said) == 1 and "are not kept" in said[0] and "cannot be written" in said[0]
    assert same(examples, prepare(read_rows(file), arithmetic_tokenizer)[0])


PAIRS = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i), "margin": i / 4}
         for i in range(9)]  # fmt: skip
LABELLED = [{"prompt": f"{i % 3}+1=", "completion": str(i), "label": i % 2 == 0} for i in range(9)]


@pytest.mark.parametrize("rows, reading", [
    (PAIRS, {}), (PAIRS, {"for_reward_model": True}), (PAIRS, {"unpaired": True}),
    (LABELLED, {"unpaired": True}),
])  # fmt: skip
def test_kept_pairs_are_those_made_in_memory(tmp_path, arithmetic_tokenizer, rows, reading):
    file, said = write_rows(tmp_path / "pairs.jsonl", rows), []
    plain, plain_report = prepare_preferences(rows, arithmetic_tokenizer, **reading)
    for words in ("are kept in", "are read from"):
        found, report = prepare_preferences(
            read_rows(file, stored_from=0), arithmetic_tokenizer, **reading,
            cache=ExampleCache(tmp_path / "cache", said.append),
        )  # fmt: skip
        assert words in said[-1] and report == plain_report
        assert found.digest == plain.digest and found.has_margins == plain.has_margins
        for one, other in zip(plain.items.columns, found.items.columns, strict=True):
            assert one.dtype == other.dtype and np.array_equal(one, other)
        assert not found.items[0].prompt.flags.writeable
        for packed_length in (None, 24):
            loaders = [
                PreferenceLoader(it, 4, packed_length=packed_length) for it in (plain, found)
            ]
            for one, other in zip(*loaders, strict=True):
                assert all(np.array_equal(one[name], other[name]) for name in one)
    (entry,) = (tmp_path / "cache").iterdir()
    names = {"input_ids", "offsets", "is_desirable", "margin"}
    assert {path.stem for path in entry.glob("*.npy")} == names


def test_options_of_pairs_are_in_their_key(tmp_path, arithmetic_tokenizer):
    file = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    cache = ExampleCache(tmp_path / "cache")
    for reading in ({}, {"for_reward_model": True}, {"unpaired": True}, {"max_length": 8}):
        rows = read_rows(file, stored_from=0)
        prepare_preferences(rows, arithmetic_tokenizer, cache=cache, **reading)
    assert len([*(tmp_path / "cache").iterdir()]) == 4


PROMPTS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(30)]
TALKS = [{"prompt": [{"role": "user", "content": f"{i}?"}], "level": i} for i in range(30)]


@pytest.mark.parametrize("rows", [PROMPTS, TALKS, [*PROMPTS, {"prompt": "2", "day": [None]}]])
def test_kept_prompts_are_those_made_in_memory(rows, tmp_path, arithmetic_tokenizer):
    """Tokens, rows with the columns of all, what is known of the columns, order and digest."""
    file, said = write_rows(tmp_path / "rows.jsonl", rows), []
    cache = ExampleCache(tmp_path / "cache", said.append)
    plain = prepare_prompts(read_rows(file), arithmetic_tokenizer)
    first, again = (
        prepare_prompts(read_rows(file, stored_from=0), arithmetic_tokenizer, cache=cache)
        for _ in range(2)
    )
    assert "are kept in" in said[0] and "are read from" in said[1]
    items = [*PromptLoader(plain, 7, seed=1, extra_prompts=2)]
    file.write_text('{"prompt": "another"}')
    for found in (first, again):
        assert isinstance(found.rows, View) and [*found.rows] == plain.rows
        assert [*found.prompt_ids] == [*plain.prompt_ids]
        assert found.facts == plain.facts == describe_columns(plain.rows)
        assert (found.digest, found.notes) == (plain.digest, plain.notes)
        assert found.report() == plain.report() and found.conversational == plain.conversational
        assert [*PromptLoader(found, 7, seed=1, extra_prompts=2)] == items


def test_kept_prompts_depend_on_what_is_checked_of_them(tmp_path, arithmetic_tokenizer):
    """A longer limit may not find what a shorter one has let through."""
    rows = read_rows(write_rows(tmp_path / "rows.jsonl", PROMPTS), stored_from=0)
    cache = ExampleCache(tmp_path / "cache")
    prepare_prompts(rows, arithmetic_tokenizer, max_prompt_length=5, cache=cache)
    with pytest.raises(DataError, match="rows.jsonl:11: the prompt has 5 tokens.*room for 4"):
        prepare_prompts(rows, arithmetic_tokenizer, max_prompt_length=4, cache=cache)
    with pytest.raises(DataError, match="outside of the model's embedding of 9 rows"):
        prepare_prompts(rows, arithmetic_tokenizer, vocab_size=9, cache=cache)


@pytest.mark.parametrize("blank", [b"\xc2\xa0\n", b"\x0c\n", b" \n", b"\xef\xbb\xbf\n"])
def test_lines_that_are_blank_are_so_in_every_reading(tmp_path, blank):
    lines = [json.dumps(row).encode() + b"\n" for row in PROMPTS[:4]]
    file = tmp_path / "rows.jsonl"
    at_start = blank.startswith(b"\xef")  # a byte order mark elsewhere is no blank
    file.write_bytes(b"".join([blank, *lines] if at_start else [lines[0], blank, *lines[1:]]))
    rows = read_rows(file, stored_from=0).rows
    assert len(rows) == 4 and [*rows] == [rows[i] for i in range(4)] == PROMPTS[:4]


def test_a_file_that_changes_under_its_stored_rows_is_refused(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", PROMPTS)
    rows = read_rows(file, stored_from=0).rows
    assert rows[3] == PROMPTS[3]
    file.write_text(file.read_text().replace("+1=", "+2="))
    with pytest.raises(DataError, match="rows.jsonl: the file was changed while this run reads it"):
        rows[3]
    with pytest.raises(DataError, match="was changed"):
        list(rows)


@pytest.mark.parametrize("name, old, new", [
    ("input_ids", b"<i4", b">i4"), ("input_ids", b"<i4", b"<f4"), ("offsets", b"<i8", b"<f8"),
])  # fmt: skip
def test_an_altered_header_is_damage_too(
    kept, file, arithmetic_tokenizer, tmp_path, name, old, new
):
    plain, _, _ = kept(file, arithmetic_tokenizer)
    (array,) = tmp_path.glob(f"cache/*/{name}.npy")
    array.write_bytes(array.read_bytes().replace(old, new, 1))
    again, _, said = kept(file, arithmetic_tokenizer)
    assert f"damaged ({name}.npy is not what was written)" in said[0] and same(again, plain)


def test_values_that_python_does_not_have_are_refused_with_their_column(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    table = pyarrow.table({"prompt": ["a"], "t": pyarrow.array([1], pyarrow.time64("ns"))})
    parquet.write_table(table, tmp_path / "a.parquet")
    for options in ({}, {"stored_from": 0}):
        with pytest.raises(DataError, match="a.parquet: column 't' holds a value that Python does"):
            list(read_rows(tmp_path / "a.parquet", **options).rows)


def test_notes_of_several_kept_sources_name_them(tmp_path, arithmetic_tokenizer):
    rows = [{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}],
             "tools": "[]"}] * 4  # fmt: skip
    files = [write_rows(tmp_path / f"{name}.jsonl", rows) for name in "ab"]
    sources = parse_sources(",".join(map(str, files)))
    plain, stored = (
        prepare(read_sources(sources, stored_from=start), arithmetic_tokenizer)[1].notes
        for start in (None, 0)
    )
    named = [note for note in plain if note.startswith(("a: 4", "b: 4"))]
    assert len(named) == 2 and sorted(stored) == sorted(plain)
