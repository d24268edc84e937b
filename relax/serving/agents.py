"""Rollouts by agents: any program that asks OpenAI's API works with the policy.

The endpoint listens at this machine for the time of a rollout. Every episode has an address and a
key of its own, so that the endpoint knows whose call it answers.
"""

import dataclasses
import math
import secrets
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from relax import parallel
from relax.data import Limits
from relax.data.batching import bucket
from relax.errors import ConfigError, RewardError
from relax.rewards.agents import AgentResult, AgentRunner
from relax.sampling import Requests, SampleOutput, SamplingConfig, stop_decoder
from relax.serving.endpoint import Endpoint
from relax.serving.recording import Branch, EpisodeSession, branches, common_prefix
from relax.trainers.rl.rollout import Rollout, make_rollout

# Folded into a rollout's key to separate the keys of agents' calls from others.
AGENT_STREAM = np.uint32(105)


class AgentEpisode(NamedTuple):
    """What became of an episode.

    Attributes:
      result: what the agent returned.
      made: the branches of what it had sampled.
      text: its last message of the assistant; or else the answer to its longest prompt.
      reason: why that answer ended; `error` if the agent failed.
      calls: number of calls.
      overridden: calls whose own sampling settings had no effect.
    """

    result: AgentResult
    made: list[Branch]
    text: str
    reason: str
    calls: int
    overridden: int

    def record(self) -> dict:
        """What the table of completions shows of it."""
        error = self.result.error
        return {
            "turns": self.calls,
            "tool_calls": 0,
            "tool_failures": 0,
            "failed": error is not None,
            "errors": [error] if error else [],
            "branches": len(self.made),
        }


class Agents:
    """Runs an agent against the policy; see `relax.rewards.agents.AgentRunner`.

    Args:
      spec, timeout_s: of the runner.
      tokenizer: the policy's.
      max_length: most tokens of a call's prompt and completion; None: the model's positions.
      limits: on messages and rendering.
    """

    def __init__(
        self,
        spec: str,
        tokenizer,
        *,
        timeout_s: float = 600.0,
        max_length: int | None = None,
        limits: Limits = Limits(),  # noqa: B008
    ):
        try:
            from relax.serving import app, server
        except ImportError as error:
            raise ConfigError(
                f"agents need the packages starlette and uvicorn, and {error.name} is not "
                "installed: pip install 'relax-trainers[serve]'."
            ) from error
        self._app, self._server = app, server
        self.tokenizer, self.max_length, self.limits = tokenizer, max_length, limits
        self.runner = AgentRunner(spec, timeout_s)

    def close(self) -> None:
        self.runner.close()

    def play(
        self, model, params, rows: Sequence[dict], key: jax.Array, sampling: SamplingConfig
    ) -> list[AgentEpisode]:
        """Runs `sampling.n` episodes of every row, in the order of the rows.

        Raises:
          ConfigError: there are several devices, which agents do not support.
          RewardError: every agent failed.
        """
        _check(sampling)
        jobs = [(p, g) for p in range(len(rows)) for g in range(sampling.n)]
        key = jax.random.fold_in(key, AGENT_STREAM)
        sessions = {
            secrets.token_urlsafe(18): EpisodeSession(
                jax.random.fold_in(jax.random.fold_in(key, p), g),
                sampling.temperature,
                sampling.top_p,
                sampling.max_new_tokens,
            )
            for p, g in jobs
        }
        sampler = Requests(
            model,
            params,
            sampling.eos_token_ids,
            stop_decoder(self.tokenizer),
            slots=min(sampling.slots, len(jobs)),
            max_length=self.max_length,
            fixed=True,
        )
        endpoint = Endpoint(sampler, self.tokenizer, None, max_queue_size=2**31, limits=self.limits)
        web = self._app.make_app(endpoint, local_only=True, sessions=sessions)
        try:
            with (
                self._server.listen("127.0.0.1", 0) as sock,
                self._server.running(web, sock) as url,
            ):
                clients = [
                    {"base_url": f"{url}/{name}/v1", "api_key": name, "model": "policy"}
                    for name in sessions
                ]
                each = [(clients[i], dict(rows[p])) for i, (p, _) in enumerate(jobs)]
                results = self.runner.run(each, at_once=len(sampler.slots))
                for session in sessions.values():
                    session.is_open = False
                endpoint.worker.close()
        finally:
            endpoint.close()
        episodes = [
            self._episode(session, result, endpoint)
            for session, result in zip(sessions.values(), results, strict=True)
        ]
        if all(episode.result.error for episode in episodes):
            raise RewardError(
                f"all {len(episodes)} episodes of agent {self.runner.spec!r} failed: "
                f"{episodes[0].result.error}."
            )
        return episodes

    def _episode(
        self, session: EpisodeSession, result: AgentResult, endpoint: Endpoint
    ) -> AgentEpisode:
        calls = sorted(session.calls, key=lambda call: (len(call.prompt), call.prompt, call.tokens))
        if not calls and result.error is None:
            result = result._replace(error="it never asked the model")
        said = [m for m in result.messages or () if m["role"] == "assistant"]
        if said:
            text = str(said[-1].get("content") or "")
        else:
            text = endpoint.text.text(calls[-1].tokens) if calls else ""
        reason = "error" if result.error else calls[-1].reason
        made = branches(calls)
        return AgentEpisode(result, made, text, reason, len(calls), session.overridden)

    def rollout(
        self, model, params, item: dict, key: jax.Array, sampling: SamplingConfig
    ) -> Rollout:
        """A rollout of an item's rows, in place of sampled completions.

        Args:
          model, params: the policy; `params` are all parameters.
          item: `prompt_ids` and `rows` of P prompts.
          key: the rollout's key.
          sampling: its `max_new_tokens` limits each call.
        """
        rows, n = item["rows"], sampling.n
        episodes = self.play(model, params, rows, key, sampling)
        _warn(episodes)
        laid = lay_out_episodes(episodes, n)
        # A group without any sampled token keeps its prompt, for the table of completions.
        pairs = zip(laid.lengths, laid.prompt_ids, item["prompt_ids"], strict=True)
        prompts = [shared if lengths.any() else given for lengths, shared, given in pairs]
        output = SampleOutput(
            _by_row(laid.tokens),
            _by_row(laid.logprobs),
            _by_row(laid.mask),
            laid.lengths.reshape(-1),
            tuple(episode.reason for episode in episodes),
        )
        rewards = [episode.result.reward for episode in episodes]
        rollout = make_rollout(
            item | {"prompt_ids": prompts},
            output,
            dataclasses.replace(sampling, max_new_tokens=laid.tokens.shape[-1]),
            lambda ids: "",
            np.array([math.nan if r is None else r for r in rewards]),
            [episode.result.messages for episode in episodes],
            [episode.record() for episode in episodes],
            branches=_by_row(laid.branches),
        )
        texts = [episode.text for episode in episodes]
        by_prompt = [texts[i : i + n] for i in range(0, len(texts), n)]
        return dataclasses.replace(rollout, texts=by_prompt)


