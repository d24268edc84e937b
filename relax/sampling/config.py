"""Sampling options and checks of a request. Names are those of transformers and TRL."""

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence

import numpy as np

from relax.errors import ConfigError
from relax.models.config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Options for sampling completions.

    Options that change the logits apply in the order of this list, which is that of transformers.

    Attributes:
      max_new_tokens: maximum tokens per completion (TRL's `max_completion_length`).
      logit_bias: value added to a logit, by token id; -inf bans the token.
      repetition_penalty: divides positive logits of tokens in the prompt or completion, and
        multiplies negative ones; 1: off. Keskar et al., CTRL, 2019, section 4.1.
      min_new_tokens: minimum tokens before an EOS token or a stop string ends a completion.
      temperature: divides the logits; 0: greedy decoding.
      top_k: samples from this number of most likely tokens; 0: off.
      top_p: samples from the smallest set of most likely tokens with this total probability; 1:
        off. Holtzman et al., The Curious Case of Neural Text Degeneration, 2020, section 3.1.
      min_p: samples from tokens at least this fraction as likely as the most likely one; 0: off.
      eos_token_ids: tokens that end a completion, as its last token.
      stop: texts that end a completion, with the token that completes one as its last; see
        `relax.sampling.stops`.
      coupled: draw so that a key gives mostly the same token for nearly the same logits, as drafts
        need (`relax.sampling.drafts`).
      n: completions per prompt.
      slots: rows decoded at the same time; further rows wait until some have finished.
      segment: tokens per row between two checks by the host for finished rows.
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
    coupled: bool = False
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
            f"temperature 0 always takes the most likely token, so {' and '.join(drawn)} would "
            "have no effect. Set a temperature, or remove the other options.",
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
    """Checks prompts and returns them as int32 arrays.

    Raises:
      ConfigError: there is no prompt, or one is empty or has a token that the model lacks.
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
    """Checks that a request fits the model.

    Args:
      limits: `[N]`, maximum new tokens over the rows of each prompt.
      decodes: whether there is a decoder, from ids to text.

    Raises:
      ConfigError: an option has an id outside the vocabulary, a prompt and its completion do not
        fit the model's positions, or there is no decoder for stop strings.
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
                f"stop strings {config.stop} need a decoder from ids to text: pass decode=.",
            ),
            (
                lengths[worst] + limits[worst] > room,
                f"prompt {worst} of {lengths[worst]} tokens and {limits[worst]} new ones do not "
                f"fit the {room} positions {why}. Shorten the prompt or lower max_new_tokens.",
            ),
        ]
    )


def max_positions(model: TransformerConfig) -> tuple[int, str]:
    """The maximum number of tokens per row, and the reason for this limit.

    If rotary frequencies depend on a row's length, cached keys would have to be rotated again once
    the row exceeds the original length, so that is the limit of such models.
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
        "Check that the tokenizer belongs to the model."
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
