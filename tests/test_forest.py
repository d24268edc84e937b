"""Trees are packed into rows, and their children's tokens found again."""

import numpy as np
import pytest

from relax.data.forest import pack_forest


def test_a_tree_is_laid_out_as_by_hand():
    rows, predictor, mask = pack_forest([([5, 6], [[7, 8], [], [9]])], 6)
    assert rows["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0]]
    assert rows["positions"].tolist() == [[0, 1, 2, 3, 2, 0]]
    assert rows["segment_ids"].tolist() == [[1, 1, 2, 2, 4, 0]]
    assert rows["parent_ids"].tolist() == [[0, 0, 1, 1, 1, 0]]
    assert predictor.tolist() == [[1, 2], [0, 0], [1, 0]]
    assert mask.tolist() == [[True, True], [False, False], [True, False]]


def test_a_root_is_repeated_where_its_tree_does_not_fit():
    rows, predictor, _ = pack_forest([([5, 6], [[7, 8], [9]])], 4)
    assert rows["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 9, 0]]
    assert predictor.tolist() == [[1, 2], [5, 0]]


def test_the_first_token_behind_an_empty_root_has_no_predictor():
    rows, predictor, mask = pack_forest([([], [[7, 8]])], 2)
    assert rows["parent_ids"].tolist() == [[0, 0]]
    assert mask.tolist() == [[False, True]] and predictor.tolist() == [[0, 0]]


def test_rows_are_dealt_so_that_tokens_balance():
    trees = [([1], [[2] * n]) for n in (7, 6, 5, 4)]
    rows = pack_forest(trees, 8, shards=2).rows
    assert (rows["segment_ids"] > 0).reshape(2, -1).sum(axis=1).tolist() == [13, 13]


def test_a_child_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="root of 2 tokens and a child of 3, a row 4"):
        pack_forest([([5, 6], [[1, 2, 3]])], 4)


def test_every_token_is_predicted_by_the_token_before_it():
    rng = np.random.default_rng(0)
    trees = [
        (rng.integers(1, 99, rng.integers(1, 9)), [rng.integers(1, 99, n) for n in sizes])
        for sizes in rng.integers(0, 12, (9, 4))
    ]
    rows, predictor, mask = pack_forest(trees, 24, shards=2)
    found = rows["input_ids"].reshape(-1)[predictor]
    number = 0
    for root, children in trees:
        for child in children:
            before = [root[-1], *child[:-1]][: len(child)]
            assert found[number][mask[number]].tolist() == before
            number += 1


def test_a_root_without_children_is_refused_and_not_dropped():
    with pytest.raises(ValueError, match="tree 1 has a root of 2 tokens alone"):
        pack_forest([([1], [[2]]), ([3, 4], [])], 8)
