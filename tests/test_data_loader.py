"""Batches hold what the documents say; their order is a function of (seed, epoch, position)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relax.data import DataLoader, Encoded, Examples, bucket_lengths, collate
from relax.data.loader import epoch_order
from relax.errors import ConfigError, DataError


def document(*ids):
    return Encoded(np.array(ids, np.int32), np.array(ids, np.int32))


def lists(batch):
    return {name: array.tolist() for name, array in batch.items()}


def examples(count, length=3):
    return [document(*range(10 * i, 10 * i + length)) for i in range(1, count + 1)]


def test_documents_are_padded_on_the_right_and_first_tokens_are_no_targets():
    assert lists(collate([[document(1, 2, 3)], [document(4, 5)]], 3)) == {
        "input_ids": [[1, 2, 3], [4, 5, 0]],
        "labels": [[-100, 2, 3], [-100, 5, -100]],
        "positions": [[0, 1, 2], [0, 1, 0]],
        "segment_ids": [[1, 1, 1], [1, 1, 0]],
    }


def test_documents_of_one_row_are_isolated():
    assert lists(collate([[document(1, 2, 3), document(4, 5)]], 5)) == {
        "input_ids": [[1, 2, 3, 4, 5]],
        "labels": [[-100, 2, 3, -100, 5]],
        "positions": [[0, 1, 2, 0, 1]],
        "segment_ids": [[1, 1, 1, 2, 2]],
    }


def test_positions_restart_in_each_packed_document():
    rows = [
        [document(1, 2, 3), document(4, 5, 6)],
        [document(7, 8, 9, 10), document(11)],
    ]
    batch = lists(collate(rows, 6))
    assert batch["positions"] == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 0]]
    assert batch["labels"] == [[-100, 2, 3, -100, 5, 6], [-100, 8, 9, 10, -100, -100]]
    assert batch["segment_ids"] == [[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 2, 0]]


def test_batch_lengths_are_multiples_of_pad_to_multiple_of():
    loader = DataLoader([document(1, 2, 3)], 1, pad_to_multiple_of=4)
    batch = lists(next(iter(loader)))
    assert batch["input_ids"] == [[1, 2, 3, 0]]
    assert batch["labels"] == [[-100, 2, 3, -100]]
    assert batch["segment_ids"] == [[1, 1, 1, 0]]


def test_a_row_longer_than_the_batch_is_refused():
    with pytest.raises(ValueError, match="more than the 2 tokens"):
        collate([[document(1, 2, 3)]], 2)


def test_bucket_lengths_are_the_longest_row_and_its_halves():
    assert bucket_lengths([10, 1000]) == [128, 256, 504, 1000]
    assert bucket_lengths([900, 1000]) == [1000]
    assert bucket_lengths([3], multiple=4) == [4]
    assert bucket_lengths([1, 100], max_buckets=2) == [56, 104]


def test_a_batch_takes_the_smallest_bucket_that_holds_its_longest_row():
    rows = [document(*range(n)) for n in (5, 6, 60, 64)]
    loader = DataLoader(rows, 2, shuffle=False)
    assert loader.bucket_lengths == [8, 16, 32, 64]
    assert [batch["input_ids"].shape for batch in loader] == [(2, 8), (2, 64)]


def test_the_last_batch_keeps_its_shape_and_no_row_is_lost():
    loader = DataLoader(examples(5), 2, shuffle=False)
    batches = list(loader)
    assert len(batches) == len(loader) == 3
    assert {batch["input_ids"].shape for batch in batches} == {(2, 8)}
    assert batches[-1]["segment_ids"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [0] * 8]
    assert batches[-1]["labels"][1].tolist() == [-100] * 8
    assert (
        sum(int((batch["segment_ids"] > 0).sum()) for batch in batches) == loader.num_tokens == 15
    )


def test_all_arrays_are_int32():
    assert {a.dtype for a in next(iter(DataLoader(examples(2), 2))).values()} == {np.dtype("int32")}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 300), st.integers(0, 2**32), st.integers(0, 1000))
def test_the_order_of_an_epoch_is_a_permutation(num_rows, seed, epoch):
    assert sorted(epoch_order(num_rows, seed, epoch).tolist()) == list(range(num_rows))


def test_the_order_is_the_same_on_every_machine_and_in_every_version():
    assert epoch_order(8, seed=42, epoch=0).tolist() == [4, 1, 3, 6, 0, 7, 2, 5]
    assert epoch_order(8, seed=42, epoch=1).tolist() == [1, 2, 5, 3, 6, 0, 4, 7]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 5), st.integers(0, 5), st.integers(0, 21))
def test_resuming_at_a_position_gives_the_tail_of_the_epoch(count, batch_size, epoch, start):
    loader = DataLoader(examples(count), batch_size, seed=7)
    whole = [lists(batch) for batch in loader.batches(epoch)]
    assert [lists(batch) for batch in loader.batches(epoch, start)] == whole[start:]


def test_without_shuffling_every_epoch_has_the_order_of_the_file():
    loader = DataLoader(examples(3), 1, shuffle=False)
    for epoch in range(2):
        assert [int(b["input_ids"][0, 0]) for b in loader.batches(epoch)] == [10, 20, 30]


def test_packed_rows_are_what_is_shuffled():
    plain = DataLoader(examples(40), 1, shuffle=False, packing="bfd", max_length=7)
    shuffled = DataLoader(examples(40), 1, seed=1, packing="bfd", max_length=7)
    rows = [tuple(batch["input_ids"][0].tolist()) for batch in plain]
    mixed = [tuple(batch["input_ids"][0].tolist()) for batch in shuffled]
    assert mixed != rows and sorted(mixed) == sorted(rows)
    assert plain.fill == 1.0


def test_a_document_wrapped_over_two_rows_has_no_target_at_the_cut():
    loader = DataLoader(
        [document(1, 2, 3), document(4, 5, 6, 7), document(8, 9)],
        3,
        shuffle=False,
        packing="wrapped",
        max_length=3,
        pad_to_multiple_of=1,
    )
    batch = lists(next(iter(loader)))
    assert batch["input_ids"] == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert batch["labels"] == [[-100, 2, 3], [-100, 5, 6], [-100, -100, 9]]
    assert batch["segment_ids"] == [[1, 1, 1], [1, 1, 1], [1, 2, 2]]
    assert loader.num_trained_tokens == 5


def test_packed_rows_without_a_trained_token_are_left_out_and_counted():
    long_prompt = Encoded(np.arange(8), np.array([-100] * 6 + [6, 7]))
    loader = DataLoader([long_prompt], 1, packing="bfd_split", max_length=4)
    assert (len(loader), loader.num_dropped_rows, loader.num_trained_tokens) == (1, 1, 2)


def test_examples_longer_than_max_length_are_never_cut_in_silence():
    with pytest.raises(DataError, match="example 0 has 3 tokens, max_length=2"):
        DataLoader(examples(1), 1, packing="bfd", max_length=2)


def test_a_loader_without_rows_or_with_an_impossible_option_is_refused():
    with pytest.raises(DataError, match="got none"):
        DataLoader([], 1)
    with pytest.raises(DataError, match="none of 1 rows has a trained token"):
        DataLoader([Encoded([1, 2], [-100, -100])], 1)
    with pytest.raises(ConfigError, match="packing needs max_length"):
        DataLoader(examples(1), 1, packing="bfd")
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        DataLoader(examples(1), 0)


def test_examples_are_views_of_flat_arrays():
    kept = Examples([([1, 2], [-100, 2]), ([3], [-100])])
    assert len(kept) == 2 and kept.lengths.tolist() == [2, 1]
    assert kept[0].input_ids.tolist() == [1, 2] and kept[-1].input_ids.tolist() == [3]
    assert kept[1].input_ids.base is not None
    with pytest.raises(IndexError):
        kept[2]
