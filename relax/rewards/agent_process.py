"""The process in which agents run: loads the function, runs many calls at once, reports results.

Messages as in `relax.rewards.workers.messages`. In: {"agent"}, then a job each,
{"id", "client", "row", "timeout_s"}. Out: {"name"} or {"error"}, then for each job
{"id", "result"} or {"id", "error"}.
"""

import asyncio
import inspect
import os
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from relax.config.imports import load_object
from relax.errors import ConfigError
from relax.rewards.workers import descendants, messages

THREADS = 256  # of agents that are plain functions


class AgentClient(dict):
    """What an agent gets: `base_url`, `api_key` and `model`, as keys and as attributes."""

    def __getattr__(self, name: str):
        if name in self:
            return self[name]
        raise AttributeError(f"an agent's client has {', '.join(self)}, not {name!r}")


def main() -> None:
    """Serves one trainer over standard input and output until the trainer's end closes."""
    inbox, outbox = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # agents may print
    descendants.adopt()
    try:
        setup = messages.read(inbox)
        if setup is None:
            return
        try:
            agent = load_agent(setup["agent"])
        except ConfigError as error:
            messages.write(outbox, {"error": str(error)})
            return
        messages.write(outbox, {"name": setup["agent"]})
        asyncio.run(_serve(agent, inbox, outbox))
    except BrokenPipeError:
        pass
    finally:
        descendants.kill()
        os._exit(0)  # a thread of an agent may never end


def load_agent(spec: str) -> Callable:
    """Finds a function, `package.module:function` or `path/to/file.py:function`.

    Raises:
      ConfigError: there is none, or it does not take a client and a row.
    """
    path, colon, name = spec.rpartition(":")
    dotted = spec if not colon or path.endswith(".py") or os.sep in path else f"{path}.{name}"
    function = load_object(dotted, "agent")
    if not callable(function):
        raise ConfigError(f"agent {spec!r} is a {type(function).__name__}, not a function.")
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        raise ConfigError(
            f"agent {spec!r} must take two arguments, the client and the row: {error}."
        ) from None
    return function


async def _serve(agent: Callable, inbox: int, outbox: int) -> None:
    loop, tasks = asyncio.get_running_loop(), set()
    jobs: asyncio.Queue = asyncio.Queue()
    threads = ThreadPoolExecutor(THREADS)

    def receive() -> None:
        while (job := messages.read(inbox)) is not None:
            loop.call_soon_threadsafe(jobs.put_nowait, job)
        os._exit(0)  # the trainer has gone

    threading.Thread(target=receive, daemon=True).start()
    while True:
        job = await jobs.get()
        task = asyncio.create_task(_run(agent, job, threads, outbox))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def _run(agent: Callable, job: dict, threads: ThreadPoolExecutor, outbox: int) -> None:
    client = AgentClient(job["client"])
    try:
        if inspect.iscoroutinefunction(agent):
            made = agent(client, job["row"])
        else:
            loop = asyncio.get_running_loop()
            made = loop.run_in_executor(threads, agent, client, job["row"])
        value = await asyncio.wait_for(made, job["timeout_s"])
        answer: dict = {"result": checked_result(value)}
    except TimeoutError:
        answer = {"error": f"it did not end within {job['timeout_s']:g} s", "timeout": True}
    except BaseException as error:  # also SystemExit: an agent never ends the run
        last = traceback.extract_tb(error.__traceback__)[-1]
        what = f"raised {type(error).__name__}: {str(error)[:500]}"
        answer = {"error": f"{what} ({last.filename}, line {last.lineno})"}
    messages.write(outbox, {"id": job["id"]} | answer)


def checked_result(value) -> dict:
    """What an agent returned, as {"reward", "messages"}, either of which may be None.

    Raises:
      ValueError: it is none of a number, messages, an object of both, and None.

    >>> checked_result(1), checked_result({"reward": 0.5})
    ({'reward': 1.0, 'messages': None}, {'reward': 0.5, 'messages': None})
    """
    found = value if isinstance(value, dict) else {}
    if isinstance(value, int | float):
        found = {"reward": value}
    elif isinstance(value, list):
        found = {"messages": value}
    elif value is not None and not isinstance(value, dict):
        raise ValueError(
            "an agent must return a number, messages, an object with reward or messages, or None, "
            f"got {type(value).__name__}"
        )
    if unknown := set(found) - {"reward", "messages"}:
        raise ValueError(f"an agent's object has reward and messages, got {sorted(unknown)[0]!r}")
    reward, chat = found.get("reward"), found.get("messages")
    if reward is not None and not isinstance(reward, int | float):
        raise ValueError(f"an agent's reward must be a number, got {type(reward).__name__}")
    if chat is not None and not (
        isinstance(chat, list) and all(isinstance(m, dict) and "role" in m for m in chat)
    ):
        raise ValueError("an agent's messages must be a list of objects with a role")
    return {"reward": None if reward is None else float(reward), "messages": chat}
