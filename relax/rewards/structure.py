"""Rewards of the form of a completion: tags, a regular expression, JSON."""

import json
import re
from collections.abc import Callable

from relax.errors import ConfigError
from relax.rewards.answers import per_completion
from relax.rewards.loading import reward_factory
from relax.rewards.protocol import text_of

_FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL)


def think_format_reward(
    completions, prompt_texts=None, completion_texts=None, **kwargs
) -> list[float]:
    """1 where a completion begins with the only `<think>` and closes it, else 0.

    Where the prompt ends with an open `<think>`, as the chat templates of some reasoning models
    write it, that is the beginning: the completion has to close it.

    Args:
      completions: texts or conversations.
      prompt_texts, completion_texts: as tokens are read, special tokens included; where they are
        given, tags that are special tokens count.

    >>> think_format_reward(["<think>2 and 2</think>4", "4", "<think><think></think>4"])
    [1.0, 0.0, 0.0]
    >>> think_format_reward(["2 and 2</think>4", "2 and 2"], prompt_texts=["2+2=<think>\\n"] * 2)
    [1.0, 0.0]
    """
    texts = completion_texts or [text_of(completion) for completion in completions]
    prompts = prompt_texts or [""] * len(texts)
    return [
        think_format("<think>" * opens_thought(prompt) + text)
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def opens_thought(prompt: str) -> bool:
    """Whether a prompt ends with an open `<think>`.

    >>> opens_thought("<assistant><think>\\n"), opens_thought("<think>\\n\\n</think>\\n")
    (True, False)
    """
    return prompt.rstrip().endswith("<think>")


def think_format(text: str) -> float:
    return float(text.startswith("<think>") and text.count("<think>") == 1 and "</think>" in text)


@reward_factory
def get_regex_match(pattern: str, full: bool = False) -> Callable:
    """1 where a regular expression matches, else 0.

    Args:
      pattern: of Python's `re`; `.` does not match line breaks unless it begins with `(?s)`.
      full: it must match the whole completion, not just be found in it.

    >>> get_regex_match("[0-9]+", full=True)(["72", "It is 72"])
    [1.0, 0.0]
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"pattern must be a regular expression, got {pattern!r}: {error}."
        ) from error
    match = compiled.fullmatch if full else compiled.search
    return per_completion("regex_match", lambda text: float(match(text) is not None))


@reward_factory
def get_json_schema(schema: dict | None = None) -> Callable:
    """1 where a completion is JSON that is valid under a JSON schema, else 0.

    The JSON may stand in a fenced code block, which is then the whole completion. NaN and Infinity
    are no JSON. Needs the extra [schema].

    Args:
      schema: for all completions; None: the column `schema` holds each row's, an object or its
        JSON text.

    >>> json_of("```json\\n[1, 2]\\n```")
    [1, 2]
    """
    try:
        import jsonschema
    except ImportError as error:
        raise ConfigError(
            "the reward 'json_schema' needs jsonschema: pip install 'relax-trainers[schema]'."
        ) from error

    def valid(text: str, schema) -> float | None:
        if schema is None:
            return None
        schema = json.loads(schema) if isinstance(schema, str) else schema
        kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        kind.check_schema(schema)
        try:
            value = json_of(text)
        except (ValueError, RecursionError):
            return 0.0
        return float(kind(schema).is_valid(value))

    if schema is None:
        return per_completion("json_schema", valid, "schema")
    try:
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ConfigError(f"schema must be a JSON schema: {error.message}.") from error
    return per_completion("json_schema", lambda text: valid(text, schema))


def json_of(text: str):
    """The JSON value that a completion is.

    Raises:
      ValueError: it is none.
    """
    fenced = _FENCE.fullmatch(text)
    return json.loads(fenced[1] if fenced else text, parse_constant=_no_constant)


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")
