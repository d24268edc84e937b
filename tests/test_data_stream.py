"""Rows of a stream: shuffled in a buffer, the same in every pass, and never all in memory."""

import itertools
import os

import numpy as np
import pytest
from runs import additions

from relax.data import DataLoader, FormatOptions, StreamLoader, prepare, read_rows, reading
from relax.errors import ConfigError, DataError

OPTIONS = FormatOptions(max_length=32)


def endless():
    for n in itertools.count():
        yield {"prompt": f"{n}+1=", "completion": str(n + 1)}


def texts(loader, tokenizer, count):
    batches = itertools.islice(loader, count)
    return [
        "".join(tokenizer.decode(row[row > 0].tolist()).split())
        for batch in batches
        for row in batch["input_ids"]
    ]


def test_a_stream_without_an_end_gives_the_same_batches_in_every_pass(arithmetic_tokenizer):
    def loader(seed):
        return StreamLoader(
            endless, arithmetic_tokenizer, 4, options=OPTIONS, buffer_size=8, seed=seed
        )

    one = loader(1)
    first, again = (texts(one, arithmetic_tokenizer, 6) for _ in range(2))
    assert first == again != texts(loader(2), arithmetic_tokenizer, 6)
    # A row waits for a place in the buffer: none comes more than its length earlier than written.
    numbers = [int(text.partition("+")[0].lstrip("<bos>")) for text in first]
    assert len(set(numbers)) == 24
    assert all(number < place + 8 for place, number in enumerate(numbers))


def test_a_buffer_of_one_row_gives_the_batches_of_a_loader_in_order(arithmetic_tokenizer):
    rows = additions(10)
    stream = StreamLoader(lambda: rows, arithmetic_tokenizer, 5, options=OPTIONS, buffer_size=1)
    examples, _ = prepare(rows, arithmetic_tokenizer, OPTIONS)
    plain = DataLoader(examples, 5, shuffle=False)
    for a, b in zip(stream, plain, strict=True):
        real, other = a["segment_ids"] > 0, b["segment_ids"] > 0
        for name in ("input_ids", "labels", "positions"):
            assert np.array_equal(a[name][real], b[name][other])


def test_each_row_of_a_stream_that_ends_comes_once(arithmetic_tokenizer):
    rows = [*additions(12), {"prompt": "1+" * 40, "completion": "1"}]  # one that is cut away
    loader = StreamLoader(lambda: rows, arithmetic_tokenizer, 3, options=OPTIONS, buffer_size=5)
    found = texts(loader, arithmetic_tokenizer, 99)
    plain = StreamLoader(lambda: rows, arithmetic_tokenizer, 1, options=OPTIONS, buffer_size=1)
    assert sorted(found) == sorted(texts(plain, arithmetic_tokenizer, 99))
    assert len(found) == 12 and loader.num_dropped == 1


def test_rows_of_a_stream_that_cannot_be_read_are_named(arithmetic_tokenizer):
    def loader(rows):
        return StreamLoader(lambda: rows, arithmetic_tokenizer, 1, options=OPTIONS)

    for rows, words in (
        ([], "the stream has no rows"),
        ([*additions(1), 7], "row 1 of the stream: is a int, not a dict"),
        ([*additions(1), {"text": "a"}], "row 1 of the stream: .*prompt"),
    ):
        with pytest.raises(DataError, match=words):
            list(loader(rows))
    with pytest.raises(ConfigError, match="need a max_length"):
        StreamLoader(endless, arithmetic_tokenizer, 1, options=FormatOptions(max_length=None))


def test_streams_are_refused_where_rows_are_held(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MOST_UNCOUNTED", 10)
    with pytest.raises(DataError, match="more than 10 came: write them to a .jsonl file"):
        read_rows(endless())
    assert len(read_rows(itertools.islice(endless(), 10))) == 10
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    with pytest.raises(DataError, match="is a pipe or a device"):
        read_rows(str(pipe))
