"""The endpoint without its web server: bodies of requests in, objects and events out."""

import asyncio
import concurrent.futures
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import jax
import numpy as np

from relax.data import Limits
from relax.sampling import Request, Requests
from relax.sampling.request_step import prompt_logprobs
from relax.serving.chat import PromptEncoder
from relax.serving.errors import ApiError
from relax.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    SamplingFields,
    read_body,
    read_chat,
    read_completion,
)
from relax.serving.replies import Reply, event, header, usage
from relax.serving.text import TokenText
from relax.serving.worker import Job, Worker


class Session(Protocol):
    """Decides how the requests of a client are sampled, and sees what is sampled."""

    def requests(self, prompt: list[int], fields: SamplingFields, most: int) -> list[Request]:
        """The `fields.n` requests of a prompt, of at most `most` tokens each."""

    def call_id(self, reply_id: str, request: Request) -> str:
        """What the ids of a choice's tool calls are made from."""

    def record(self, requests: Sequence[Request], replies: Sequence[Reply]) -> None:
        """Called when the requests of a prompt have been answered."""


class OwnSettings:
    """The session of clients that decide for themselves."""

    def requests(self, prompt: list[int], fields: SamplingFields, most: int) -> list[Request]:
        seed = secrets.randbits(63) if fields.seed is None else fields.seed
        # Two numbers of 32 bits, since jax.random.key keeps the lower half of a seed alone.
        key = jax.random.key(np.uint32(seed & 0xFFFFFFFF))
        key = jax.random.fold_in(key, np.uint32(seed >> 32 & 0xFFFFFFFF))
        return [
            Request(
                prompt,
                jax.random.fold_in(key, i),
                most,
                fields.temperature,
                fields.top_p,
                fields.stop,
                bool(fields.alternatives),
                name=str(i),
            )
            for i in range(fields.n)
        ]

    def call_id(self, reply_id: str, request: Request) -> str:
        return f"{reply_id}/{request.name}"

    def record(self, requests: Sequence[Request], replies: Sequence[Reply]) -> None:
        pass


class Endpoint:
    """A model behind OpenAI's API.

    Args:
      sampler: slots of the model, which the endpoint owns from now on.
      tokenizer: the model's.
      name: the model's name; None: requests may name any.
      max_queue_size: requests that may wait for a slot.
      limits: on messages and rendering.
    """

    def __init__(
        self,
        sampler: Requests,
        tokenizer,
        name: str | None,
        *,
        max_queue_size: int = 64,
        limits: Limits = Limits(),  # noqa: B008
    ):
        self.sampler, self.name = sampler, name
        self.text = TokenText(tokenizer, sampler.eos)
        self.encoder = PromptEncoder(tokenizer, sampler.model.config.vocab_size, limits)
        self.worker = Worker(sampler, max_queue_size)
        # One thread: tokenizer and renderer are not made for several.
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "relax-encoding")

    def close(self) -> None:
        """Ends all requests with an error, and the threads."""
        self.worker.close()
        self._pool.shutdown(cancel_futures=True)

    async def chat(self, raw: bytes, session: Session) -> "Answer":
        """Starts to answer a body of `/v1/chat/completions`.

        Raises:
          ApiError: see `read_chat`; the model is not known; prompt and completion do not fit; too
            many requests wait.
        """
        body: ChatRequest = read_chat(read_body(raw))
        fields = body.sampling
        self._check_model(fields.model)
        prompt = await self._encode(
            self.encoder.chat, body.messages, body.tools, body.template_kwargs
        )
        format = self.encoder.tool_format(body.tools)
        most = self._most(len(prompt), fields.max_tokens, "messages")
        requests = await self._encode(session.requests, prompt, fields, most)
        replies = [
            Reply(self.text, fields.stop, fields.alternatives, format, body.tools) for _ in requests
        ]
        return ChatAnswer(self, session, fields, [requests], replies)

    async def complete(self, raw: bytes, session: Session) -> "Answer":
        """Starts to answer a body of `/v1/completions`; as `chat`."""
        body: CompletionRequest = read_completion(read_body(raw))
        fields = body.sampling
        self._check_model(fields.model)
        groups = []
        for prompt in body.prompts:
            ids = await self._encode(self.encoder.text, prompt)
            most = self._most(len(ids), fields.max_tokens, "prompt")
            groups.append(await self._encode(session.requests, ids, fields, most))
        count = sum(map(len, groups))
        replies = [Reply(self.text, fields.stop, fields.alternatives) for _ in range(count)]
        return TextAnswer(self, session, fields, groups, replies, echo=body.echo)

    def models(self) -> dict:
        """The body of `/v1/models`."""
        return {"object": "list", "data": [self.model(self.name or "policy")]}

    def model(self, name: str) -> dict:
        """The body of `/v1/models/NAME`."""
        self._check_model(name)
        card = {"id": name, "object": "model", "created": 0, "owned_by": "relax"}
        return card | {"max_model_len": self.sampler.room}

    async def prompt_logprobs(self, prompt: Sequence[int], K: int) -> tuple:
        """See `relax.sampling.request_step.prompt_logprobs`."""
        padded = np.zeros((1 << max(4, (len(prompt) - 1).bit_length()),), np.int32)
        padded[: len(prompt)] = prompt
        model, params = self.sampler.model, self.sampler.params
        found = await self._encode(
            lambda: jax.device_get(prompt_logprobs(model, params, padded, K=K))
        )
        return tuple(x[: len(prompt)] for x in found)

    async def _encode(self, function, *arguments):
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def _check_model(self, name: str | None) -> None:
        if self.name is not None and name not in (None, self.name):
            message = f"there is no model {name!r} here, but {self.name!r}."
            raise ApiError(404, message, "model", "model_not_found")

    def _most(self, prompt: int, asked: int | None, param: str) -> int:
        """The most tokens of a completion; 0 if nothing is asked but the prompt's."""
        room = self.sampler.room - prompt
        if room < (1 if asked is None else asked):
            new = "" if asked is None else f" and {asked} new ones"
            raise ApiError(
                400,
                f"the {prompt} tokens of the prompt{new} do not fit the {self.sampler.room} "
                f"positions {self.sampler.why}: send less, or ask for fewer.",
                param if room < 1 else "max_tokens",
                "context_length_exceeded",
            )
        return room if asked is None else asked


