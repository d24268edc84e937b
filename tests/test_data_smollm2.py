"""On the real SmolLM2 tokenizer, where $RELAX_SMOLLM2 names its directory: labels made by hand."""

import os

import pytest

from relax.data import load_tokenizer, prepare

pytestmark = pytest.mark.skipif(
    "RELAX_SMOLLM2" not in os.environ, reason="RELAX_SMOLLM2 names no model directory"
)


def test_prompt_and_completion_messages_become_these_tokens_and_labels():
    tokenizer = load_tokenizer(os.environ["RELAX_SMOLLM2"])
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2  # masks cannot come from ids
    row = {
        "prompt": [{"role": "user", "content": "What is 2+2?"}],
        "completion": [{"role": "assistant", "content": "It is 4."}],
    }
    examples, report = prepare([row], tokenizer, vocab_size=49152)
    prompt = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    prompt_ids = tokenizer(prompt)["input_ids"]
    answer_ids = tokenizer("It is 4.")["input_ids"] + [2] + tokenizer("\n")["input_ids"]
    assert examples[0].input_ids.tolist() == prompt_ids + answer_ids
    assert examples[0].labels.tolist() == [-100] * len(prompt_ids) + answer_ids
    assert report.ends_trained and report.endless == 0


def test_a_text_ends_with_the_end_token():
    tokenizer = load_tokenizer(os.environ["RELAX_SMOLLM2"])
    examples, _ = prepare([{"text": "Once upon a time"}], tokenizer, vocab_size=49152)
    ids = tokenizer("Once upon a time")["input_ids"] + [2]
    assert examples[0].input_ids.tolist() == ids
    assert examples[0].labels.tolist() == [-100, *ids[1:]]
