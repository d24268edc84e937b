"""Rows to pairs: every kind of row, prompts that are implied, what is cut, left out and refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from relax.data import PreferenceLoader, prepare_preferences
from relax.data.preference import Preference, Preferences, split_prompt
from relax.errors import ConfigError, DataError
from relax.trainers.groups import pack_groups


def loader(items, batch_size, **options) -> PreferenceLoader:
    items = [Preference(*(np.array(part, np.int32) for part in item)) for item in items]
    return PreferenceLoader(Preferences(items, True), batch_size, **options)


TRL_CASE = [([1, 2, 3], [4, 5], [6]), ([7, 8], [9, 10], [11, 12, 13])]


def rows_of(batch) -> list[list[int]]:
    """Chosen rows, then rejected ones, as TRL's collator stacks them, put together from ours."""
    rows = []
    for answer in (0, 1):
        for i, n in enumerate(batch["prompt_lengths"]):
            end = batch["completion_lengths"][i, answer]
            completion = batch["completion_ids"][i, answer, :end]
            rows.append([*batch["prompt_ids"][i, :n].tolist(), *completion.tolist()])
    return rows


def test_a_batch_holds_what_the_collator_of_trl_stacks():
    (batch,) = loader(TRL_CASE, 2, shuffle=False)
    # TRL: ids [[1,2,3,4,5],[7,8,9,10,0],[1,2,3,6,0],[7,8,11,12,13]], in its mask the answers.
    assert rows_of(batch) == [[1, 2, 3, 4, 5], [7, 8, 9, 10], [1, 2, 3, 6], [7, 8, 11, 12, 13]]
    assert batch["completion_lengths"].tolist() == [[2, 1], [2, 3]]
    assert batch["prompt_ids"][:, :4].tolist() == [[1, 2, 3, 0], [7, 8, 0, 0]]
    assert batch["mean_chosen_length"].tolist() == [2, 2]


def test_a_packed_row_counts_as_many_pairs_as_fit_with_each_prompt_once():
    """In rows of 8 tokens the pair of 3 fits beside that of 4, and not beside that of 6."""
    pairs = [([1, 2, 3, 4], [5], [6]), ([7], [8], [9]), ([10], [11, 12], [13])]
    (batch,) = loader(pairs, 2, shuffle=False, packed_length=8)
    assert batch["index"].tolist() == [0, -1, 2, 1]
    assert batch["prompt_lengths"].tolist() == [4, 0, 1, 1]
    assert batch["completion_lengths"].tolist() == [[1, 1], [0, 0], [2, 1], [1, 1]]
    with pytest.raises(ConfigError, match="the longest pair, 6 tokens, got 5"):
        loader(pairs, 2, packed_length=5)


def test_the_last_batch_is_filled_with_empty_pairs_and_epochs_differ_in_order():
    data = loader([([1], [k], [k + 1]) for k in range(2, 9)], 3, seed=3)
    epochs = [[b["index"].tolist() for b in data.batches(e)] for e in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1]
    assert sorted(sum(epochs[0], [])) == [-1, -1, *range(7)]
    assert [b["index"].tolist() for b in data.batches(0, start=2)] == epochs[0][2:]
    *_, last = data.batches(0)
    assert (last["completion_lengths"][1:] == 0).all() and last["completion_ids"].shape[0] == 3


def test_few_shapes_serve_all_rows():
    items = [([1] * (1 + i % 40), [2] * (1 + i % 23), [3] * (1 + i % 31)) for i in range(64)]
    model = SimpleNamespace(config=SimpleNamespace(layers=()), attn_implementation="auto")
    shapes = {
        tuple(array.shape for array in pack_groups(batch, [model], 1).values())
        for batch in loader(items, 8)
    }
    assert len(shapes) <= 4


def test_precomputed_reference_numbers_follow_their_pairs():
    data = loader([([1], [k], [k + 1]) for k in range(2, 7)], 2, seed=1)
    data.ref_logprobs = np.arange(10, dtype=np.float32).reshape(5, 2)
    for batch in data:
        for i, numbers in zip(batch["index"], batch["ref_logprobs"], strict=True):
            assert numbers.tolist() == ([2 * i, 2 * i + 1] if i >= 0 else [0, 0])


def test_the_prompt_is_what_both_answers_begin_with():
    assert split_prompt("The sky is blue.", "The sky is green.") == {
        "prompt": "The sky is",
        "chosen": " blue.",
        "rejected": " green.",
    }
    user = {"role": "user", "content": "2+2="}
    four, five = ({"role": "assistant", "content": text} for text in "45")
    assert split_prompt([user, four], [user, five]) == {
        "prompt": [user],
        "chosen": [four],
        "rejected": [five],
    }
    with pytest.raises(DataError, match="file:3: without a 'prompt' of messages .* 0 of 1 and 1"):
        split_prompt([four], [five], "file:3")