class Answer:
    """An answer under way: `await body()`, or `async for chunk in events()`."""

    kind, object = "", ""

    def __init__(
        self,
        endpoint: Endpoint,
        session: Session,
        fields: SamplingFields,
        groups: list[list[Request]],
        replies: list[Reply],
    ):
        self.endpoint, self.session, self.fields = endpoint, session, fields
        self.groups, self.replies = groups, replies
        self.header = header(self.kind, self.object, fields.model or endpoint.name or "policy")
        self.samples = fields.max_tokens != 0
        asked = [r for group in groups for r in group] if self.samples else []
        self.job: Job = endpoint.worker.submit(asked)

    @property
    def usage(self) -> dict:
        prompts = sum(len(group[0].prompt) for group in self.groups)
        reused = sum(row.reused for row in self.job.rows[:: self.fields.n])
        return usage(prompts, reused, self.replies)

    def abandon(self) -> None:
        """Gives the slots back: the client has gone, or has got everything."""
        if self.job.left:
            self.endpoint.worker.cancel(self.job)
            self.job.put(ApiError(499, "the client has gone."))

    async def body(self) -> dict:
        """The whole answer."""
        async for piece in self.job:
            self.replies[piece.index].add(piece.values, piece.reason)
        self._record()
        choices = [await self.choice(i) for i in range(len(self.replies))]
        return self.header | {"choices": choices, "usage": self.usage}

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events; an error on the way is the last one."""
        try:
            for i in range(len(self.replies)):
                for chunk in self.first(i):
                    yield self._event([chunk])
            async for piece in self.job:
                reply = self.replies[piece.index]
                before = len(reply.values.get("tokens", ()))
                reply.add(piece.values, piece.reason)
                for chunk in self.chunks(piece.index, before, piece.tokens, piece.reason):
                    yield self._event([chunk])
            self._record()
            if self.fields.include_usage:
                yield event(self.header | {"choices": [], "usage": self.usage})
            yield event("[DONE]")
        except ApiError as error:
            yield event(error.body())
        finally:
            self.abandon()

    def _event(self, choices: list[dict]) -> bytes:
        empty = {"usage": None} if self.fields.include_usage else {}
        return event(self.header | {"choices": choices} | empty)

    def _record(self) -> None:
        if not self.samples:
            return
        first = 0
        for group in self.groups:
            self.session.record(group, self.replies[first : first + len(group)])
            first += len(group)

    async def choice(self, index: int) -> dict:
        """A whole choice."""
        raise NotImplementedError

    def first(self, index: int) -> list[dict]:
        """The choices of a stream before any token."""
        return []

    def chunks(self, index: int, before: int, new: list[int], reason: str | None) -> list[dict]:
        """The choices of a stream for new tokens behind `before` others."""
        raise NotImplementedError


class ChatAnswer(Answer):
    """An answer of `/v1/chat/completions`."""

    kind, object = "chatcmpl", "chat.completion"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        if self.fields.stream:
            self.header["object"] = "chat.completion.chunk"

    async def choice(self, index: int) -> dict:
        reply = self.replies[index]
        message, finish = self._message(index)
        made = {"index": index, "message": {"refusal": None} | message}
        return made | {"finish_reason": finish, "logprobs": reply.chat_logprobs()}

    def first(self, index: int) -> list[dict]:
        return [self._delta(index, {"role": "assistant", "content": ""})]

    def chunks(self, index: int, before: int, new: list[int], reason: str | None) -> list[dict]:
        reply = self.replies[index]
        text, logprobs = reply.stream.feed(new), reply.chat_logprobs(before)
        deltas: list[dict] = []
        if reason is not None:
            message, finish = self._message(index)
            text += reply.stream.end(message["content"] or "")
            calls = [{"index": i} | call for i, call in enumerate(message.get("tool_calls", ()))]
            deltas += [{"tool_calls": calls}] if calls else []
            thoughts = message.get("reasoning_content")
            deltas += [{"reasoning_content": thoughts}] if thoughts else []
        if text or logprobs:
            deltas.insert(0, {"content": text})
        made = [self._delta(index, delta) for delta in deltas]
        if made and logprobs:
            made[0]["logprobs"] = logprobs
        if reason is not None:
            made.append(self._delta(index, {}) | {"finish_reason": finish})
        return made

    def _message(self, index: int) -> tuple[dict, str]:
        call_id = self.session.call_id(self.header["id"], self.job.requests[index])
        return self.replies[index].message(call_id)

    @staticmethod
    def _delta(index: int, delta: dict) -> dict:
        return {"index": index, "delta": delta, "finish_reason": None, "logprobs": None}


class TextAnswer(Answer):
    """An answer of `/v1/completions`."""

    kind, object = "cmpl", "text_completion"

    def __init__(self, *arguments, echo: bool):
        super().__init__(*arguments)
        self.echo = echo

    async def choice(self, index: int) -> dict:
        reply, text, finish = self.replies[index], "", "length"
        if self.samples:
            message, finish = reply.message("")
            text = message["content"]
        logprobs = reply.text_logprobs(0)
        if self.echo:
            text, logprobs = await self._echoed(index, text)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def chunks(self, index: int, before: int, new: list[int], reason: str | None) -> list[dict]:
        reply = self.replies[index]
        text, logprobs, finish = reply.stream.feed(new), reply.text_logprobs(0, before), None
        if reason is not None:
            message, finish = reply.message("")
            text += reply.stream.end(message["content"])
        made = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return [made] if text or logprobs or finish else []

    async def _echoed(self, index: int, text: str) -> tuple[str, dict | None]:
        """Prompt and completion together, with the log-probabilities of both."""
        reply, endpoint = self.replies[index], self.endpoint
        prompt = list(self.groups[index // self.fields.n][0].prompt)
        shown = endpoint.text.text(prompt)
        if self.fields.alternatives is None:
            return shown + text, None
        K = self.fields.alternatives
        found, ids, top = await endpoint.prompt_logprobs(prompt, max(K, 1))
        names = [endpoint.text.of_token(token) for token in prompt]
        tops = [
            {endpoint.text.of_token(int(t)): float(x) for t, x in zip(*pair, strict=True)}
            for pair in zip(ids[:, ::-1], top[:, ::-1], strict=True)
        ]
        logprobs = {
            "tokens": names,
            "token_logprobs": [None, *map(float, found[1:])],
            "top_logprobs": [None, *tops[1:]] if K else None,
            "text_offset": [sum(map(len, names[:i])) for i in range(len(names))],
        }
        rest = reply.text_logprobs(sum(map(len, names)))
        if rest is not None:
            for name, values in logprobs.items():
                logprobs[name] = None if values is None else values + rest[name]
        return shown + text, logprobs
