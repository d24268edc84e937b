"""The report says what became of the rows, readable with and without colour."""

import io
import json

import pytest
from rich.console import Console

from relax.data import DataLoader, FormatOptions, arithmetic_tokenizer, prepare, render
from relax.data.report import percentiles

ROWS = [
    {"prompt": "1+1=", "completion": "2", "level": 1},
    {"prompt": "1+2=", "completion": "three [bold]", "level": 1},
    {"prompt": "a prompt that is far too long for this", "completion": "!", "level": 2},
]


@pytest.fixture(scope="module")
def prepared():
    return prepare(ROWS, arithmetic_tokenizer(), FormatOptions(max_length=12))


def shown(report, **kwargs):
    out = io.StringIO()
    examples = kwargs.pop("print_examples", 2)
    render(report, Console(file=out, width=100, **kwargs), print_examples=examples)
    return out.getvalue()


def test_the_report_counts_rows_cuts_and_tokens(prepared):
    report = prepared[1].to_dict()
    assert report["format"] == "prompt-completion"
    assert report["columns"] == ("prompt", "completion")
    assert report["unused_columns"] == ("level",)
    assert (report["num_rows"], report["num_examples"], report["truncated"]) == (3, 2, 1)
    assert report["dropped"] == {"no trained token within max_length": 1}
    assert report["lengths"] == {"0": 6, "50": 17, "90": 40, "99": 40, "100": 40}
    assert (report["num_tokens"], report["num_trained_tokens"]) == (6 + 12, 2 + 8)
    assert report["share"] == 10 / 18
    assert (report["last_trained_token"], report["ends_trained"]) == ("<eos>", True)
    json.dumps(report)


def test_without_colour_trained_tokens_stand_in_marks(prepared):
    text = shown(prepared[1])
    assert "1+1=«2<eos>»" in text
    assert "1+2=«three [b»" in text  # and nothing of it is taken for markup
    for words in ("3 read, 2 trained on", "1 no trained token within max_length", "not used"):
        assert words in text
    assert "\x1b" not in text


def test_with_colour_trained_tokens_are_green(prepared):
    colour = shown(prepared[1], force_terminal=True, color_system="standard", no_color=False)
    assert "\x1b[1;32m2<eos>" in colour and "«" not in colour
    assert "«2<eos>»" in shown(prepared[1], force_terminal=True, no_color=True)


def test_as_many_examples_are_shown_as_asked(prepared):
    assert "example 1" not in shown(prepared[1], print_examples=0)
    assert "example 2" not in shown(prepared[1], print_examples=1)


def test_the_report_says_how_full_packed_rows_are(prepared):
    examples, report = prepared
    loader = DataLoader(examples, 1, packing="bfd", max_length=12)
    packed = report.with_packing("bfd", loader)
    assert (packed.num_packed_rows, packed.packing_fill) == (2, 18 / 24)
    assert "bfd: 2 rows, 75.0% full" in shown(packed)


def test_percentiles_are_lengths_that_occur():
    assert percentiles([10, 20]) == {0: 10, 50: 10, 90: 20, 99: 20, 100: 20}
