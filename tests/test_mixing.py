"""Several sources are mixed by their weights, in an order of (seed, epoch, position)."""

import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from runs import additions, finish, flags, metrics, model_bytes, write_rows

from relax.config import SFTConfig
from relax.data import (
    DataLoader,
    Encoded,
    Examples,
    PreferenceLoader,
    PromptLoader,
    arithmetic_tokenizer,
    prepare,
    prepare_preferences,
    prepare_prompts,
)
from relax.data.mixing import Mixture, parse_sources
from relax.data.sources import read_sources
from relax.engine.rows import source_rows
from relax.errors import ConfigError, DataError


def mixture(sizes, weights=None, strategy="first_exhausted"):
    names = tuple("abcdef"[: len(sizes)])
    exact = None if weights is None else tuple(Fraction(weight) for weight in weights)
    return Mixture(names, tuple(sizes), exact, strategy)


# Weights 0.7 and 0.3 of 100 and 90 rows. b lasts for 300 rows, a for 100 / 0.7 = 142.9: a is
# exhausted first, and b then gives 42.9 rows; for all of b, a gives 90 * 7 / 3 = 210.
@pytest.mark.parametrize(
    "sizes, weights, strategy, counts",
    [
        ((100, 90), ("0.7", "0.3"), "first_exhausted", (100, 43)),
        ((100, 90), ("0.7", "0.3"), "all_exhausted", (210, 90)),
        ((100, 90), ("7", "3"), "all_exhausted", (210, 90)),
        ((100, 90), None, "first_exhausted", (90, 90)),
        ((100, 90), None, "all_exhausted", (100, 100)),
        ((100, 90), None, "concat", (100, 90)),
    ],
)
def test_an_epoch_has_the_rows_that_weights_and_strategy_give(sizes, weights, strategy, counts):
    mixed = mixture(sizes, weights, strategy)
    assert (mixed.counts, len(mixed)) == (counts, sum(counts))
    found = Counter(mixed.source_of(mixed.order(seed=3, epoch=2)).tolist())
    assert (found[0], found[1]) == counts


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_source_goes_through_all_rows_before_one_comes_again_across_epochs_too(shuffle):
    mixed = mixture((5, 7), ("0.5", "0.5"), "first_exhausted")  # 5 rows of each in an epoch
    order = np.concatenate([mixed.order(0, epoch, shuffle) for epoch in range(7)])
    of_b = order[order >= 5]
    assert len(of_b) == 35
    assert set(Counter(of_b.tolist()).values()) == {5}
    first, second = of_b[:5].tolist(), of_b[5:10].tolist()
    assert len({*first}) == 5 and {*first, *second} == {*range(5, 12)}


def test_without_shuffling_sources_alternate_evenly_in_their_own_order():
    mixed = mixture((4, 2), ("2", "1"), "all_exhausted")
    assert mixed.order(0, 0, shuffle=False).tolist() == [0, 4, 1, 2, 5, 3]


def test_concat_has_the_order_of_one_set_of_all_rows():
    from relax.data.order import epoch_order

    mixed = mixture((3, 4), strategy="concat")
    assert mixed.order(5, 2).tolist() == epoch_order(7, 5, 2).tolist()


def test_orders_differ_between_epochs_seeds_and_sources_and_repeat():
    mixed = mixture((50, 50), ("1", "1"))
    orders = [tuple(mixed.order(seed, epoch)) for seed in range(2) for epoch in range(2)]
    assert len(set(orders)) == 4
    assert orders[0] == tuple(mixed.order(0, 0))
    a, b = (mixed.order(0, 0), mixed.order(0, 0))
    assert [r for r in a if r < 50] != [r - 50 for r in b if r >= 50]


@pytest.mark.parametrize(
    "sizes, weights, strategy, words",
    [
        ((5, 5), ("1", "1"), "concat", "concat takes every row once"),
        ((5, 5), None, "interleave", "one of concat, first_exhausted, all_exhausted"),
        ((2, 5), ("0.999", "0.001"), "first_exhausted", "source 'b' gives no row of its 5"),
        ((2, 0), None, "concat", "source 'b' has no row: leave it out, or hold out fewer rows"),
        ((6, 6), ("1e30", "1"), "all_exhausted", "would have 6e.30 rows, and may have 2,147,483"),
    ],
)
def test_mixtures_without_a_meaning_are_refused(sizes, weights, strategy, words):
    with pytest.raises(ConfigError, match=words):
        mixture(sizes, weights, strategy)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a.jsonl:0.7,b.parquet:0.3", [("a", "a.jsonl", 0.7), ("b", "b.parquet", 0.3)]),
        ("a.jsonl,dir/b.csv", [("a", "a.jsonl", None), ("b", "dir/b.csv", None)]),
        ("x=a.jsonl:2,y=a.jsonl:1e-1", [("x", "a.jsonl", 2.0), ("y", "a.jsonl", 0.1)]),
        ("c:/rows.jsonl:1,user/set:3", [("rows", "c:/rows.jsonl", 1.0), ("set", "user/set", 3.0)]),
        (r"a\,b.jsonl:1,c.txt:1", [("a_b", "a,b.jsonl", 1.0), ("c", "c.txt", 1.0)]),
        ("a.jsonl:0.5", [("a", "a.jsonl", 0.5)]),
    ],
)
def test_sources_are_read_from_one_text(text, expected):
    assert [(s.name, s.path, s.weight and float(s.weight)) for s in parse_sources(text)] == expected


