"""Packing places every token as the published cases say, and loses none where it must not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relax.data import pack
from relax.errors import ConfigError


def packed(documents, max_length, strategy):
    rows = pack([len(d) for d in documents], max_length, strategy)
    tokens = [[t for i, a, b in row for t in documents[i][a:b]] for row in rows]
    return tokens, [[b - a for _, a, b in row] for row in rows]


@pytest.mark.parametrize(
    "strategy, max_length, documents, tokens, lengths",
    [
        (
            "bfd",
            4,
            [[1, 2, 3], [4, 5, 6, 7], [8]],
            [[4, 5, 6, 7], [1, 2, 3, 8]],
            [[4], [3, 1]],
        ),
        (
            "bfd",
            4,
            [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11], [12]],
            [[1, 2, 3, 4], [8, 9, 10, 11], [6, 7, 12]],
            [[4], [4], [2, 1]],
        ),
        (
            "bfd",
            4,
            [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10], [11]],
            [[1, 2, 3, 4], [8, 9, 10, 11], [6, 7]],
            [[4], [3, 1], [2]],
        ),
        (
            "bfd_split",
            4,
            [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11], [12]],
            [[1, 2, 3, 4], [8, 9, 10, 11], [6, 7, 5, 12]],
            [[4], [4], [2, 1, 1]],
        ),
        (
            "bfd_split",
            5,
            [[1, 2, 3, 4, 5], [6], [7, 8, 9, 10], [11, 12, 13]],
            [[1, 2, 3, 4, 5], [7, 8, 9, 10, 6], [11, 12, 13]],
            [[5], [4, 1], [3]],
        ),
        (
            "bfd_split",
            4,
            [[1, 2], [], [3, 4, 5], [], [6]],
            [[3, 4, 5, 6], [1, 2]],
            [[3, 1], [2]],
        ),
        (
            "wrapped",
            3,
            [[1, 2, 3], [4, 5, 6, 7], [8]],
            [[1, 2, 3], [4, 5, 6], [7, 8]],
            [[3], [3], [1, 1]],
        ),
    ],
)
def test_packing_equals_the_published_cases(strategy, max_length, documents, tokens, lengths):
    assert packed(documents, max_length, strategy) == (tokens, lengths)


def test_of_rows_with_equal_room_the_oldest_is_filled_first():
    assert [[s.document for s in row] for row in pack([3, 3, 1, 1], 4)] == [[0, 2], [1, 3]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30)), st.integers(1, 12), st.sampled_from(["bfd_split", "wrapped"]))
def test_splitting_strategies_keep_every_token_exactly_once(lengths, max_length, strategy):
    rows = pack(lengths, max_length, strategy)
    places = [(i, t) for row in rows for i, a, b in row for t in range(a, b)]
    assert sorted(places) == [(i, t) for i, n in enumerate(lengths) for t in range(n)]
    assert all(0 < sum(b - a for _, a, b in row) <= max_length for row in rows)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30)), st.integers(1, 12))
def test_bfd_equals_a_linear_search_for_the_fullest_row_with_room(lengths, max_length):
    rows = []  # [free places, time of the last change, documents]: the search in its slow form
    order = sorted(
        (i for i, n in enumerate(lengths) if n), key=lambda i: -min(lengths[i], max_length)
    )
    for now, i in enumerate(order):
        length = min(lengths[i], max_length)
        fits = [row for row in rows if row[0] >= length]
        row = min(fits, key=lambda r: (r[0], r[1]), default=None)
        if row is None:
            row = [max_length, now, []]
            rows.append(row)
        row[0], row[1] = row[0] - length, now
        row[2].append(i)
    assert [[s.document for s in row] for row in pack(lengths, max_length)] == [r[2] for r in rows]


def test_an_unknown_strategy_is_refused():
    with pytest.raises(ConfigError, match="unknown packing strategy 'ffd'"):
        pack([1], 4, "ffd")


def test_a_row_without_room_is_refused():
    with pytest.raises(ConfigError, match="max_length=0"):
        pack([1], 0)
