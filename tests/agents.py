"""Agents for tests: plain programs that speak HTTP, some of which fail."""

import asyncio
import json
import random
import sys
import time
import urllib.request


def ask(client, messages, **fields):
    body = json.dumps({"model": client["model"], "messages": messages} | fields).encode()
    head = {"content-type": "application/json", "authorization": f"Bearer {client['api_key']}"}
    request = urllib.request.Request(f"{client['base_url']}/chat/completions", body, head)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())["choices"][0]["message"]


def user(text):
    return {"role": "user", "content": text}


def in_turns(client, row):
    """Two turns of one chat, and a chat of its own, at times of their own."""
    time.sleep(random.SystemRandom().uniform(0, 0.05))
    messages = [user(row["prompt"])]
    first = ask(client, messages)
    time.sleep(random.SystemRandom().uniform(0, 0.05))
    again = [*messages, {"role": "assistant", "content": first["content"]}, user("1")]
    second = ask(client, again, max_tokens=4)
    other = ask(client, [user("7")], max_tokens=3)
    return float(len(first["content"]) + len(second["content"]) - len(other["content"]))


async def several_at_once(client, row):
    """Calls that race, with settings that have no effect."""
    chats = [[user(f"{row['prompt']}{i}")] for i in range(3)]
    random.SystemRandom().shuffle(chats)
    made = [asyncio.to_thread(ask, client, chat, temperature=0.1) for chat in chats]
    found = await asyncio.gather(*made)
    found.sort(key=lambda message: message["content"])
    letters = "".join(message["content"] for message in found)
    return {"reward": float(sum(map(ord, letters)) % 7), "messages": found}


def some_fail(client, row):
    """Fails in several ways, by the row."""
    message = ask(client, [user(row["prompt"])], max_tokens=4)
    if row["prompt"].startswith("1"):
        raise ValueError("this row is too hard")
    if row["prompt"].startswith("2"):
        sys.exit(3)
    return [{"role": "assistant", "content": message["content"]}]


def idle(client, row):
    """Never asks the model."""
    return 1.0


async def names(client, row):
    return {"reward": row["n"], "messages": [user(f"{client.model} {client['base_url']}")]}


async def fails(client, row):
    if row["n"] == 1:
        raise KeyError("no")
    if row["n"] == 2:
        await asyncio.sleep(600)
    if row["n"] == 3:
        return "text"
    return row["n"]


async def blocks(client, row):
    if row["n"] == 1:
        time.sleep(600)
    return row["n"]


class Unprintable(Exception):
    def __str__(self):
        raise ValueError("no text")


class Message:
    """A message as the package openai has it, by its one method that matters."""

    def model_dump(self, **options):
        return {"role": "assistant", "content": None, "tool_calls": []}


async def badly(client, row):
    """Returns and raises what can hardly be reported, by the row."""
    if row["n"] == 1:
        return [{"role": "assistant", "content": None, "tool_calls": [object()]}]
    if row["n"] == 2:
        raise Unprintable
    if row["n"] == 3:
        return [Message()]
    return row["n"]


async def exits(client, row):
    """Exits, also in a task of its own, while others wait."""
    if row["n"] == 1:
        sys.exit(3)
    if row["n"] == 2:
        await asyncio.gather(asyncio.create_task(exits(client, {"n": 1})))
    if row["n"] == 3:
        raise KeyboardInterrupt
    await asyncio.sleep(0.3)
    return row["n"]


async def times_out(client, row):
    """Has a time limit of its own, or ignores that of the run."""
    if row["n"] == 1:
        await asyncio.wait_for(asyncio.sleep(9), 0.01)
    if row["n"] == 2:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            await asyncio.sleep(600)
    return row["n"]


def stops(client, row):
    return next(iter([]))


class AsyncObject:
    async def __call__(self, client, row):
        await asyncio.sleep(0)
        return row["n"]


async_object = AsyncObject()


def decorated(client, row):
    """As a decorator leaves an `async` function."""
    return async_object(client, row)


def one_argument(client):
    return 0.0
