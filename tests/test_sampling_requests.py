"""What cannot be meant is refused, in one sentence that says which and why."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from relax.errors import ConfigError
from relax.sampling import SamplingConfig, generate
from tests.families import tiny_family

BAD_OPTIONS = [
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0."),
    ({"max_new_tokens": 2.5}, "max_new_tokens must be at least 1, got 2.5."),
    ({"n": 0}, "n must be at least 1"),
    ({"slots": 0}, "slots must be at least 1"),
    ({"segment": -1}, "segment must be at least 1"),
    ({"min_new_tokens": -1}, "min_new_tokens must be at least 0, got -1."),
    ({"top_k": -1}, "top_k must be at least 0, got -1."),
    ({"top_k": True}, "top_k must be at least 0, got True."),
    ({"temperature": -0.1}, r"temperature must be 0 \(greedy\) or above, got -0.1."),
    ({"temperature": math.nan}, "temperature must be 0"),
    ({"temperature": math.inf}, "temperature must be 0"),
    ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0."),
    ({"top_p": 1.1}, "top_p must be above 0"),
    ({"min_p": 1.5}, "min_p must be from 0 to 1"),
    ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
    ({"temperature": 0.0, "top_p": 0.9}, "so top_p would have no effect"),
    ({"temperature": 0.0, "top_k": 5, "n": 2}, "so top_k and n would have no effect"),
    (
        {"min_new_tokens": 9, "max_new_tokens": 8, "eos_token_ids": (1,)},
        "min_new_tokens 9 is more than max_new_tokens 8.",
    ),
    ({"min_new_tokens": 2}, "min_new_tokens 2 has no effect without eos_token_ids or stop."),
    ({"stop": ("a", "")}, "a stop string must hold at least one character"),
    ({"stop": "END"}, "stop must be a tuple of strings, got 'END'."),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message) as refused:
        SamplingConfig(**options)
    assert "\n" not in str(refused.value)


GOOD = SamplingConfig(max_new_tokens=4)
BAD_REQUESTS = [
    ([], {}, {}, "there must be at least one prompt, got none."),
    ([[1], []], {}, {}, "prompt 1 is empty. Give it at least one token"),
    ([[1, 61]], {}, {}, "prompt 0 must hold ids from 0 to 60, got 61. Check that the tokenizer"),
    ([[1, -1]], {}, {}, "prompt 0 must hold ids from 0 to 60, got -1."),
    ([[1.5]], {}, {}, r"prompt 0 must be a list of token ids, got \[1.5\]"),
    (["ab"], {}, {}, "prompt 0 must be a list of token ids, got 'ab'"),
    (
        [[1], [1] * 61],
        {},
        {},
        "prompt 1 of 61 tokens and 4 new ones do not fit the 64 positions of the model.",
    ),
    ([[1]], {"eos_token_ids": (61,)}, {}, "eos_token_ids must hold ids from 0 to 60, got 61."),
    ([[1]], {"logit_bias": {70: 1.0}}, {}, "logit_bias must hold ids from 0 to 60, got 70."),
    ([[1]], {"logit_bias": {7: math.nan}}, {}, "logit_bias must hold numbers"),
    ([[1]], {"logit_bias": dict.fromkeys(range(61), -math.inf)}, {}, "leave no token to draw"),
    ([[1]], {"top_k": 62}, {}, "top_k 62 is more than the 61 tokens of the model."),
    ([[1]], {"stop": ("a",)}, {}, "need a decoder from ids to text: pass decode="),
    ([[1]], {}, {"limits": [5]}, "limits must be from 1 to max_new_tokens 4, got from 5 to 5."),
    ([[1]], {}, {"limits": [0]}, "limits must be from 1 to max_new_tokens 4, got from 0 to 0."),
    ([[1]], {}, {"limits": [1, 2]}, "limits must hold one number per row"),
]


@pytest.mark.parametrize(("prompts", "options", "arguments", "message"), BAD_REQUESTS)
def test_bad_requests_are_refused_before_anything_is_compiled(prompts, options, arguments, message):
    model, _ = tiny_family("llama")
    config = dataclasses.replace(GOOD, **options)
    with pytest.raises(ConfigError, match=message) as refused:
        generate(model, None, prompts, jax.random.key(0), config, **arguments)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "key", [0, np.zeros(2, np.uint32), jax.random.PRNGKey(0), jax.random.split(jax.random.key(0))]
)
def test_a_key_that_is_none_is_refused(key):
    """Numbers, keys of the old kind, and two keys for one row."""
    model, _ = tiny_family("llama")
    with pytest.raises(ConfigError, match="key must be one key of jax.random.key, or one for each"):
        generate(model, None, [[1]], key, GOOD)


def test_there_is_no_key_by_default():
    with pytest.raises(TypeError, match="key"):
        generate(*tiny_family("llama"), [[1]], config=GOOD)


@pytest.mark.parametrize("name", ["llama-dynamic", "phi3-longrope"])
def test_rows_end_where_rotary_positions_would_begin_to_stretch(name):
    """At 8 positions: keys already in the cache would have to turn again."""
    model, _ = tiny_family(name)
    with pytest.raises(ConfigError, match="5 tokens and 4 new ones do not fit the 8 positions up"):
        generate(model, None, [[1] * 5], jax.random.key(0), GOOD)
