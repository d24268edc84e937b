"""Completions of an item's prompts: of one turn, or of episodes with tools and environments."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from relax.data.chat_turns import ChatTurns
from relax.data.prompts import Prompts
from relax.errors import ConfigError, DataError
from relax.rewards.episode_runner import EpisodeRunner
from relax.rewards.protocol import check_plain
from relax.sampling import SamplingConfig, generate, stop_decoder
from relax.trainers.rl.drafts import Drafts
from relax.trainers.rl.episodes import rollout_episodes
from relax.trainers.rl.partners import ChatPartner, Partner, TextPartner
from relax.trainers.rl.rollout import Rollout, make_rollout
from relax.trainers.rl.rollout_func import RolloutFunction


class Agents(Protocol):
    """What makes completions by itself, see `relax.serving.agents`."""

    runner: Any

    def rollout(self, model, params, item: dict, key, sampling: SamplingConfig) -> Rollout:
        """Makes `sampling.n` completions of every prompt of an item."""


Maker = Partner | Agents | RolloutFunction  # of completions, in place of the sampler alone


def make_partner(
    tokenizer,
    eos_token_ids: Sequence[int],
    tools: Sequence[Callable | str] | EpisodeRunner | Partner,
    environment_factory: Callable | str | None = None,
    *,
    tool_format: str | None = None,
    max_tool_calling_iterations: int | None = None,
) -> Partner | None:
    """What answers the model; None without tools and environment.

    Args:
      tools: functions or names of them; or a runner or a partner, which has an environment already.
      tool_format: how the model writes calls of tools; None: found from the chat template.

    Raises:
      ConfigError: a tool, the environment or the chat template cannot be used.
    """
    made = isinstance(tools, EpisodeRunner | ChatPartner | TextPartner)
    if made and environment_factory is not None:
        raise ConfigError("an EpisodeRunner has its own environment: leave out the other one.")
    if isinstance(tools, ChatPartner | TextPartner):
        return tools
    if isinstance(tools, EpisodeRunner):
        runner = tools
    elif tools or environment_factory is not None:
        runner = EpisodeRunner(tools, environment_factory)
    else:
        return None
    given = {"tool_format": tool_format, "max_tool_calling_iterations": max_tool_calling_iterations}
    names = [name for name, value in given.items() if value is not None]
    if names and not runner.info.tools:
        raise ConfigError(
            f"{' and '.join(names)} has no effect: environment {runner.info.name!r} has no tools. "
            "Leave it out."
        )
    if runner.info.kind == "text":
        return TextPartner(runner, _encoder(tokenizer), decoder(tokenizer))
    turns = ChatTurns(tokenizer, eos_token_ids, runner.info.tools, tool_format=tool_format)
    return ChatPartner(runner, turns, max_tool_calling_iterations)


def tools_of(partner: Partner | None) -> tuple[dict, ...]:
    """The schemas that prompts are rendered with."""
    return () if partner is None else partner.runner.info.tools


def make_maker(
    tokenizer,
    *arguments,
    agents: Agents | None = None,
    rollout_func: Callable | None = None,
    async_rollouts: int = 0,
    **options,
) -> Maker | None:
    """What makes completions; None: the sampler alone.

    Args:
      tokenizer, *arguments, **options: of `make_partner`.
      agents, rollout_func, async_rollouts: as for `RLTrainer`.

    Raises:
      ConfigError: `rollout_func` is not the only one, or rollouts are drawn ahead; or as for
        `make_partner` and `RolloutFunction`.
    """
    made = agents or make_partner(tokenizer, *arguments, **options)
    if rollout_func is None:
        return made
    if made is not None or async_rollouts:
        other = "async_rollouts" if made is None else "tools, environment_factory and agents"
        raise ConfigError(f"rollout_func excludes {other}: leave one of the two out.")
    return RolloutFunction(rollout_func, tokenizer)


def gives_rewards(partner: Maker | None) -> bool:
    """Whether episodes get a reward that is not from a reward function."""
    if partner is None or isinstance(partner, RolloutFunction):
        return False
    return partner.runner.info.kind != "tools"


def check_prompts(partner: Partner, prompts: Prompts) -> None:
    """Refuses rows that a partner cannot play, and an environment that cannot play the first one.

    Raises:
      DataError: messages are answered, and the prompts are texts.
      ConfigError: the environment raises, or returns what it may not.
    """
    if isinstance(partner, ChatPartner) and not prompts.conversational:
        raise DataError(
            "tools and environments that answer messages need prompts of messages, and the prompts "
            'are texts: write [{"role": "user", "content": prompt}].'
        )
    for name, column in prompts.facts.items():
        if (i := column.odd_row) is not None:
            check_plain(prompts.rows[i][name], f"row {i}: column {name!r}")
    partner.runner.probe(prompts.rows[0])


def sample_rollout(
    model,
    params,
    item: dict,
    key,
    sampling: SamplingConfig,
    tokenizer,
    partner: Maker | None,
    drafts: Drafts | None = None,
) -> Rollout:
    """Samples `sampling.n` completions of every prompt of an item.

    Args:
      model, params: the policy; `params` are all parameters.
      item: `prompt_ids` and `rows` of P prompts.
      key: the rollout's key.
      partner: what answers the model; None: completions have one turn.
      drafts: earlier completions, of one turn; None: they are not reused.
    """
    stops, decode = stop_decoder(tokenizer), decoder(tokenizer)
    if partner is None:
        sample = generate if drafts is None else drafts.sample
        out = sample(model, params, item["prompt_ids"], key, sampling, decode=stops)
        return make_rollout(item, out, sampling, decode)
    if not isinstance(partner, ChatPartner | TextPartner):
        return partner.rollout(model, params, item, key, sampling)
    found = rollout_episodes(model, params, item, key, sampling, partner, stops)
    return make_rollout(
        item | {"prompt_ids": found.prompt_ids},
        found.output,
        sampling,
        decode,
        found.rewards,
        [e.messages[e.first :] or None for e in found.episodes],
        [e.record() for e in found.episodes],
    )


def decoder(tokenizer) -> Callable[[Sequence[int]], str]:
    """Makes the function from ids to text without special tokens."""

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    return decode


def _encoder(tokenizer) -> Callable[[str], list[int]]:
    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return encode
