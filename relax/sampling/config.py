"""Sampling options, and checks of a request. Names are those of transformers and TRL."""

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence

import numpy as np

from relax.errors import ConfigError
from relax.models.config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Options of drawing completions.

    Those about logits change the logits in the order of this list, which is that of transformers.

    Attributes:
      max_new_tokens: tokens of the longest completion (TRL's `max_completion_length`).
      logit_bias: token id -> what is added to its logit; -inf bans it.
      repetition_penalty: divides the positive logits of tokens in the prompt or the completion by
        it, and multiplies the negative ones; 1: off. Keskar et al., CTRL, 2019, section 4.1.
      min_new_tokens: no end-of-sequence token and no stop string ends a completion before it.
      temperature: divides the logits; 0: the most likely token, always.
      top_k: only so many of the most likely tokens are drawn from; 0: off.
      top_p: only the smallest set of most likely tokens that holds this share; 1: off. Holtzman et
        al., The Curious Case of Neural Text Degeneration, 2020, section 3.1.
      min_p: only tokens at least this share as likely as the most likely one; 0: off.
      eos_token_ids: any of them ends a completion, of which it is the last token.
      stop: texts that end a completion, of which the token that completes one is the last; see
        `relax.sampling.stops`.
      n: completions per prompt.
      slots: rows that decode at a time; more rows wait until some have ended.
      segment: tokens of a row between two looks of the host at what has ended.
    """

    max_new_tokens: int = 256
    logit_bias: Mapping[int, float] | None = None
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    eos_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    n: int = 1
    slots: int = 64
    segment: int = 32

    def __post_init__(self):
        _raise_first(self._problems())

    def _problems(self):
        for name in ("max_new_tokens", "n", "slots", "segment"):
            value = getattr(self, name)
            yield not _is_int(value) or value < 1, f"{name} must be at least 1, got {value!r}."
        for name in ("min_new_tokens", "top_k"):
            value = getattr(self, name)
            yield not _is_int(value) or value < 0, f"{name} must be at least 0, got {value!r}."
        t, p, m, r = self.temperature, self.top_p, self.min_p, self.repetition_penalty
        yield not 0 <= t < math.inf, f"temperature must be 0 (greedy) or above, got {t!r}."
        yield not 0 < p <= 1, f"top_p must be above 0 and at most 1, got {p!r}."
        yield not 0 <= m <= 1, f"min_p must be from 0 to 1, got {m!r}."
        yield not 0 < r < math.inf, f"repetition_penalty must be above 0, got {r!r}."
        drawn = [name for name, off in _DRAWN.items() if getattr(self, name) != off]
        yield (
            t == 0 and drawn,
            f"temperature 0 always takes the most likely token, so that {' and '.join(drawn)} "
            "would have no effect. Set a temperature, or leave out the rest.",
        )
        least, most = self.min_new_tokens, self.max_new_tokens
        yield least > most, f"min_new_tokens {least} is more than max_new_tokens {most}."
        yield (
            least and not self.eos_token_ids and not self.stop,
            f"min_new_tokens {least} has no effect without eos_token_ids or stop.",
        )
        yield isinstance(self.stop, str), f"stop must be a tuple of strings, got {self.stop!r}."
        empty = any(not isinstance(text, str) or not text for text in self.stop)
        yield empty, f"a stop string must hold at least one character, got {self.stop!r}."


_DRAWN = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "n": 1}


def checked_prompts(prompts: Sequence[Sequence[int]], model: TransformerConfig) -> list[np.ndarray]:
    """The prompts as int32 arrays.

    Raises:
      ConfigError: there is none, or one is empty or holds something that is no id of the model.
    """
    _raise_first([(not len(prompts), "there must be at least one prompt, got none.")])
    arrays = []
    for i, prompt in enumerate(prompts):
        array = np.asarray(prompt)
        wrong = array.ndim != 1 or (array.size and array.dtype.kind not in "iu")
        _raise_first(
            [
                (wrong, f"prompt {i} must be a list of token ids, got {prompt!r:.80}."),
                (not array.size, f"prompt {i} is empty. Give it at least one token, such as BOS."),
            ]
        )
        _raise_first([_id_problem(f"prompt {i}", array, model)])
        arrays.append(array.astype(np.int32))
    return arrays


def check_request(
    config: SamplingConfig,
    model: TransformerConfig,
    prompts: Sequence[np.ndarray],
    limits: np.ndarray,
    *,
    decodes: bool,
) -> None:
    """Refuses what does not fit the model.

    Args:
      limits: `[N]`, the most new tokens of any row of each prompt.
      decodes: whether there is a function from ids to text.

    Raises:
      ConfigError: an option is about an id past the vocabulary, or a prompt and its completion do
        not fit the model's positions, or a stop string has no decoder.
    """
    bias = config.logit_bias or {}
    room, why = max_positions(model)
    lengths = np.array([len(prompt) for prompt in prompts])
    worst = int((lengths + limits).argmax())
    V = model.vocab_size
    _raise_first(
        [
            _id_problem("eos_token_ids", np.array(config.eos_token_ids, np.int64), model),
            _id_problem("logit_bias", np.array(list(bias), np.int64), model),
            (
                any(math.isnan(b) or b == math.inf for b in bias.values()),
                f"logit_bias must hold numbers (or -inf, to ban an id), got {bias}.",
            ),
            (
                len(set(config.eos_token_ids) | {i for i, b in bias.items() if b == -math.inf})
                >= V,
                "eos_token_ids and the banned ids of logit_bias leave no token to draw.",
            ),
            (config.top_k > V, f"top_k {config.top_k} is more than the {V} tokens of the model."),
            (
                config.stop and not decodes,
                f"stop strings {config.stop} need a function from ids to text: pass decode=.",
            ),
            (
                lengths[worst] + limits[worst] > room,
                f"prompt {worst} of {lengths[worst]} tokens and {limits[worst]} new ones do not "
                f"fit the {room} positions {why}. Shorten the prompt or lower max_new_tokens.",
            ),
        ]
    )


def max_positions(model: TransformerConfig) -> tuple[int, str]:
    """Tokens of the longest row that can be decoded, and what sets this limit.

    Where rotary frequencies depend on a row's length, keys in the cache would have to turn again
    once the row grows past the original length; such models decode up to there.
    """
    room, why = model.max_position_embeddings, "of the model"
    for scaling in {kind.rope.scaling for kind in model.layers if kind.rope}:
        if scaling is not None and scaling.depends_on_length:
            original = scaling.original_max_position_embeddings
            if original <= room:
                room, why = original, f"up to which {scaling.kind} rotary positions stay the same"
    return room, why


def _id_problem(name: str, ids: np.ndarray, model: TransformerConfig) -> tuple[bool, str]:
    outside = ids[(ids < 0) | (ids >= model.vocab_size)]
    shown = outside[0] if outside.size else None
    return bool(outside.size), (
        f"{name} must hold ids from 0 to {model.vocab_size - 1}, got {shown}. "
        "Is the tokenizer that of the model?"
    )


def _is_int(value) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def _raise_first(problems) -> None:
    for broken, message in problems:
        if broken:
            raise ConfigError(message)
