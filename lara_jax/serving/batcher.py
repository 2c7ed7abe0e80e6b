"""Requests of several clients, answered by one call of the policy after the other.

A compiled policy takes a constant number B of observations, and one call of eight is far cheaper
than eight calls of one. So requests wait in a line, and a call takes one observation of each in
turn until it has B; what is missing is filled with copies, whose answers nobody sees::

    client 1  [a b c]    \\                    /  call 1:  a d e b
    client 2  [d]         >  B = 4         ->                         thread of the policy
    client 3  [e f]      /                    \\  call 2:  f c f f

A call starts at once when it is full or when no other client could still add to it, else when the
oldest request has waited its time. A client has at most one request in the line, and a long one
does not hold up the others. The policy runs in a thread of its own; the server answers meanwhile.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from lara_jax.serving.contract import Observation, ServedPolicy

LOG = logging.getLogger(__name__)


class PolicyFailed(RuntimeError):
    """The policy could not answer, through no fault of the client's; the log says why."""


@dataclass(frozen=True, kw_only=True)
class Acted:
    """What came of a request: chunks float32[E, C, A], and the seconds that its calls took."""

    chunks: np.ndarray
    policy_seconds: float


class _Job:
    """A request in the line: the observations still to be acted on, and the chunks so far."""

    def __init__(self, observations: Sequence[Observation], answer: asyncio.Future[Acted]) -> None:
        self.answer = answer
        self.since = time.monotonic()
        self.rows = deque(enumerate(observations))
        self.chunks: dict[int, np.ndarray] = {}
        self.size = len(observations)
        self.seconds = 0.0

    def take(self, index: int, chunk: np.ndarray) -> None:
        """Keeps a chunk; the last one completes the answer."""
        self.chunks[index] = chunk
        if len(self.chunks) == self.size and not self.answer.done():
            chunks = np.stack([self.chunks[i] for i in range(self.size)])
            self.answer.set_result(Acted(chunks=chunks, policy_seconds=self.seconds))

    def fail(self, text: str) -> None:
        """Ends the wait without an answer."""
        if not self.answer.done():
            self.answer.set_exception(PolicyFailed(text))


_Row = tuple[_Job, int, Observation]


def call(
    policy: ServedPolicy, observations: Sequence[Observation], shape: tuple[int, int, int]
) -> np.ndarray:
    """The policy's chunks, float32 of `shape`.

    Raises:
      ValueError: they have another shape.
    """
    chunks = np.asarray(policy(observations), np.float32)
    if chunks.shape != shape:
        raise ValueError(f"the policy answered {list(chunks.shape)}, expected {list(shape)}")
    return chunks


class Batcher:
    """The line of observations before a policy; used as an async context.

    Args:
      policy: acts.
      shape: (B, C, A) of its answers; it is called with B observations, from one thread, never
        twice at a time.
      wait_seconds: how long an observation waits for others to join it.
      clients: how many clients there are, each of which could have a request in the line.
      on_call: is told after each call how many of its observations were real, and its seconds.
    """

    def __init__(
        self,
        policy: ServedPolicy,
        *,
        shape: tuple[int, int, int],
        wait_seconds: float,
        clients: Callable[[], int],
        on_call: Callable[[int, float], None] = lambda rows, seconds: None,
    ) -> None:
        self._policy = policy
        self._shape, self._size = shape, shape[0]
        self._wait_seconds = wait_seconds
        self._clients = clients
        self._on_call = on_call
        self._line: deque[_Job] = deque()
        self._jobs = 0
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="policy")

    async def __aenter__(self) -> "Batcher":
        self.task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        await asyncio.to_thread(self._thread.shutdown)

    async def act(self, observations: Sequence[Observation]) -> Acted:
        """Stands in the line; whoever stops waiting leaves it.

        Raises:
          PolicyFailed: the policy raised, or its answer has a wrong shape or is not finite.
        """
        job = _Job(observations, asyncio.get_running_loop().create_future())
        self._line.append(job)
        self._jobs += 1
        self._arrived.set()
        try:
            return await job.answer
        finally:
            self._jobs -= 1

    async def _run(self) -> None:
        while True:
            await self._gather()
            if rows := self._take():
                await self._call(rows)

    async def _gather(self) -> None:
        """Waits until a call should start."""
        while not self._line:
            self._arrived.clear()
            await self._arrived.wait()
        due = min(job.since for job in self._line) + self._wait_seconds
        try:
            async with asyncio.timeout(max(due - time.monotonic(), 0)):
                while self._waiting() < self._size and self._jobs < self._clients():
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            return

    def _waiting(self) -> int:
        return sum(len(job.rows) for job in self._line)

    def _take(self) -> list[_Row]:
        """Up to B observations, one of each job in turn; jobs that were given up leave the line."""
        rows: list[_Row] = []
        while self._line and len(rows) < self._size:
            job = self._line.popleft()
            if job.answer.done():
                continue
            rows.append((job, *job.rows.popleft()))
            if job.rows:
                self._line.append(job)
        return rows

    async def _call(self, rows: list[_Row]) -> None:
        observations = [observation for _, _, observation in rows]
        observations += observations[:1] * (self._size - len(rows))
        calling = asyncio.get_running_loop().run_in_executor(
            self._thread, self._timed, observations
        )
        await asyncio.wait([calling])
        if error := calling.exception():
            LOG.error("the policy failed", exc_info=error)
            for job, _, _ in rows:
                job.fail("the policy failed; the server's log says why")
            return
        chunks, seconds = calling.result()
        self._on_call(len(rows), seconds)
        for job in {job for job, _, _ in rows}:
            job.seconds += seconds
        for (job, index, _), chunk in zip(rows, chunks, strict=False):
            if np.isfinite(chunk).all():
                job.take(index, chunk)
            else:
                job.fail("the policy's action is not finite")

    def _timed(self, observations: list[Observation]) -> tuple[np.ndarray, float]:
        began = time.monotonic()
        chunks = call(self._policy, observations, self._shape)
        return chunks, time.monotonic() - began
