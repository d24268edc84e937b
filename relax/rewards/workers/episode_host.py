"""The process between the trainer and tools or environments: one forked worker per episode.

Workers run side by side. Each has a time limit per question, and is killed with everything that it
started when it exceeds it, when it floods its pipe, or when its episode ends; no other notices.
"""

import collections
import functools
import os
import selectors
import signal
import time
from dataclasses import dataclass, field

from relax.errors import ConfigError
from relax.rewards.workers import descendants, messages
from relax.rewards.workers.episode_worker import Sources, describe, run_episode
from relax.rewards.workers.host import ALIVE, serve_trainer
from relax.rewards.workers.worker import MAX_ANSWER_BYTES, Printed, Worker

_SAY_EVERY_S = 1.0
_DESCRIBE_S = 120.0


def main() -> None:
    """Runs tools and environments for one trainer until the trainer's end closes."""

    def begin(setup: dict, inbox: int, outbox: int):
        sources = Sources(setup["tools"], setup["environment"])
        info = _described(sources, (inbox, outbox))
        host = _EpisodeHost(sources, setup["timeout_s"], setup["workers"], inbox, outbox)
        return {"info": info}, host.serve

    serve_trainer(begin)


def _described(sources: Sources, private: tuple[int, int]) -> dict:
    worker = Worker(functools.partial(describe, sources), Printed(), private)
    try:
        answer = _read_one(worker, _DESCRIBE_S)
    finally:
        worker.kill()
    if answer is None or "error" in answer:
        raise ConfigError(
            answer["error"] if answer else "the tools end the process that describes them."
        )
    return answer["info"]


def _read_one(worker: Worker, limit_s: float) -> dict | None:
    """The next message of a worker while its output is read; None if it ends first."""
    _, answers, output = worker.descriptors
    deadline_s, data = time.monotonic() + limit_s, bytearray()
    with selectors.DefaultSelector() as selector:
        for fd in (answers, output):
            selector.register(fd, selectors.EVENT_READ)
        while (left_s := deadline_s - time.monotonic()) > 0:
            for key, _ in selector.select(left_s):
                part = os.read(key.fd, 1 << 16)
                if key.fd == answers:
                    data += part
                    if (answer := messages.decode(data)) is not None:
                        return answer
                if not part:
                    return None
    return None


@dataclass
class _Episode:
    """A worker and the question that it answers."""

    worker: Worker
    number: int | None = None  # of the question
    deadline_s: float = 0.0
    answer: bytearray = field(default_factory=bytearray)


