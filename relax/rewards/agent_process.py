"""The process in which agents run: loads the function, runs many calls at once, reports results.

Messages as in `relax.rewards.workers.messages`. In: {"agent"}, then a job each,
{"id", "client", "row", "timeout_s"}. Out: {"name"} or {"error"}, then for each job
{"id", "result"} or {"id", "error"}.
"""

import asyncio
import contextlib
import inspect
import json
import os
import threading
import traceback
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from relax.config.imports import load_object
from relax.config.text import quote
from relax.errors import ConfigError
from relax.rewards.counterpart import BadAnswer, checked_reward, raised
from relax.rewards.workers import descendants, messages

THREADS = 256  # of agents that are plain functions


class BadResult(ValueError):
    """An agent returned what it may not."""


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
        except BaseException as error:  # also SystemExit, of its module
            why = f"agent {setup['agent']!r} cannot be loaded: it {raised(error)}."
            messages.write(outbox, {"error": why})
            return
        messages.write(outbox, {"name": setup["agent"]})
        _run_loop(_serve(agent, inbox, outbox))
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
    except ValueError:
        raise ConfigError(
            f"agent {spec!r} has no signature that can be read: wrap it in a function "
            "f(client, row)."
        ) from None
    return function


def _run_loop(main: Coroutine) -> None:
    """`asyncio.run`, but a task that exits stops nothing beside it."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    task = loop.create_task(main)
    while not task.done():
        # A task in which these are raised stops the loop; whoever awaits the task sees them too.
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            loop.run_until_complete(task)


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
    task = asyncio.create_task(_answer(agent, job, threads))
    await asyncio.wait({task}, timeout=job["timeout_s"])
    if task.done():
        frame = task.result()
    else:
        task.cancel()
        late = f"it did not end within {job['timeout_s']:g} s"
        frame = messages.encode({"id": job["id"], "error": late, "timeout": True})
    messages.write(outbox, frame)


async def _answer(agent: Callable, job: dict, threads: ThreadPoolExecutor) -> bytes:
    """The frame of an agent's result, or of why there is none."""
    client, row, failure = AgentClient(job["client"]), job["row"], None
    try:
        if inspect.iscoroutinefunction(agent):
            value = agent(client, row)
        else:
            loop = asyncio.get_running_loop()
            value, failure = await loop.run_in_executor(threads, _attempt, agent, client, row)
        if failure is not None:
            raise failure
        if inspect.isawaitable(value):  # also of an object's `__call__`, or of a decorator
            value = await value
        return messages.encode({"id": job["id"], "result": checked_result(value)})
    except BadResult as error:
        why = str(error)
    except BaseException as error:  # also SystemExit: an agent never ends the run
        last = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{raised(error)} ({last.filename}, line {last.lineno})"
    return messages.encode({"id": job["id"], "error": why})


def _attempt(agent: Callable, *arguments) -> tuple[Any, BaseException | None]:
    """What an agent returned and what it raised; a future does not take StopIteration."""
    try:
        return agent(*arguments), None
    except BaseException as error:
        return None, error


def checked_result(value) -> dict:
    """What an agent returned, as {"reward", "messages"}, either of which may be None.

    Raises:
      BadResult: it is none of a number, messages, an object of both, and None.

    >>> checked_result(1), checked_result({"reward": 0.5})
    ({'reward': 1.0, 'messages': None}, {'reward': 0.5, 'messages': None})
    """
    found = value if isinstance(value, dict) else {}
    if isinstance(value, int | float) or hasattr(value, "tolist"):
        found = {"reward": value}
    elif isinstance(value, list):
        found = {"messages": value}
    elif value is not None and not isinstance(value, dict):
        raise BadResult(
            "an agent must return a number, messages, an object with reward or messages, or None, "
            f"got {type(value).__name__}"
        )
    if unknown := set(found) - {"reward", "messages"}:
        name = quote(next(iter(unknown)))
        raise BadResult(f"an agent's object has reward and messages, got {name}")
    try:
        reward = checked_reward(found.get("reward"), "an agent")
    except BadAnswer as error:
        raise BadResult(str(error)) from error
    return {"reward": reward, "messages": _checked_messages(found.get("messages"))}


def _checked_messages(chat) -> list[dict] | None:
    """Messages as JSON takes them.

    Raises:
      BadResult: they are not a list of messages with a role and a content.
    """
    if chat is None:
        return None
    if not isinstance(chat, list):
        raise BadResult(
            f"an agent's messages must be a list of objects with a role, got {type(chat).__name__}"
        )
    try:
        plain = json.loads(json.dumps(chat, default=_fields))
    except (TypeError, ValueError, RecursionError) as error:
        raise BadResult(f"an agent's messages cannot be written as JSON: {error}") from error
    for message in plain:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadResult(
                "an agent's messages must be a list of objects with a role, a text, got "
                f"{quote(message, 200)}"
            )
        if not _is_content(message.get("content")):
            raise BadResult(
                "the content of an agent's message must be a text, a list of parts or None, got "
                f"{quote(message['content'], 200)}"
            )
    return plain


def _is_content(content) -> bool:
    if isinstance(content, list):
        return all(isinstance(p, dict) and isinstance(p.get("text", ""), str) for p in content)
    return content is None or isinstance(content, str)


def _fields(value) -> Any:
    """The fields of an object of the package openai (pydantic's), which JSON does not take."""
    if not hasattr(value, "model_dump"):
        raise TypeError(f"an object of type {type(value).__name__}")
    return value.model_dump(mode="json", exclude_unset=True)