@pytest.mark.parametrize("name", ["rows.jsonl", "user/set", "reasoning_gym/chain_sum", "a:b.jsonl"])
def test_a_single_source_is_none_of_a_list(name):
    assert parse_sources(name) is None


def test_a_file_whose_name_looks_like_a_list_is_that_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.jsonl", "c.jsonl:0.5"):
        write_rows(tmp_path / name, additions(2))
        assert parse_sources(name) is None
    found = parse_sources("c.jsonl:0.5:2,d.jsonl:1")
    assert [(s.path, float(s.weight)) for s in found] == [("c.jsonl:0.5", 2.0), ("d.jsonl", 1.0)]


@pytest.mark.parametrize(
    "text, words",
    [
        ("a.jsonl:0.7,b.jsonl", "'b.jsonl' has none"),
        ("a.jsonl,,b.jsonl", "a part of 'a.jsonl,,b.jsonl' is empty"),
        ("a.jsonl:0,b.jsonl:1", "above 0, got 0 for 'a.jsonl'"),
        ("x/a.jsonl,y/a.jsonl", "two sources of dataset_name are named 'a'"),
    ],
)
def test_lists_with_a_mistake_are_refused(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_sources(text)


@pytest.mark.parametrize("weight", ["abc", "nan", "-1", ""])
def test_a_weight_that_is_no_number_is_refused(tmp_path, weight):
    file = write_rows(tmp_path / "a.jsonl", additions(2))
    for name in ("", "sums="):
        with pytest.raises(ConfigError, match=f"must be a number above 0, got {weight!r}"):
            parse_sources(f"{name}{file}:{weight},b.jsonl:1")


def documents(*starts):
    ids = [np.arange(start, start + 3, dtype=np.int32) for start in starts]
    return Examples(Encoded(row, row) for row in ids)


def test_batches_name_the_source_of_every_token_and_packed_rows_have_one_source():
    examples = documents(0, 10, 20, 100, 110)
    examples.mixture = mixture((3, 2), ("1", "1"), "all_exhausted")
    for options in ({}, {"packing": "bfd", "max_length": 6}):
        loader = DataLoader(examples, 4, **options)
        for batch in loader:
            real = batch["segment_ids"] > 0
            expected = (batch["input_ids"] >= 100) & real
            assert (batch["source_ids"] == expected).all()
    assert loader.mixture.sizes == (2, 1)  # rows of 6 tokens: two of a, one of b


def test_pairs_and_prompts_are_mixed_like_rows(tmp_path):
    tokenizer = arithmetic_tokenizer()
    pairs = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": "0"} for i in range(1, 7)]
    a, b = write_rows(tmp_path / "a.jsonl", pairs[:4]), write_rows(tmp_path / "b.jsonl", pairs[4:])
    rows = read_sources(parse_sources(f"{a}:2,{b}:1"))
    found, _ = prepare_preferences(rows, tokenizer)
    (batch,) = PreferenceLoader(found, 8)
    real = batch["index"] >= 0
    assert Counter(batch["source_ids"][real].tolist()) == {0: 4, 1: 2}
    assert (batch["source_ids"] == np.where(real, batch["index"] >= 4, 0)).all()
    prompts = prepare_prompts(rows, tokenizer)
    items = list(PromptLoader(prompts, 3))
    named = [name for item in items for name in item["sources"]]
    assert Counter(named) == {"a": 4, "b": 2}
    places = {row["prompt"]: "a" if i < 4 else "b" for i, row in enumerate(pairs)}
    assert named == [places[row["prompt"]] for item in items for row in item["rows"]]


def test_dropped_rows_leave_the_source_they_were_of(tmp_path):
    tokenizer = arithmetic_tokenizer()
    from relax.data import FormatOptions

    rows = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1" * 40, "completion": "2"}]
    a, b = write_rows(tmp_path / "a.jsonl", rows * 3), write_rows(tmp_path / "b.jsonl", rows)
    options = FormatOptions(max_length=20, truncation_mode="drop")
    examples, report = prepare(read_sources(parse_sources(f"{a},{b}")), tokenizer, options)
    assert (report.num_rows, examples.mixture.sizes) == (8, (3, 1))


def test_sources_of_different_formats_are_refused_in_one_sentence(tmp_path):
    a = write_rows(tmp_path / "a.jsonl", additions(2))
    b = write_rows(tmp_path / "b.jsonl", [{"text": "1+1=2"}])
    with pytest.raises(DataError) as error:
        prepare(read_sources(parse_sources(f"{a},{b}")), arithmetic_tokenizer())
    assert str(error.value) == (
        f"sources must have one format, and {a}:1 is prompt-completion of texts while {b}:1 is "
        "text: write all in one format (`relax data convert` makes conversations of rows for SFT), "
        "or leave one out."
    )


def test_rows_that_are_converted_may_stand_beside_rows_in_that_form(tmp_path):
    a = write_rows(tmp_path / "a.jsonl", [{"prompt": "1+1=", "response": "2"}])
    b = write_rows(tmp_path / "b.jsonl", [{"prompt": "1+2=", "completion": "3"}])
    tokenizer = arithmetic_tokenizer()
    tokenizer.chat_template = None
    examples, _ = prepare(read_sources(parse_sources(f"{a},{b}")), tokenizer)
    assert [len(row.input_ids) for row in examples] == [len(examples[0].input_ids)] * 2


def test_a_held_out_part_has_every_row_once(tmp_path):
    a, b = (write_rows(tmp_path / f"{n}.jsonl", additions(40)) for n in "ab")
    config = SFTConfig().replace(**{"dataset_name": f"{a}:3,{b}:1", "test_size": 0.25})
    train, held_out = source_rows(config)
    assert (len(train), len(held_out)) == (60, 20)
    assert (train.mixture.strategy, held_out.mixture.strategy) == ("first_exhausted", "concat")
    assert sum(held_out.mixture.sizes) == len(held_out.mixture) == 20


@pytest.mark.programs
def test_mixing_options_need_several_sources(tmp_path):
    a = write_rows(tmp_path / "a.jsonl", additions(4))
    config = SFTConfig().replace(**{"dataset_name": str(a), "mixing_strategy": "concat"})
    with pytest.raises(ConfigError, match="mixes several sources, and dataset_name is one"):
        source_rows(config)
    config = SFTConfig().replace(**{"dataset_name": f"{a},b={a}", "dataset_config": "x"})
    with pytest.raises(ConfigError, match="dataset_config is of a single data set"):
        source_rows(config)


def test_a_run_says_its_passes_logs_each_source_and_resumes_to_the_byte(tmp_path):
    a = write_rows(tmp_path / "a.jsonl", additions(24))
    b = write_rows(tmp_path / "b.jsonl", additions(40)[24:])
    given = flags(dataset_name=f"{a}:0.75,far={b}:0.25", learning_rate=1e-3, max_steps=6,
                  per_device_train_batch_size=4, logging_steps=2, test_size=0.2,
                  mixing_strategy="all_exhausted", eval_strategy="steps", eval_steps=3)  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    printed = finish(*given, f"--output_dir={whole}")
    assert "mixing (all_exhausted): an epoch has" in printed
    assert "in the run" in printed
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    for line in training:
        assert line["sources/a/loss"] > 0 and line["sources/far/loss"] > 0
    ends = [line for line in lines if "eval_loss" in line][-1]
    counts = [ends[f"eval_sources/{name}/count"] for name in ("a", "far")]
    means = [ends[f"eval_sources/{name}/loss"] for name in ("a", "far")]
    assert np.dot(counts, means) / sum(counts) == pytest.approx(ends["eval_loss"], rel=1e-5)

    finish(*given, f"--output_dir={cut}", "--save_steps=3")
    import shutil

    shutil.rmtree(cut / "checkpoints" / "6")
    finish(*given, f"--output_dir={cut}", "--resume=auto")
    assert model_bytes(cut) == model_bytes(whole)
    assert metrics(cut) == metrics(whole)


def test_the_loss_of_each_source_is_that_of_its_tokens_alone():
    import jax
    import jax.numpy as jnp

    from relax.losses import IGNORED, linear_cross_entropy

    rng = np.random.default_rng(0)
    hidden, matrix = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((12, 4), (7, 4)))
    targets = jnp.asarray(rng.integers(0, 7, 12)).at[jnp.array([2, 5])].set(IGNORED)
    groups = jnp.asarray([0, 0, 0, 2, 2, 2, 0, 2, 0, 0, 2, 2])  # the group 1 has no token
    options = {"chunk_size": 5, "z_loss": 0.1}

    def loss(hidden, **more):
        return linear_cross_entropy(hidden, matrix, targets, **options, **more)

    sums = loss(hidden, groups=groups, num_groups=3)
    for group in range(3):
        alone = jnp.where(groups == group, targets, IGNORED)
        expected = linear_cross_entropy(hidden, matrix, alone, **options)
        np.testing.assert_allclose(sums.group_loss[group], expected.loss, rtol=1e-6)
        assert sums.group_weight[group] == expected.weight
    plain = loss(hidden)
    assert [float(x) for x in sums[:5]] == [float(x) for x in plain]
    one, other = (
        jax.grad(lambda h, more=more: loss(h, **more).loss)(hidden)
        for more in ({}, {"groups": groups, "num_groups": 3})
    )
    np.testing.assert_array_equal(one, other)
