"""The scorers of reasoning-gym tasks (the extra [tasks]); `relax/data/tasks.py` makes the rows."""

import functools
import importlib.metadata
import json
import re
from fractions import Fraction

from relax.errors import ConfigError
from relax.rewards.protocol import text_of

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def reasoning_gym(
    completions, task, log_metric=None, completion_texts=None, **kwargs
) -> list[float | None]:
    """The score that the scorer of each row's task gives the completion, from 0 to 1.

    The scorer gets the text in the last `<answer></answer>`, else after the last `</think>`, else
    the whole text. An answer on which a scorer raises counts as wrong; the fraction of those is
    logged as `reasoning_gym/unreadable`.

    Args:
      completions: texts or conversations.
      completion_texts: texts with special tokens, since tags may be special.
      task: column of the rows of `reasoning_gym/<task>`; None: not applicable.
    """
    rewards: list[float | None] = []
    unreadable = 0
    texts = completion_texts or [text_of(completion) for completion in completions]
    for text, entry in zip(texts, task, strict=True):
        if entry is None:
            rewards.append(None)
            continue
        scorer = _scorer(entry["name"], json.dumps(entry["options"]))
        try:
            rewards.append(float(scorer(answer_of(text), unpack(entry["entry"]))))
        except Exception:  # several scorers raise on unexpected answers
            rewards.append(0.0)
            unreadable += 1
    if log_metric is not None:
        log_metric("reasoning_gym/unreadable", unreadable / max(1, len(rewards)))
    return rewards


def answer_of(text: str) -> str:
    """The part of a completion that is the answer.

    >>> answer_of("<think>2+2</think> <answer> 4 </answer>"), answer_of("<think>2+2</think> 4")
    ('4', '4')
    """
    tagged = _ANSWER.findall(text)
    return (tagged[-1] if tagged else text.rpartition("</think>")[2]).strip()


@functools.lru_cache(maxsize=64)
def _scorer(name: str, options: str):
    return gym().create_dataset(name, **unpack(json.loads(options))).score_answer


@functools.cache
def gym():
    """The module `reasoning_gym.factory`."""
    try:
        import reasoning_gym.factory
    except ImportError as error:
        raise ConfigError(
            "reasoning_gym tasks need reasoning-gym: pip install 'relax-trainers[tasks]'."
        ) from error
    return reasoning_gym.factory


reasoning_gym.prepare = gym  # type: ignore[attr-defined]  # load_reward calls it


def gym_version() -> str:
    """The version of reasoning-gym that is installed."""
    return importlib.metadata.version("reasoning-gym")


def pack(value):
    """Converts to JSON types: tuples, sets, fractions and dicts with any keys: tagged lists.

    >>> unpack(pack({(1, Fraction(1, 2)): {"a"}})) == {(1, Fraction(1, 2)): {"a"}}
    True
    """
    if isinstance(value, dict):
        return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
    if isinstance(value, tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return {type(value).__name__: [pack(item) for item in items]}
    if isinstance(value, list):
        return [pack(item) for item in value]
    if isinstance(value, Fraction):
        return {"Fraction": [value.numerator, value.denominator]}
    if isinstance(value, str):
        return str(value)  # numpy's strings too
    return value.item() if hasattr(value, "item") else value


def unpack(value):
    """Inverts `pack`."""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    (kind, items), *_ = value.items()
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in items}
    if kind == "Fraction":
        return Fraction(*items)
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](map(unpack, items))
