"""Rewards for the form of a completion: tags, a regular expression, JSON."""

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
    """1 if a completion begins with its only `<think>` and closes it, else 0.

    If the prompt ends with an open `<think>`, as with the chat templates of some reasoning models,
    the completion must close that one.

    Args:
      completions: texts or conversations.
      prompt_texts, completion_texts: texts with special tokens; with them, tags that are special
        tokens count.

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
    """1 if a regular expression matches, else 0.

    It is matched with the text with special tokens, since tags may be special.

    Args:
      pattern: for Python's `re`; `.` does not match line breaks unless it begins with `(?s)`.
      full: match the whole completion instead of any part of it.

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

    def regex_match(completions, completion_texts=None, **kwargs) -> list[float]:
        texts = completion_texts or [text_of(completion) for completion in completions]
        return [float(match(text) is not None) for text in texts]

    return regex_match


@reward_factory
def get_json_schema(schema: dict | None = None) -> Callable:
    """1 if a completion is JSON that is valid under a JSON schema, else 0.

    The completion may be the JSON or a fenced code block with it. NaN and Infinity are no JSON.
    Special tokens, such as tags around a tool call, do not count. Needs the extra [schema].

    Args:
      schema: schema of all completions; None: the column `schema` has one per row, an object or its
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
    """The JSON value of a completion.

    Raises:
      ValueError: the completion is no JSON.
    """
    fenced = _FENCE.fullmatch(text)
    return json.loads(fenced[1] if fenced else text, parse_constant=_no_constant)


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")