def test_answers_without_a_common_beginning_have_no_prompt(arithmetic_tokenizer):
    # TRL 1.16 makes the chosen answer the prompt where a space ends it.
    parts = split_prompt("Yes, it is. ", "No.")
    assert parts == {"prompt": "", "chosen": "Yes, it is. ", "rejected": "No."}
    with pytest.raises(
        DataError, match="the prompt has no token, as the completions share no beginning"
    ):
        prepare_preferences(
            [{"question": "?", "chosen": "4 ", "rejected": "5"}], arithmetic_tokenizer
        )


def text_of(tokenizer, item) -> tuple[str, str]:
    prompt = item.prompt.tolist()
    return tuple(tokenizer.decode(prompt + answer.tolist()) for answer in item[1:3])


def test_prompt_and_answer_are_the_whole_text_with_its_end(arithmetic_tokenizer):
    rows = [
        {"prompt": "2+2=", "chosen": "4", "rejected": "five", "source": "me"},
        {"prompt": "1+1=", "chosen": "2<eos>", "rejected": "3"},
    ]
    found, report = prepare_preferences(rows, arithmetic_tokenizer)
    assert text_of(arithmetic_tokenizer, found.items[0]) == ("2+2=4<eos>", "2+2=five<eos>")
    assert text_of(arithmetic_tokenizer, found.items[1]) == ("1+1=2<eos>", "1+1=3<eos>")
    assert report.unused_columns == ("source",) and report.merged == 0
    assert report.to_dict()["num_tokens"] == (4 + 2 + 4 + 5) + (4 + 2 + 4 + 2)


# Writes an empty thought before an answer, and for a prompt that is to be answered an open one.
THINKING = """\
{%- for m in messages -%}<{{ m['role'] }}>
{%- if m['role'] == 'assistant' -%}{{ THOUGHT }}{%- endif -%}{{ m['content'] }}<eos>{%- endfor -%}
{%- if add_generation_prompt -%}<assistant>{{ OPENING }}{%- endif -%}"""


@pytest.mark.parametrize("opening, merged", [("''", 0), ("'t()'", 0), ("'t(  '", 1)])
def test_what_a_template_puts_before_an_answer_is_of_prompt_or_answer(
    opening, merged, arithmetic_tokenizer, monkeypatch
):
    template = THINKING.replace("THOUGHT", "'t()'").replace("OPENING", opening)
    monkeypatch.setattr(arithmetic_tokenizer, "chat_template", template)
    rows = [
        {
            "prompt": [{"role": "user", "content": "2+2="}],
            "chosen": [{"role": "assistant", "content": "4"}],
            "rejected": [{"role": "assistant", "content": "5"}],
        }
    ]
    found, report = prepare_preferences(rows, arithmetic_tokenizer)
    for text, answer in zip(text_of(arithmetic_tokenizer, found.items[0]), "45", strict=True):
        assert text == f"<user>2+2=<eos><assistant>t(){answer}<eos>"
    assert report.merged == merged
    # The prompt of messages that both begin with is the same.
    whole = [{name: rows[0]["prompt"] + rows[0][name] for name in ("chosen", "rejected")}]
    again, _ = prepare_preferences(whole, arithmetic_tokenizer)
    assert again.digest == found.digest


def cut(mode, max_length=6, rows=None, tokenizer=None):
    rows = rows or [
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5, 6, 7], "rejected_ids": [8]},
        {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]},
    ]
    found, report = prepare_preferences(
        rows, tokenizer, max_length=max_length, truncation_mode=mode
    )
    return [tuple(part.tolist() for part in item[:3]) for item in found.items], report


SHORT = ([1, 2], [3], [4])


def test_rows_are_cut_as_the_mode_says_and_counted(arithmetic_tokenizer):
    kept, report = cut("keep_start", tokenizer=arithmetic_tokenizer)
    assert kept == [([1, 2, 3], [4, 5, 6], [8]), SHORT] and report.truncated == 1
    kept, report = cut("keep_end", tokenizer=arithmetic_tokenizer)
    assert kept == [([2, 3], [4, 5, 6, 7], [8]), SHORT] and report.truncated == 1
    kept, report = cut("drop", tokenizer=arithmetic_tokenizer)
    assert kept == [SHORT] and report.dropped == {"longer than max_length": 1}
    with pytest.raises(DataError, match="row 0: the row has 7 tokens, max_length=6"):
        cut("error", tokenizer=arithmetic_tokenizer)


