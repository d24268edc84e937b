"""Prompts for reinforcement learning: tokens, what is refused, and the order of items."""

import numpy as np
import pytest

from relax.data.prompt_loader import PromptLoader
from relax.data.prompts import Prompts, prepare_prompts
from relax.errors import DataError

TEXTS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(10)]
TALKS = [{"prompt": [{"role": "user", "content": f"{i}?"}]} for i in range(3)]


def refused(tokenizer, rows, **options) -> str:
    with pytest.raises(DataError) as caught:
        prepare_prompts(rows, tokenizer, **options)
    return str(caught.value)


def test_a_text_is_tokenised_as_it_is(arithmetic_tokenizer):
    prompts = prepare_prompts(TEXTS, arithmetic_tokenizer)
    assert prompts.prompt_ids[3] == arithmetic_tokenizer("3+1=")["input_ids"]
    assert prompts.rows == TEXTS and not prompts.conversational
    assert prompts.columns == ("prompt", "answer")


def test_messages_are_rendered_up_to_where_the_answer_begins(arithmetic_tokenizer):
    prompts = prepare_prompts(TALKS, arithmetic_tokenizer, system_prompt="be right")
    text = arithmetic_tokenizer.decode(prompts.prompt_ids[1])
    assert text.startswith("<system>be right") and text.endswith("1?<assistant>")
    assert prompts.conversational and prompts.rows == TALKS


def test_every_row_has_the_columns_of_all(arithmetic_tokenizer):
    rows = [{"prompt": "1", "answer": "1"}, {"prompt": "2", "level": 3}]
    prompts = prepare_prompts(rows, arithmetic_tokenizer)
    assert prompts.columns == ("prompt", "answer", "level")
    assert prompts.rows[1] == {"prompt": "2", "answer": None, "level": 3}


def test_what_cannot_be_a_prompt_is_refused_with_its_place(arithmetic_tokenizer):
    tokenizer = arithmetic_tokenizer
    assert "no rows" in refused(tokenizer, [])
    assert "row 1" in refused(tokenizer, [{"prompt": "1"}, {"text": "2"}])
    assert "row 1" in refused(tokenizer, [{"prompt": "1"}, TALKS[0]])
    assert "the prompt is empty" in refused(tokenizer, [{"prompt": ""}])
    assert "system_prompt needs conversations" in refused(tokenizer, TEXTS, system_prompt="s")
    said = refused(tokenizer, [{"prompt": "1+1="}, {"prompt": "11+11="}], max_prompt_length=5)
    assert "row 1" in said and "has 6 tokens" in said and "room for 5" in said
    assert "outside of the model's embedding of 9 rows" in refused(tokenizer, TEXTS, vocab_size=9)


def loader(count=10, size=3, **options) -> PromptLoader:
    prompts = Prompts(
        [[i] for i in range(count)], [{"prompt": str(i)} for i in range(count)], False
    )
    return PromptLoader(prompts, size, **options)


def numbers(item) -> list[int]:
    assert [[int(row["prompt"])] for row in item["rows"]] == item["prompt_ids"]
    return [i for (i,) in item["prompt_ids"]]


def test_an_epoch_has_every_prompt_once_but_for_those_that_fill_no_item():
    found = [numbers(item) for item in loader().batches(0)]
    assert [len(item) for item in found] == [3, 3, 3] and len(loader()) == 3
    assert len(set(np.ravel(found))) == 9 and loader().num_left_out == 1


def test_another_epoch_has_another_order_and_the_same_epoch_the_same():
    orders = [[numbers(item) for item in loader(seed=s).batches(e)] for s, e in
              [(0, 0), (0, 0), (0, 1), (1, 0)]]  # fmt: skip
    assert orders[0] == orders[1] and orders[0] != orders[2] and orders[0] != orders[3]
    assert [numbers(item) for item in loader(shuffle=False)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_an_epoch_goes_on_from_any_position():
    whole = [numbers(item) for item in loader(extra_prompts=4).batches(2)]
    assert [numbers(item) for item in loader(extra_prompts=4).batches(2, start=1)] == whole[1:]


def test_evaluation_keeps_the_last_shorter_item():
    kept = loader(shuffle=False, keep_last=True)
    assert [len(item["rows"]) for item in kept] == [3, 3, 3, 1] and len(kept) == 4
    assert kept.num_left_out == 0


def test_spares_are_other_prompts_than_the_items_and_depend_on_the_position():
    extra_prompts = []
    for item in loader(extra_prompts=5).batches(0):
        drawn = numbers(item["extra_prompts"])
        assert len(set(drawn)) == 5 and not set(drawn) & set(numbers(item))
        extra_prompts.append(drawn)
    assert len({tuple(s) for s in extra_prompts}) == 3
    (item,) = loader(count=3, extra_prompts=5).batches(0)
    assert item["extra_prompts"] == {"prompt_ids": [], "rows": []}


def test_more_prompts_than_there_are_is_refused():
    with pytest.raises(DataError, match="a rollout needs 11 prompts and the data set has 10"):
        loader(size=11)
