"""A policy that is a table, for tests of what surrounds the model: it compiles in a moment.

Token v has the log-probability `table[v]`, whatever stands before it. Nothing asks that these are
normalised, so gradients with respect to the table are sums that a loop can make.

Axes: P prompts, G completions of a group, C tokens, V tokens in all.
"""

from types import SimpleNamespace

import numpy as np
import optax

from relax.losses.logprobs import TokenLogprobs
from relax.sampling import SamplingConfig
from relax.trainers import GRPOTrainer, PPOTrainer
from relax.trainers.rl.rollout import Rollout

V, EOS = 23, 22
TABLE = np.log(np.random.default_rng(5).dirichlet(np.full(V, 4.0))).astype(np.float32)


class Letters:
    """A tokenizer: a, b, c, ... and an end token."""

    eos_token_id = EOS

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(97 + i) for i in ids if i != EOS)


class Table:
    """What takes the place of model and sampler in a trainer."""

    def __init__(self, optimizer=None, *, reward_funcs=None, **options):
        options = {
            "num_generations": 4,
            "sampling": SamplingConfig(max_new_tokens=6),
            "params": {"table": TABLE},
        } | options
        super().__init__(
            SimpleNamespace(
                lora=None,
                attn_implementation="auto",
                config=SimpleNamespace(hidden_size=V, layers=()),
                param_dtype=np.float32,
            ),
            optimizer or optax.sgd(1.0),
            reward_funcs=reward_funcs or [lambda completions: [float(len(c)) for c in completions]],
            tokenizer=Letters(),
            **options,
        )

    def completion_logprobs(self, params, batch, rng=None):
        logprobs = params["table"][batch["completion_ids"]]
        return TokenLogprobs(logprobs, 0.1 * logprobs**2), None

    def generate(self, state, item, key, sampling=None):
        """Tokens drawn from the table by numpy, up to an end token."""
        import jax

        sampling = sampling or self.sampling
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
        table = np.asarray(self.model_params(state.params, state.frozen)["table"], np.float64)
        p = np.exp(table - table.max())
        G, C = sampling.n, sampling.max_new_tokens
        ids = rng.choice(V, (len(item["rows"]), G, C), p=p / p.sum())
        is_end = ids == EOS
        lengths = np.where(is_end.any(axis=2), is_end.argmax(axis=2) + 1, C)
        return rollout_of(ids, lengths, item["rows"])


class TableTrainer(Table, GRPOTrainer):
    """GRPO of the table: all is the trainer's own but the model and the sampler."""


class TablePPO(Table, PPOTrainer):
    """PPO of the table; the critic is a second one: token v is worth `kernel[v]`."""

    def evaluate(self, params, frozen, tokens, rng=None):
        logprobs, _ = self.completion_logprobs(self.model_params(params, frozen), tokens)
        return logprobs, self.completion_values(params, frozen, tokens), {}

    def completion_values(self, params, frozen, tokens):
        return params["value"]["score"]["kernel"][tokens["completion_ids"], 0]


def rollout_of(ids, lengths, rows=None, logprobs=None, seed=0) -> Rollout:
    """A rollout of given completions `[P, G, C]`; padding holds other tokens and NaN."""
    ids, lengths = np.array(ids, np.int32), np.array(lengths, np.int32)
    P, G, C = ids.shape
    rng = np.random.default_rng(seed)
    real = np.arange(C) < lengths[:, :, None]
    ids = np.where(real, ids, rng.integers(0, V, ids.shape)).astype(np.int32)
    logprobs = TABLE[ids] if logprobs is None else logprobs
    last = np.take_along_axis(ids, lengths[:, :, None] - 1, axis=2)[:, :, 0]
    texts = [
        [Letters().decode(ids[p, g, : lengths[p, g]].tolist()) for g in range(G)] for p in range(P)
    ]
    return Rollout(
        rows=rows or [{"prompt": f"p{p}"} for p in range(P)],
        prompt_ids=rng.integers(0, V, (P, 5)).astype(np.int32),
        prompt_lengths=rng.integers(2, 6, P).astype(np.int32),
        completion_ids=ids,
        completion_lengths=lengths,
        mask=real,
        logprobs=np.where(real, logprobs, np.nan).astype(np.float32),
        branches=np.zeros((P, G, C), np.int32),
        finish=np.where(last == EOS, "eos", "length"),
        texts=texts,
        environment_rewards=np.full((P, G), np.nan),
        messages=[[None] * G for _ in range(P)],
        episodes=[[{}] * G for _ in range(P)],
        sources=np.full(P, ""),
        columns=[[{}] * G for _ in range(P)],
    )


def items_of(count: int, prompts: int = 2, **columns) -> list[dict]:
    """Loader items of so many prompts."""
    return [
        {
            "prompt_ids": [[1 + i % 20, 2 + p] for p in range(prompts)],
            "rows": [{"prompt": f"{i}{p}"} | columns for p in range(prompts)],
        }
        for i in range(count)
    ]
