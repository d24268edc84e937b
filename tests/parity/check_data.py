"""Tokens, masks, truncation and packing, against what TRL's trainers make of the same rows."""

from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from golden.trl_cases import gsm_rows
from golden.trl_dpo_cases import _pair
from peers import bare
from trl import DPOTrainer, SFTTrainer, pack_dataset
from trl.data_utils import extract_prompt, unpair_preference_dataset
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from relax.data import arithmetic_tokenizer, prepare
from relax.data.batching import collate, round_up
from relax.data.examples import Encoded
from relax.data.formats import FormatOptions
from relax.data.packing import STRATEGIES, pack
from relax.data.preference import prepare_preferences
from relax.data.preference_encode import split_prompt
from relax.losses import next_token_targets

SECTION = "Data, masks and packing"
RNG = np.random.default_rng(10)
TOKENIZER = arithmetic_tokenizer()
MESSAGES = gsm_rows()[:12]
TEXTS = [
    {"prompt": row["prompt"][0]["content"], "completion": f" {row['completion'][0]['content']}"}
    for row in MESSAGES
]
LONG = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            *MESSAGES[i]["prompt"],
            *MESSAGES[i]["completion"],
            *MESSAGES[i + 1]["prompt"],
            *MESSAGES[i + 1]["completion"],
        ]
    }
    for i in range(6)
]
ROWS = {
    "texts": [{"text": row["prompt"] + row["completion"] + " é"} for row in TEXTS],
    "prompts and completions": TEXTS,
    "prompts and completions as messages": MESSAGES,
    "messages": LONG,
}


def theirs_sft(rows, **settings):
    """TRL's token ids and labels."""
    settings = {"max_length": None, "truncation_mode": "keep_start"} | settings
    args = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        shuffle_dataset=False,
        assistant_only_loss=settings.pop("assistant_only_loss", False),
        max_length=settings["max_length"],
        truncation_mode=settings["truncation_mode"],
    )
    completion_only = settings.get("completion_only_loss", "prompt" in rows[0])
    trainer = bare(
        SFTTrainer,
        _tokenizer=TOKENIZER,
        chat_template=None,
        completion_only_loss=completion_only,
    )
    dataset = Dataset.from_list(rows)
    made = trainer._prepare_dataset(dataset, TOKENIZER, args, False, None, "train")
    return list(made["input_ids"]), list(made["labels"])


def ours_sft(rows, **settings):
    options = FormatOptions(**{"max_length": None} | settings)
    examples, _ = prepare(rows, TOKENIZER, options)
    return [e.input_ids.tolist() for e in examples], [e.labels.tolist() for e in examples]


def targets(labels):
    """Labels as the loss reads them: nothing predicts the first token."""
    return [np.array(row[1:]) for row in labels]


def compare_sft(parity, what, rows, **settings):
    (ids, labels), (their_ids, their_labels) = (
        ours_sft(rows, **settings),
        theirs_sft(rows, **settings),
    )
    parity.equal(what, "trl", "tokens", [np.array(i) for i in ids], their_ids)
    parity.equal(what, "trl", "trained tokens", targets(labels), targets(their_labels))


@pytest.mark.parametrize("name", ROWS)
def check_masks(parity, name):
    compare_sft(parity, f"SFT, {name}", ROWS[name])


def check_other_masks(parity):
    compare_sft(parity, "SFT, `assistant_only_loss`", LONG, assistant_only_loss=True)
    compare_sft(
        parity,
        "SFT, `assistant_only_loss` of prompts and completions",
        MESSAGES,
        assistant_only_loss=True,
    )
    compare_sft(parity, "SFT, `completion_only_loss` false", TEXTS, completion_only_loss=False)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def check_truncation(parity, mode):
    """Some prompts fill all 200 tokens."""
    for rows, name in ((TEXTS, "texts"), (LONG, "messages")):
        what = f"SFT, `truncation_mode` {mode}, {name}"
        compare_sft(parity, what, rows, max_length=200, truncation_mode=mode)


@pytest.mark.parametrize("strategy", STRATEGIES)
def check_packing(parity, strategy):
    lengths = RNG.integers(0, 90, size=700)
    documents = [list(range(i * 100, i * 100 + n)) for i, n in enumerate(lengths)]
    dataset = Dataset.from_dict({"input_ids": documents})
    packed = pack_dataset(dataset, 64, strategy)
    rows = pack(lengths, 64, strategy)
    ids = [np.concatenate([documents[s.document][s.start : s.stop] for s in row]) for row in rows]
    what = f"`packing_strategy` {strategy}, 700 documents"
    parity.equal(what, "trl", "rows of tokens", ids, list(packed["input_ids"]))
    if strategy != "wrapped":
        mine = [[s.stop - s.start for s in row] for row in rows]
        parity.equal(what, "trl", "lengths within rows", mine, list(packed["seq_lengths"]))


def check_packing_of_many(parity):
    lengths = [40] * 1000 + [24] * 1000
    documents = [[i] * n for i, n in enumerate(lengths)]
    packed = pack_dataset(Dataset.from_dict({"input_ids": documents}), 64, "bfd")
    parity.departs(
        "`packing_strategy` bfd, 1000 documents of 40 tokens, then 1000 of 24, in rows of 64",
        "trl",
        "number of rows",
        np.array(len(pack(lengths, 64))),
        np.array(len(packed)),
        "ReLax packs all documents together, into 1000 rows; TRL packs each 1000 documents by "
        "themselves, into 1500.",
    )


