"""The thread that decodes: requests of many clients pass through the slots of one sampler.

The thread alone touches the device. A client's side is a `Job`, which an event loop awaits.
"""

import asyncio
import dataclasses
import threading
from collections.abc import Sequence

from relax.sampling import Request, RequestRow, Requests
from relax.sampling.request_step import Chosen
from relax.serving.errors import ApiError, broken, closing, overloaded


@dataclasses.dataclass(frozen=True)
class Piece:
    """New tokens of one request of a job, in lists by the names of `Chosen`.

    `reason` says why the completion has ended; None: more follows.
    """

    index: int
    values: dict[str, list]
    reason: str | None

    @property
    def tokens(self) -> list[int]:
        return self.values["tokens"]


class Job:
    """Requests of one client: `async for piece in job` until all have ended."""

    def __init__(self, requests: Sequence[Request]):
        self.requests = list(requests)
        self.rows: list[RequestRow] = []
        self.left = len(self.requests)
        self.loop = asyncio.get_running_loop()
        self.pieces: asyncio.Queue[Piece | ApiError] = asyncio.Queue()

    def put(self, item: Piece | ApiError) -> None:
        """Called by the worker's thread."""
        try:
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, item)
        except RuntimeError:  # the client's loop is closed
            pass

    def __aiter__(self):
        return self

    async def __anext__(self) -> Piece:
        if not self.left:
            raise StopAsyncIteration
        item = await self.pieces.get()
        if isinstance(item, ApiError):
            raise item
        self.left -= item.reason is not None
        return item


class Worker:
    """Runs a sampler in a thread of its own.

    Args:
      sampler: used by this thread only until `close`.
      max_queue_size: requests that may wait for a slot; more are refused.
    """

    def __init__(self, sampler: Requests, max_queue_size: int = 64):
        self.sampler, self.max_queue_size = sampler, max_queue_size
        self._wake = threading.Condition()
        self._new: list[Job] = []
        self._cancelled: list[Job] = []
        self._jobs: dict[RequestRow, tuple[Job, int]] = {}
        self._load = 0  # requests that have not ended
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="relax-serving", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> Job:
        """Adds requests of the running event loop's client.

        Raises:
          ApiError: too many requests wait, or the worker is closed.
        """
        job = Job(requests)
        with self._wake:
            if self._closed:
                raise closing()
            waiting = self._load - len(self.sampler.slots)
            if self._load and waiting + len(requests) > self.max_queue_size:
                raise overloaded(max(waiting, 0))
            self._load += len(requests)
            self._new.append(job)
            self._wake.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Ends a job whose client has gone; its slots are free after the current segment."""
        with self._wake:
            self._cancelled.append(job)
            self._wake.notify()

    @property
    def load(self) -> int:
        """Number of requests that have not ended."""
        return self._load

    def close(self) -> None:
        """Ends all jobs with an error, and the thread; may be called again."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._receive():
            try:
                self._tell(self.sampler.advance())
            except Exception as error:  # of the model or the device: the clients are told
                self._fail(broken(f"{type(error).__name__}: {error}"))
        self._fail(closing())

    def _receive(self) -> bool:
        """Takes over new and cancelled jobs; waits while there is nothing to do."""
        with self._wake:
            while not (self._closed or self._new or self._cancelled or self._jobs):
                self._wake.wait()
            new, self._new = self._new, []
            cancelled, self._cancelled = self._cancelled, []
            if self._closed:
                self._new = new  # for `_fail`
                return False
        for job in new:
            try:
                self._start(job)
            except Exception as error:  # the client's side has checked what it could
                for row in job.rows:
                    del self._jobs[row]
                    self.sampler.cancel(row)
                self._ended(len(job.requests))
                job.put(broken(f"{type(error).__name__}: {error}"))
        for job in cancelled:
            for row in job.rows:
                if self._jobs.pop(row, None) is not None:
                    self.sampler.cancel(row)
                    self._ended(1)
        return True

    def _start(self, job: Job) -> None:
        for index, request in enumerate(job.requests):
            row = self.sampler.submit(request)
            job.rows.append(row)
            self._jobs[row] = (job, index)

    def _tell(self, taken: list[tuple[RequestRow, int]]) -> None:
        for row, count in taken:
            if row not in self._jobs:
                continue
            job, index = self._jobs[row]
            first = len(row.tokens) - count
            job.put(Piece(index, {n: getattr(row, n)[first:] for n in Chosen._fields}, row.reason))
            if row.reason is not None:
                del self._jobs[row]
                self._ended(1)

    def _fail(self, error: ApiError) -> None:
        """Ends all jobs with an error and empties the slots."""
        with self._wake:
            jobs = {id(job): job for job, _ in self._jobs.values()}
            jobs |= {id(job): job for job in self._new}
            self._new, self._load = [], 0
        self._jobs.clear()
        self.sampler.reset()
        for job in jobs.values():
            job.put(error)

    def _ended(self, count: int) -> None:
        with self._wake:
            self._load -= count