def _check(sampling: SamplingConfig) -> None:
    """Refuses what calls of agents are not sampled with."""
    if parallel.layout() is not None:
        raise ConfigError("agents need a single device, and the run has a mesh of several.")
    off: dict[str, Any] = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "logit_bias": None}
    off |= {"min_new_tokens": 0, "stop": ()}
    given = [name for name, value in off.items() if getattr(sampling, name) != value]
    if given:
        raise ConfigError(
            f"calls of agents are sampled with temperature and top_p alone, got {given[0]} "
            f"{getattr(sampling, given[0])!r}. Leave it out; an agent may give its own stop."
        )


def _by_row(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])


def _warn(episodes: Sequence["AgentEpisode"]) -> None:
    """Warns of agents that failed, and of settings that had no effect."""
    errors = [episode.result.error for episode in episodes if episode.result.error]
    if errors:
        warnings.warn(
            f"the agent failed in {len(errors)} of {len(episodes)} episodes, which are not trained "
            f"on; the first: {errors[0]}",
            stacklevel=2,
        )
    overridden = sum(episode.overridden for episode in episodes)
    if overridden:
        warnings.warn(
            f"{overridden} calls of the agent set a temperature, top_p or seed, which have no "
            "effect in training: the run's apply.",
            stacklevel=2,
        )


class Laid(NamedTuple):
    """Episodes of P prompts as arrays, `[P, n, C]` per token; see `lay_out_episodes`."""

    prompt_ids: list[list[int]]  # what all branches of a prompt share
    tokens: np.ndarray  # int32
    logprobs: np.ndarray  # float32
    mask: np.ndarray  # bool: sampled and trained
    branches: np.ndarray  # int32: the number of a token's branch
    lengths: np.ndarray  # [P, n] int32


def lay_out_episodes(episodes: Sequence[AgentEpisode], n: int) -> Laid:
    """Arranges episodes by prompt: branches one after another, without what they share."""
    groups = [episodes[i : i + n] for i in range(0, len(episodes), n)]
    P = len(groups)
    prompt_ids = []
    for group in groups:
        made = [branch for episode in group for branch in episode.made]
        prompt_ids.append(list(made[0].ids[: common_prefix(made)]) if made else [])
    lengths = np.array(
        [
            [sum(len(b.ids) - len(prompt) for b in episode.made) for episode in group]
            for prompt, group in zip(prompt_ids, groups, strict=True)
        ],
        np.int32,
    )
    shape = (P, n, bucket(int(lengths.max())))
    tokens, number = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    logprobs, mask = np.zeros(shape, np.float32), np.zeros(shape, bool)
    for p, g in np.ndindex(P, n):
        first, shared = 0, len(prompt_ids[p])
        for i, branch in enumerate(groups[p][g].made):
            last = first + len(branch.ids) - shared
            tokens[p, g, first:last] = branch.ids[shared:]
            logprobs[p, g, first:last] = branch.logprobs[shared:]
            mask[p, g, first:last] = branch.sampled[shared:]
            number[p, g, first:last] = i
            first = last
    return Laid(prompt_ids, tokens, logprobs, mask, number, lengths)