class _EpisodeHost:
    def __init__(self, sources: Sources, timeout_s: float, workers: int, inbox: int, outbox: int):
        self.sources, self.timeout_s, self.most = sources, timeout_s, workers
        self.inbox, self.outbox = inbox, outbox
        self.episodes: dict[int, _Episode] = {}
        self.questions: collections.deque[dict] = collections.deque()
        self.requests, self.answers = bytearray(), bytearray()
        self.own = descendants.children()  # processes started by the modules are kept
        self.said_s = time.monotonic()
        self.selector = selectors.DefaultSelector()
        self.selector.register(inbox, selectors.EVENT_READ, self._read_requests)
        os.set_blocking(outbox, False)
        self.is_open = True

    def serve(self) -> None:
        try:
            while self.is_open:
                self._ask()
                for key, _ in self.selector.select(self._patience_s()):
                    if key.fd in self.selector.get_map():
                        key.data()
                self._stop_late_ones()
                self._say()
        finally:
            for episode in self.episodes.values():
                episode.worker.kill()

    def _busy(self) -> list[int]:
        return [e for e, episode in self.episodes.items() if episode.number is not None]

    def _patience_s(self) -> float | None:
        """Until something is due; None: only when a message arrives."""
        busy = self._busy()
        if not busy and not self.questions:
            return None
        first_s = min((self.episodes[e].deadline_s for e in busy), default=float("inf"))
        return max(0.0, min(_SAY_EVERY_S, first_s - time.monotonic()))

    def _read_requests(self) -> None:
        part = os.read(self.inbox, 1 << 20)
        if not part:
            self.is_open = False
        self.requests += part
        while (message := messages.decode(self.requests)) is not None:
            del self.requests[: messages.frame_size(self.requests)]
            if "end" in message:
                self._take_questions(message["end"])  # nobody waits for their answers
                self._end(message["end"])
            else:
                self.questions.append(message)

    def _ask(self) -> None:
        """Hands out questions while fewer than `most` workers are busy, one to each at a time."""
        while len(self._busy()) < self.most and (question := self._next_question()) is not None:
            episode = self._episode(question["episode"])
            episode.number, episode.answer = question["number"], bytearray()
            episode.deadline_s = time.monotonic() + self.timeout_s
            # A worker that is not busy reads its pipe at once; one that has died fails below.
            try:
                messages.write(episode.worker.descriptors[0], question, self._wait_briefly(episode))
            except (BrokenPipeError, TimeoutError):
                self._lose(question["episode"], "died", "ended its process")

    def _next_question(self) -> dict | None:
        busy = set(self._busy())
        for place, question in enumerate(self.questions):
            if question["episode"] not in busy:
                del self.questions[place]
                return question
        return None

    def _wait_briefly(self, episode: _Episode):
        def wait() -> None:
            with selectors.DefaultSelector() as selector:
                selector.register(episode.worker.descriptors[0], selectors.EVENT_WRITE)
                if not selector.select(self.timeout_s):
                    raise TimeoutError

        return wait

    def _episode(self, e: int) -> _Episode:
        if e not in self.episodes:
            private = [self.inbox, self.outbox]
            private += [fd for one in self.episodes.values() for fd in one.worker.descriptors]
            work = functools.partial(run_episode, self.sources)
            worker = Worker(work, Printed(), tuple(private))
            self.episodes[e] = _Episode(worker)
            _, answers, output = worker.descriptors
            self.selector.register(
                answers, selectors.EVENT_READ, functools.partial(self._read_answer, e)
            )
            self.selector.register(
                output, selectors.EVENT_READ, functools.partial(self._read_output, e)
            )
        return self.episodes[e]

    def _read_answer(self, e: int) -> None:
        episode = self.episodes[e]
        part = os.read(episode.worker.descriptors[1], 1 << 16)
        if not part:
            self._lose(e, "died", None)
            return
        if episode.number is None:  # it writes without being asked
            return
        episode.answer += part
        if (messages.frame_size(episode.answer) or 0) > MAX_ANSWER_BYTES:
            self._lose(e, "result", f"answers with more than {MAX_ANSWER_BYTES} bytes")
            return
        while (answer := messages.decode(episode.answer)) is not None:
            del episode.answer[: messages.frame_size(episode.answer)]
            if answer["number"] == episode.number:  # not of a process that a tool left behind
                self._send(answer)
                episode.number = None

    def _read_output(self, e: int) -> None:
        output = self.episodes[e].worker.descriptors[2]
        if not os.read(output, 1 << 16):
            self.selector.unregister(output)

    def _stop_late_ones(self) -> None:
        now_s = time.monotonic()
        for e in self._busy():
            if self.episodes[e].deadline_s < now_s:
                self._lose(e, "hung", f"did not return within {self.timeout_s:g} s and was killed")

    def _lose(self, e: int, kind: str, reason: str | None) -> None:
        """Ends a worker and answers its question, and those that wait for it, with a failure."""
        number = self.episodes[e].number
        asked = [] if number is None else [number]
        asked += [question["number"] for question in self._take_questions(e)]
        code = os.waitstatus_to_exitcode(self._end(e))
        if reason is None and code < 0:
            reason = f"ended its process by signal {signal.Signals(-code).name}"
        reason = reason or f"ended its process with exit code {code}"
        for number in asked:
            self._send({"number": number, "failed": [kind, reason]})

    def _take_questions(self, e: int) -> list[dict]:
        """Removes and returns the questions to an episode that wait."""
        taken = [q for q in self.questions if q["episode"] == e]
        self.questions = collections.deque(q for q in self.questions if q["episode"] != e)
        return taken

    def _end(self, e: int) -> int:
        """Kills an episode's worker and what it has started; returns its wait status."""
        episode = self.episodes.pop(e, None)
        if episode is None:
            return 0
        for fd in episode.worker.descriptors[1:]:
            if fd in self.selector.get_map():
                self.selector.unregister(fd)
        status = episode.worker.kill()
        alive = {one.worker.pid for one in self.episodes.values()}
        descendants.kill(but=self.own | alive)
        return status

    def _say(self) -> None:
        """Tells the trainer that the host is alive while it waits."""
        if (self._busy() or self.questions) and time.monotonic() - self.said_s > _SAY_EVERY_S:
            self._send(ALIVE)

    def _send(self, message: dict) -> None:
        self.said_s = time.monotonic()
        self.answers += messages.encode(message)
        if self.outbox not in self.selector.get_map():
            self.selector.register(self.outbox, selectors.EVENT_WRITE, self._flush)

    def _flush(self) -> None:
        del self.answers[: os.write(self.outbox, self.answers[: 1 << 16])]
        if not self.answers:
            self.selector.unregister(self.outbox)