def test_rows_that_cannot_teach_are_left_out_and_counted(arithmetic_tokenizer):
    rows = [
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": [5]},
        {"prompt_ids": [1], "chosen_ids": [4, 4, 5], "rejected_ids": [4, 4, 6]},
        {"prompt_ids": [1], "chosen_ids": [4], "rejected_ids": [4]},
        {"prompt_ids": [1, 2], "chosen_ids": [4], "rejected_ids": [5]},
    ]
    kept, report = cut("keep_start", 3, rows, arithmetic_tokenizer)
    assert kept == [([1, 2], [4], [5])]
    assert report.dropped == {
        "the prompt fills max_length": 1,
        "no difference within max_length": 1,
        "chosen equals rejected": 1,
    }
    assert "dropped      3 (1 the prompt fills" in "\n".join(report.lines())
    with pytest.raises(DataError, match="none of 1 rows can be trained on .1 a completion fills"):
        cut("keep_end", 3, rows[1:2], arithmetic_tokenizer)


def test_unpaired_rows_stand_beside_the_next_rows_answer(arithmetic_tokenizer):
    rows = [
        {"prompt": "1+1=", "completion": "2", "label": True},
        {"prompt": "2+2=", "completion": "five", "label": False},
    ]
    found, _ = prepare_preferences(rows, arithmetic_tokenizer, unpaired=True)
    texts = [text_of(arithmetic_tokenizer, item) for item in found.items]
    assert texts == [("1+1=2<eos>", "1+1=five<eos>"), ("2+2=five<eos>", "2+2=2<eos>")]
    assert [item.is_desirable for item in found.items] == [True, False]
    pairs = [{"prompt": p, "chosen": "2", "rejected": "3"} for p in ("1+1=", "4-2=")]
    found, _ = prepare_preferences(pairs, arithmetic_tokenizer, unpaired=True)
    assert [item.is_desirable for item in found.items] == [True, False, True, False]
    (batch,) = PreferenceLoader(found, 5, shuffle=False)
    assert batch["is_desirable"].tolist() == [True, False, True, False, False]
    with pytest.raises(ConfigError, match="use --loss_type kto"):
        prepare_preferences(rows, arithmetic_tokenizer)


def test_kto_refuses_a_set_of_one_prompt(arithmetic_tokenizer, tmp_path):
    """Its KL term is of mismatched prompts and completions (arXiv:2402.01306)."""
    pair = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(pair) + "\n")
    match = "pairs.jsonl:1: KTO needs .* two different prompts, .* one prompt in all of its 2 rows"
    with pytest.raises(DataError, match=match):
        prepare_preferences(str(file), arithmetic_tokenizer, unpaired=True)
    rows = [{"prompt": "1+1=", "completion": c, "label": True} for c in ("2", "2 of course")]
    # Cut to different lengths it is still one prompt.
    with pytest.raises(DataError, match="one prompt in all of its 2 rows"):
        prepare_preferences(
            rows, arithmetic_tokenizer, unpaired=True, max_length=14, truncation_mode="keep_end"
        )
    prepare_preferences([pair], arithmetic_tokenizer)


def test_kto_takes_no_partner_of_the_same_prompt_cut_to_another_length(arithmetic_tokenizer):
    rows = [
        {"prompt": prompt, "completion": completion, "label": True}
        for prompt, completion in (("1+1=", "2"), ("1+1=", "2 of course"), ("3+3=", "6"))
    ]
    found, _ = prepare_preferences(
        rows, arithmetic_tokenizer, unpaired=True, max_length=14, truncation_mode="keep_end"
    )
    partners = [arithmetic_tokenizer.decode(item.rejected) for item in found.items]
    assert partners == ["6<eos>", "6<eos>", "2<eos>"]
    assert len(found.items[1].prompt) == 2


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": "a", "chosen": "b"}, "column 'rejected' is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "'rejected' must be a string, it is 3"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "the prompt has no token"),
        ({"prompt": "a", "chosen": ["b"], "rejected": "c"}, "'chosen' must be a string"),
        ({"text": "a"}, "column 'prompt' is missing"),
    ],
)
def test_a_bad_row_is_named_with_its_line(row, reason, arithmetic_tokenizer, tmp_path):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in (good, row)))
    with pytest.raises(DataError, match="rows.jsonl:2: ") as error:
        prepare_preferences(str(file), arithmetic_tokenizer)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": "a", "completion": "b"}, "no preference: the row has 'prompt', 'completion'"),
        ({"prompt": "a", "completion": "b", "label": 1}, "'label' must be true or false, it is 1"),
        ({"prompt_ids": [1], "chosen_ids": [2.5], "rejected_ids": [3]}, "'chosen_ids' must be a"),
        (
            {"prompt_ids": [1], "chosen_ids": [], "rejected_ids": [3]},
            "the chosen completion has no",
        ),
        ({"prompt_ids": [999], "chosen_ids": [1], "rejected_ids": [3]}, "token id 999 is outside"),
    ],
)
def test_a_bad_first_row_is_named(row, reason, arithmetic_tokenizer):
    with pytest.raises(DataError, match="row 0: ") as error:
        prepare_preferences([row], arithmetic_tokenizer, unpaired="label" in row, vocab_size=261)
    assert reason in str(error.value)