def check_collators(parity):
    examples = [
        Encoded(ids := RNG.integers(5, 90, size=n), np.where(np.arange(n) < n // 2, -100, ids))
        for n in (5, 17, 9)
    ]
    for multiple in (None, 8):
        collator = DataCollatorForLanguageModeling(0, pad_to_multiple_of=multiple)
        rows = [{"input_ids": e.input_ids, "labels": e.labels} for e in examples]
        theirs = collator(rows)
        batch = collate([[e] for e in examples], round_up(17, multiple or 1))
        what = "SFT collator" + (f", `pad_to_multiple_of` {multiple}" if multiple else "")
        parity.equal(what, "trl", "tokens", batch["input_ids"], theirs["input_ids"])
        parity.equal(what, "trl", "mask", batch["segment_ids"], theirs["attention_mask"])
        wanted = next_token_targets(theirs["labels"].numpy())
        parity.equal(what, "trl", "targets", next_token_targets(batch["labels"]), wanted)
    rows = [
        {
            "input_ids": np.concatenate([e.input_ids for e in examples]),
            "labels": np.concatenate([e.labels for e in examples]),
            "seq_lengths": [5, 17, 9],
        }
    ]
    theirs = DataCollatorForLanguageModeling(0, padding_free=True)(rows)
    batch = collate([examples], 31)
    what = "SFT collator, a packed row"
    parity.equal(what, "trl", "tokens", batch["input_ids"], theirs["input_ids"])
    parity.equal(what, "trl", "positions", batch["positions"], theirs["position_ids"])
    parity.equal(what, "trl", "documents", batch["segment_ids"] - 1, theirs["seq_idx"])
    wanted = next_token_targets(theirs["labels"].numpy())
    parity.equal(what, "trl", "targets", next_token_targets(batch["labels"]), wanted)


PAIRS = {kind: [_pair(row, i, kind) for i, row in enumerate(MESSAGES)] for kind in ("texts", "x")}
PAIRS["prompts and texts"] = [
    {"prompt": row["prompt"][0]["content"], "chosen": " Yes.", "rejected": " No, not at all."}
    for row in MESSAGES
]


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("most", [None, 230])
def check_pairs(parity, kind, most):
    """With 230 tokens some prompts fill the row, and most completions are cut."""
    rows = PAIRS[kind]
    args = SimpleNamespace(dataset_num_proc=None, max_length=most, truncation_mode="keep_start")
    trainer = bare(DPOTrainer, _tokenizer=TOKENIZER)
    dataset = trainer._prepare_dataset(Dataset.from_list(rows), TOKENIZER, args, "train")
    batch = DataCollatorForPreference(0, max_length=most)(list(dataset))
    items = prepare_preferences(rows, TOKENIZER, max_length=most)[0].items
    width = batch["input_ids"].shape[1]
    found = {name: np.zeros((2 * len(items), width), np.int64) for name in batch}
    completions = [p.chosen for p in items] + [p.rejected for p in items]
    for i, (pair, completion) in enumerate(zip([*items, *items], completions, strict=True)):
        whole = np.concatenate([pair.prompt, completion])
        found["input_ids"][i, : len(whole)] = whole
        found["attention_mask"][i, : len(whole)] = 1
        found["completion_mask"][i, len(pair.prompt) : len(whole)] = 1
    names = {"texts": "an implied prompt", "x": "messages"}
    what = f"DPO, {names.get(kind, kind)}" + (f", `max_length` {most}" if most else "")
    for name, values in batch.items():
        parity.equal(what, "trl", f"`{name}`", found[name], values)


def check_implied_prompts(parity):
    cases = [
        ("The sky is blue.", "The sky is green."),
        ("one two", "one three"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],) * 1
        + ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}],),
        ("Yes", "No"),
    ]
    for chosen, rejected in cases:
        wanted = extract_prompt({"chosen": chosen, "rejected": rejected})
        mine = split_prompt(chosen, rejected)
        parity.equal("implied prompts", "trl", "prompt and completions", repr(mine), repr(wanted))
    chosen, rejected = "Yes, of course. ", "No, never. "
    parity.departs(
        "implied prompts, no common beginning, a space at the end",
        "trl",
        "prompt and completions",
        repr(split_prompt(chosen, rejected)),
        repr(extract_prompt({"chosen": chosen, "rejected": rejected})),
        "ReLax has an empty prompt; TRL takes the last character for the one before the first "
        "difference, so that the prompt is the whole chosen text and the completions are spaces.",
    )


def check_unpaired(parity):
    """TRL's rows are all chosen ones, then all rejected ones; ReLax's alternate."""
    rows = PAIRS["prompts and texts"]
    unpaired = unpair_preference_dataset(Dataset.from_list(rows))
    items = prepare_preferences(rows, TOKENIZER, unpaired=True)[0].items
    mine = [(TOKENIZER.decode(i.prompt), TOKENIZER.decode(i.chosen), i.is_desirable) for i in items]
    wanted = [(r["prompt"], r["completion"] + TOKENIZER.eos_token, r["label"]) for r in unpaired]
    parity.equal("KTO, pairs as rows", "trl", "rows", repr(sorted(mine)), repr(sorted(wanted)))
