"""Agents in training: episodes are what was sampled, whenever it was, and failures are told."""

import jax
import numpy as np
import optax
import pytest
from grpo_runs import SCRIPT, call, make_job, outcome, start
from runs import finish, flags, killed

pytest.importorskip("starlette", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from relax.errors import ConfigError, RewardError  # noqa: E402
from relax.rewards import agents as runner_module  # noqa: E402
from relax.rewards.agents import AgentRunner  # noqa: E402
from relax.sampling import SamplingConfig  # noqa: E402
from relax.serving.agents import Agents  # noqa: E402
from relax.trainers import GRPOTrainer  # noqa: E402
from tests.test_serving import policy, tokenizer  # noqa: E402, F401

FILE = f"{__file__.rpartition('/')[0]}/agents.py"


@pytest.fixture
def runner():
    made = []

    def make(name, timeout_s=60.0):
        made.append(AgentRunner(f"{FILE}:{name}", timeout_s))
        return made[-1]

    yield make
    for one in made:
        one.close()


def jobs(count):
    return [({"base_url": "u", "api_key": "k", "model": "m"}, {"n": n}) for n in range(count)]


def test_an_agent_gets_a_client_and_a_row_and_returns_reward_and_messages(runner):
    found = runner("names").run(jobs(5), at_once=2)
    assert [result.reward for result in found] == [0, 1, 2, 3, 4]
    assert found[3].messages == [{"role": "user", "content": "m u"}]


def test_an_agent_that_fails_costs_its_own_episode(runner):
    found = runner("fails", timeout_s=0.5).run(jobs(5), at_once=5)
    assert [result.reward for result in found] == [0, None, None, None, 4]
    errors = [result.error for result in found]
    assert "raised KeyError: 'no'" in errors[1] and "agents.py" in errors[1]
    assert "did not end within 0.5 s" in errors[2]
    assert "must return a number, messages, an object" in errors[3]


def test_an_agent_that_blocks_its_process_is_killed(runner, monkeypatch):
    monkeypatch.setattr(runner_module, "GRACE_S", 0.5)
    found = runner("blocks", timeout_s=0.5).run(jobs(4), at_once=1)
    assert [result.reward for result in found] == [0, None, 2, 3]
    assert "hung or ended" in found[1].error


def test_what_can_hardly_be_reported_is_the_error_of_its_own_episode_at_once(runner):
    found = runner("badly").run(jobs(5), at_once=5)
    assert [result.reward for result in found] == [0, None, None, None, 4]
    assert "cannot be written as JSON: an object of type object" in found[1].error
    assert "raised Unprintable (" in found[2].error
    assert found[3].messages == [{"role": "assistant", "content": None, "tool_calls": []}]


def test_an_agent_that_exits_leaves_those_beside_it_alone(runner):
    found = runner("exits").run(jobs(6), at_once=6)
    assert [result.reward for result in found] == [0, None, None, None, 4, 5]
    errors = [result.error for result in found[1:4]]
    names = ["SystemExit", "SystemExit", "KeyboardInterrupt"]
    for error, name in zip(errors, names, strict=True):
        assert f"raised {name}" in error and "agents.py" in error


def test_a_time_limit_of_the_agents_own_is_not_that_of_the_run(runner):
    made = runner("times_out", timeout_s=0.5)
    process = made._process
    found = made.run(jobs(2), at_once=2)
    assert "raised TimeoutError" in found[1].error and made._process is process
    found = made.run(jobs(4), at_once=4)
    assert [result.reward for result in found] == [0, None, None, 3]
    assert "did not end within 0.5 s" in found[2].error


@pytest.mark.parametrize("name", ["async_object", "decorated"])
def test_whatever_returns_an_awaitable_is_an_async_agent(runner, name):
    assert [result.reward for result in runner(name).run(jobs(2), at_once=2)] == [0, 1]


def test_a_plain_agent_may_run_out_of_items(runner):
    (found,) = runner("stops").run(jobs(1), at_once=1)
    assert "raised StopIteration" in found.error


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (f"{FILE}:nothing", "has no object 'nothing'"),
        (f"{FILE}:one_argument", "must take two arguments, the client and the row"),
        ("builtins:max", "has no signature that can be read"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
        (f"{FILE}:asyncio", "is a module, not a function"),
    ],
)
def test_what_is_no_agent_is_refused_in_one_sentence(spec, reason):
    with pytest.raises(ConfigError, match=reason):
        AgentRunner(spec)


