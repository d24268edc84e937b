"""Reward models as reward functions: `--reward_funcs model:DIR`.

    score = ModelReward("outputs/reward/final", tokenizer)
    GRPOTrainer(model, optimizer, reward_funcs=[score, length_penalty], tokenizer=tokenizer)

It reads prompts and completions as in training: prompts as the chat template renders them,
completions token for token as the policy sampled them, and after an end of turn the tokens that the
template adds there. If the policy's tokenizer has other tokens, the text is tokenised again. It
runs compiled in the trainer's process.

Axes: N completions, B completions per batch, T tokens of prompt and completion.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from relax.data import load_tokenizer
from relax.data.limits import DEFAULT, Limits
from relax.data.templates import render_template
from relax.data.tokens import tokenize, with_end_token
from relax.errors import ConfigError
from relax.models.heads import scores
from relax.models.huggingface.classifiers import load_classifier
from relax.models.huggingface.directories import find_directory
from relax.rewards.protocol import text_of

PREFIX = "model:"
TOKENS = 8192  # approximate tokens (rows times length) per batch


class ModelReward:
    """Reward function that scores completions with a sequence classifier of one label.

    Args:
      path: the classifier's directory, with its tokenizer.
      tokenizer: the policy's tokenizer.
      end_ids: ids that end a turn of the policy; None: the end token of `tokenizer`.
      dtype, param_dtype: types of the computation and of the parameters.
      limits: limits on rendering conversations.

    Attributes:
      note: a remark for the user on how completions are tokenised, or None.
    """

    in_process = True  # see `relax.rewards.runner`

    def __init__(
        self,
        path,
        tokenizer,
        end_ids: Sequence[int] | None = None,
        *,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        limits: Limits = DEFAULT,
    ):
        directory = find_directory(path)
        self.__name__ = Path(path).name or directory.resolve().name
        self.model, self.params = load_classifier(directory, dtype, param_dtype=param_dtype)
        self.tokenizer = load_tokenizer(directory)
        self.end_ids = frozenset([tokenizer.eos_token_id] if end_ids is None else end_ids)
        self.reads_tokens = self.tokenizer.get_vocab() == tokenizer.get_vocab()
        self.note = None
        if not self.reads_tokens:
            self.note = (
                f"reward model {self.__name__!r} has other tokens than the policy: it tokenises "
                "the text of prompts and completions again."
            )
        self._limits = limits
        self._suffix: list[int] | None = None
        self._score_batch = jax.jit(self._scores)

    def __call__(
        self,
        prompts: list,
        completions: list,
        completion_ids: list | None = None,
        tools: list | None = None,
        chat_template_kwargs: list | None = None,
    ) -> list[float]:
        """Scores texts or lists of messages; other columns are passed to the chat template."""
        none = [None] * len(prompts)
        columns = (completion_ids or none, tools or none, chat_template_kwargs or none)
        rows = [
            self.encode(prompt, completion, ids, {"tools": tool, "chat_template_kwargs": how})
            for prompt, completion, ids, tool, how in zip(
                prompts, completions, *columns, strict=True
            )
        ]
        longest, limit = max(map(len, rows)), self.model.config.max_position_embeddings
        if longest > limit:
            raise ValueError(
                f"prompt and completion have {longest} tokens, but the reward model "
                f"{self.__name__!r} has {limit} positions: lower max_completion_length"
            )
        out = np.zeros(len(rows), np.float32)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        while order:
            T = _bucket(len(rows[order[-1]]), limit)
            size = min(max(TOKENS // T, 1), _bucket(len(order)))
            chosen, order = order[-size:], order[:-size]
            ids = np.zeros((size, T), np.int32)
            lengths = np.ones(size, np.int32)  # fillers too: every row needs a last token
            for row, i in enumerate(chosen):
                ids[row, : len(rows[i])] = rows[i]
                lengths[row] = len(rows[i])
            out[chosen] = np.asarray(self._score_batch(self.params, ids, lengths))[: len(chosen)]
        return out.tolist()

    def encode(
        self,
        prompt,
        completion,
        completion_ids: Sequence[int] | None = None,
        row: dict | None = None,
    ) -> list[int]:
        """Encodes prompt and completion; without ids the completion counts as ended."""
        row = row or {}
        ended = completion_ids is None or (
            len(completion_ids) > 0 and completion_ids[-1] in self.end_ids
        )
        if completion_ids is not None and self.reads_tokens:
            if not isinstance(prompt, list):
                return [*self._ids(prompt, special=True), *completion_ids]
            ids = self._ids(self._render(prompt, row, add_generation_prompt=True))
            return [*ids, *completion_ids, *(self._after_end() if ended else ())]
        if not isinstance(prompt, list):
            text = text_of(completion)
            if ended:  # as in the rows on which reward models are trained
                text = with_end_token(text, self.tokenizer.eos_token)
            return self._ids(prompt + text, special=True)
        if ended:
            return self._ids(self._render([*prompt, *completion], row))
        before = self._render(prompt, row, add_generation_prompt=True)
        return self._ids(before + text_of(completion))

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return tokenize(self.tokenizer, [text], special=special)[0]

    def _render(self, messages: list[dict], row: dict, **how) -> str:
        where = f"reward model {self.__name__!r}"
        return render_template(self.tokenizer, messages, row, where, limits=self._limits, **how)

    def _after_end(self) -> list[int]:
        """The tokens that the template adds after a completion, such as a line break."""
        if self._suffix is None:
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            ids = self._ids(self._render(turns, {}))
            ends = [i for i, token in enumerate(ids) if token in self.end_ids]
            self._suffix = ids[ends[-1] + 1 :] if ends else []
        return self._suffix

    def _scores(self, params, ids, lengths):
        segment_ids = (jnp.arange(ids.shape[1])[None, :] < lengths[:, None]).astype(jnp.int32)
        hidden: Any = self.model.apply(
            {"params": params}, ids, None, segment_ids, method="hidden_states"
        )
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)  # [B, 1, D]
        return scores(params, last)[:, 0]


def reward_functions(specs: list, tokenizer, end_ids, **options) -> list:
    """Replaces each `model:DIR` by a `ModelReward` with these options; other names stay."""
    return [
        ModelReward(_directory(spec), tokenizer, end_ids, **options)
        if isinstance(spec, str) and spec.startswith(PREFIX)
        else spec
        for spec in specs
    ]


def _directory(spec: str) -> str:
    path = spec.removeprefix(PREFIX)
    if not path:
        raise ConfigError(f"reward {spec!r} names no directory: write {PREFIX}DIR.")
    return path


def _bucket(length: int, limit: int | None = None) -> int:
    """Rounds a size up to a power of two (>= 8).

    >>> [_bucket(n) for n in (1, 9, 100)], _bucket(100, 120)
    ([8, 16, 128], 120)
    """
    size = 8
    while size < length:
        size *= 2
    return size if limit is None else min(size, limit)
