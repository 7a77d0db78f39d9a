"""Admission: run, wait, or refuse. A one-thread executor is the line, first come first served.

The next job already lies in the executor when one ends, so the device idles for a fraction of a
millisecond between two. Everything that a model does happens on that one thread; everything else
here runs on the event loop, except where a docstring says "device thread".
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any, Literal

from workers.board import MOST_ENDED, Board
from workers.contract import Work
from workers.failures import ModelFailed, reduced

MOST_AHEAD = 1024
"""Items of a stream that the device thread may be ahead of a slow reader."""

_FIRST_GUESS = 1.0  # seconds a request takes, before one was seen
_WEIGHT = 0.2  # of the newest service time in the running mean

Stage = Literal["waiting", "running", "streaming"]


class Refused(Exception):  # noqa: N818 - an answer, not a fault
    """The line is full. ``retry_after``: whole seconds until it would have been served."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the line is full; retry after {retry_after} s")
        self.retry_after = retry_after


class Closed(Exception):  # noqa: N818 - an answer, not a fault
    """Nothing is taken any more: the worker is on its way out."""


class EndsWorkers(Exception):  # noqa: N818 - an answer, not a fault
    """The processes of other workers ended while they ran this very request."""

    def __init__(self, ended: int) -> None:
        super().__init__(f"this request ended {ended} workers")
        self.ended = ended


class Abandoned(Exception):  # noqa: N818 - an answer, not a fault
    """The work was dropped in ``stage``."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(f"dropped while {stage}")
        self.stage: Stage = stage


class DeadlinePassed(Abandoned):
    pass


class CallerLeft(Abandoned):
    pass


class Job:
    """One admitted request: iterate it for what the model returns (one item) or yields (many)."""

    def __init__(self, line: Line, call: Callable[[], Any], work: Work, key: str = "") -> None:
        self.work = work
        self.key = key
        """The balancer's name of the request, by which it is known again on another worker."""
        self.streams = False
        """Whether the call returned an iterator; known with the first item."""
        self.admitted = time.perf_counter()
        self.started: float | None = None
        self.ended: float | None = None
        self._line = line
        self._call: Callable[[], Any] | None = call
        self._loop = asyncio.get_running_loop()
        self._items: deque[Any] = deque()
        self._posted = 0
        self._taken = 0
        self._over = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._room = threading.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._ticket: Future[None] | None = None

    @property
    def queue_seconds(self) -> float:
        """How long it waited, or has been waiting."""
        return (self.started or time.perf_counter()) - self.admitted

    @property
    def service_seconds(self) -> float:
        """How long it has had the device; 0 before it ran."""
        if self.started is None:
            return 0.0
        return (self.ended or time.perf_counter()) - self.started

    @property
    def stage(self) -> Stage:
        if self.started is None:
            return "waiting"
        return "streaming" if self.streams and self._posted else "running"

    def __aiter__(self) -> Job:
        return self

    async def __anext__(self) -> Any:
        """Raises what the model raised (reduced), DeadlinePassed, or CallerLeft."""
        while not self._items:
            if self._error is not None:
                raise self._error
            if self._over:
                raise StopAsyncIteration
            self._waiter = self._loop.create_future()
            await self._waiter
        self._taken += 1
        self._room.set()
        return self._items.popleft()

    def leave(self) -> None:
        """The caller has gone: wait no more, run no more, stream no more."""
        if not self._over:
            self._abandon(CallerLeft)

    def _begin(self, executor: Executor) -> None:
        if self.work.deadline is not None:
            left = max(0.0, self.work.deadline - time.monotonic())
            self._timer = self._loop.call_later(left, self._expire)
        self._ticket = executor.submit(self._run)

    def _expire(self) -> None:
        if not self._over:
            self._abandon(DeadlinePassed)

    def _abandon(self, reason: type[Abandoned]) -> None:
        stage = self.stage
        self.work.cancel()
        assert self._ticket is not None
        if self._ticket.cancel():
            # It never ran and never will: its place is free at once.
            self._call = None
            self._line._free()
        self._items.clear()
        self._close(reason(stage))

    def _close(self, error: Exception | None) -> None:
        self._over = True
        self._error = error
        if self._timer is not None:
            self._timer.cancel()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _arrive(self, item: Any) -> None:
        if not self._over:
            self._items.append(item)
            self._wake()

    def _finish(self, error: Exception | None, *last: Any) -> None:
        """The device thread is done with it, whether anyone still waits or not."""
        assert self.started is not None
        assert self.ended is not None
        self._line._served(self.ended - self.started, error)
        if not self._over:
            self._items.extend(last)
            self._close(error)

    def _run(self) -> None:
        """Device thread."""
        if self._line.closed:
            # The process is about to end: without an answer, the balancer asks another worker.
            return
        self.started = time.perf_counter()
        self._line._current = self
        self._line.board.begin(self.key)
        error: Exception | None = None
        last: tuple[Any, ...] = ()
        try:
            last = self._called()
        except BaseException as raised:
            error = reduced(raised)
        self._call = None
        self._line.board.end()
        self._line._current = None
        self.ended = time.perf_counter()
        if isinstance(error, ModelFailed) and error.sticky:
            self._line.closed = True
        with contextlib.suppress(RuntimeError):  # the loop is gone after a drain's deadline
            self._loop.call_soon_threadsafe(self._finish, error, *last)

    def _called(self) -> tuple[Any, ...]:
        """Device thread. The value as the last item; a stream's items leave on their own."""
        self.work.check()
        assert self._call is not None
        value = self._call()
        if not isinstance(value, Iterator):
            return (value,)
        self.streams = True
        try:
            for item in value:
                self.work.check()
                self._post(item)
        finally:
            close = getattr(value, "close", None)
            if close is not None:
                close()
        return ()

    def _post(self, item: Any) -> None:
        """Device thread."""
        self._posted += 1
        self._loop.call_soon_threadsafe(self._arrive, item)
        while self._posted - self._taken > MOST_AHEAD:
            self._room.clear()
            self._room.wait(0.05)
            self.work.check()