@pytest.fixture
def trainer(policy, tokenizer):  # noqa: F811
    made = []

    def make(name, **options):
        agents = Agents(f"{FILE}:{name}", tokenizer, max_length=64)
        made.append(agents)
        model, params = policy
        sampling = SamplingConfig(max_new_tokens=8, temperature=0.9, slots=4)
        options = {"reward_funcs": [], "num_generations": 2, "sampling": sampling} | options
        return GRPOTrainer(
            model,
            optax.sgd(0.1),
            params=params,
            tokenizer=tokenizer,
            agents=agents,
            **options,
        )

    yield make
    for agents in made:
        agents.close()


ITEM = {
    "prompt_ids": [[2, 60], [2, 61], [2, 62]],
    "rows": [{"prompt": text, "answer": "3"} for text in ("12+", "2+2", "3+4")],
}


def rollout(trainer):
    state = trainer.create_train_state(jax.random.key(0))
    return state, trainer.collect(state, ITEM, jax.random.key(5))


@pytest.mark.filterwarnings("ignore:.*have no effect in training")
@pytest.mark.parametrize("name", ["in_turns", "several_at_once"])
def test_episodes_do_not_depend_on_the_clock_and_logprobs_are_the_policys(trainer, name):
    made = trainer(name)
    state, first = rollout(made)
    _, second = rollout(made)
    one, other = first.rollout, second.rollout
    for field in ("prompt_ids", "completion_ids", "mask", "branches", "logprobs", "finish"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field), err_msg=field)
    np.testing.assert_array_equal(first.rewards, second.rewards)
    assert np.isfinite(first.rewards).all() and one.texts == other.texts
    assert one.branches.max() >= 1  # the chat of its own, or those that raced
    expected = made.token_logprobs(made.model_params(state.params, state.frozen), one)
    assert one.mask.sum() > 6
    np.testing.assert_allclose(one.logprobs[one.mask], expected[one.mask], atol=1e-4)


def test_turns_of_one_chat_are_one_branch_whose_sampled_tokens_alone_are_trained(
    trainer,
    tokenizer,  # noqa: F811
):
    _, collected = rollout(trainer("in_turns"))
    found = collected.rollout
    for p, g in np.ndindex(3, 2):
        length, mask = found.completion_lengths[p, g], found.mask[p, g]
        ids, branch = found.completion_ids[p, g, :length], found.branches[p, g, :length]
        whole = [
            tokenizer.decode([*found.prompt_ids[p, : found.prompt_lengths[p]], *ids[branch == b]])
            for b in range(branch.max() + 1)
        ]
        # A turn that ended by its limit has no end token, which the template writes behind it.
        assert any(text.startswith("<user>7<assistant>") for text in whole)
        assert any(text.startswith(f"<user>{ITEM['rows'][p]['prompt']}<") for text in whole)
        assert 3 <= mask[:length].sum() <= 8 + 4 + 3


@pytest.mark.filterwarnings("ignore:.*have no effect in training")
def test_an_update_trains_on_all_branches(trainer):
    made = trainer("several_at_once")
    state = made.create_train_state(jax.random.key(0))
    for logged in made.make_batches(state, ITEM):
        assert (logged.batch["places"] >= 0).any()
        new, metrics = made.update(state, logged.batch)
        assert np.isfinite(float(metrics["loss"]))
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), state.params, new.params)
    assert max(jax.tree.leaves(moved)) > 0


def test_failed_episodes_are_counted_and_not_trained_on(trainer):
    def long(completions, **columns):
        return [float(len(c)) if isinstance(c, str) else 1.0 for c in completions]

    made = trainer("some_fail", reward_funcs=[long])
    with pytest.warns(UserWarning, match="failed in 4 of 6 episodes.* this row is too hard"):
        _, collected = rollout(made)
    assert collected.rollout.finish.tolist()[:2] == [["error"] * 2] * 2
    assert np.isnan(collected.rewards[:2]).all() and np.isfinite(collected.rewards[2]).all()
    assert sum(e["failed"] for group in collected.rollout.episodes for e in group) == 4


def test_an_agent_that_always_fails_ends_the_run(trainer):
    with pytest.raises(RewardError, match="all 6 episodes of agent .* it never asked the model"):
        rollout(trainer("idle"))


@pytest.mark.programs
@pytest.mark.filterwarnings("ignore:.*have no effect in training")
def test_a_run_that_is_resumed_ends_in_the_same_bytes(tmp_path):
    """Calls that race at random times give the same run, killed or not."""
    job = make_job(tmp_path)
    del job["reward_funcs"], job["reward_weights"]
    job |= {"agent": f"{FILE}:several_at_once", "agent_max_length": 64, "rollout_slots": 4}
    assert call(**job, output_dir=tmp_path / "whole") == 0
    arguments = [*flags(**job), f"--output_dir={tmp_path / 'killed'}", "--resume=auto"]
    child = start(*arguments, fault="after_rename:1")
    assert killed(child), (child.stdout, child.stderr)
    finish(*arguments, script=SCRIPT)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