class Line:
    """One job runs, at most ``limit`` wait, the others are refused."""

    def __init__(self, executor: Executor, limit: int, board: Board | None = None) -> None:
        self.limit = limit
        self.board = board or Board(None, "")
        self.closed = False
        """Set to take nothing and run nothing any more."""
        self.on_sticky: Callable[[], None] | None = None
        """Called on the event loop when the device is lost to this process."""
        self.served = 0
        self._executor = executor
        self._admitted = 0
        self._current: Job | None = None
        self._mean: float | None = None

    @property
    def running(self) -> int:
        return int(self._current is not None)

    @property
    def running_seconds(self) -> float:
        """How long the running job has had the device; 0 where none runs. Any thread."""
        job = self._current
        return job.service_seconds if job is not None else 0.0

    @property
    def waiting(self) -> int:
        return max(0, self._admitted - self.running)

    @property
    def idle(self) -> bool:
        return self._admitted == 0

    @property
    def mean_service_seconds(self) -> float | None:
        """Running mean; None before the first request."""
        return self._mean

    @property
    def retry_after(self) -> int:
        """Whole seconds, 1 to 60, until those who are here now will have been served."""
        mean = _FIRST_GUESS if self._mean is None else self._mean
        return min(60, max(1, math.ceil(mean * self._admitted)))

    def check(self) -> None:
        """Raises Refused or Closed when a request that came now would not be admitted."""
        if self.closed:
            raise Closed
        if self._admitted > self.limit:
            raise Refused(self.retry_after)

    def submit(self, call: Callable[[], Any], work: Work, key: str = "") -> Job:
        """Admit ``call``, which the device thread will run. Raises Refused or Closed, and
        EndsWorkers for a request that has ended others."""
        self.check()
        if (ended := self.board.ended(key)) >= MOST_ENDED:
            raise EndsWorkers(ended)
        job = Job(self, call, work, key)
        self._admitted += 1
        job._begin(self._executor)
        return job

    def lose(self) -> None:
        """The device is lost to this process: run nothing more, and say so."""
        self.closed = True
        if self.on_sticky is not None:
            self.on_sticky()

    def _free(self) -> None:
        self._admitted -= 1

    def _served(self, seconds: float, error: Exception | None) -> None:
        self._free()
        if isinstance(error, ModelFailed) and error.sticky:
            self.lose()
        if error is None:
            self.served += 1
            old = seconds if self._mean is None else self._mean
            self._mean = old + _WEIGHT * (seconds - old)
