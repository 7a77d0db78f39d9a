"""One admitted request: from its place in the queue to the last item of the model's result.

The device thread runs it and may be ahead of its reader by a bounded number of bytes; everything
else here runs on the event loop, except where a docstring says "device thread".
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any, Literal

from workers.errors import ModelFailed, without_frames
from workers.model.contract import Work

if TYPE_CHECKING:
    from workers.queueing.queue import RequestQueue

MAX_UNREAD = 8 * 2**20
"""Bytes of a stream that the device thread may be ahead of a slow reader: 87 s of 24 kHz float32
audio. The reader and the model hold one more item each."""

MIN_BYTES_PER_SECOND = 16 * 1024
"""Bytes per second, as the model yields them, below which a reader that keeps the device waiting is
cut off: half of telephone quality speech (8 kHz float32), so listeners never are."""

SLOW_READER_WINDOW = 10.0
"""Seconds of device waiting over which that rate is measured: longer than the kernel's buffers take
to drain, and short for the requests in the queue."""

_POLL_INTERVAL = 0.05
"""Seconds between two checks of the deadline while the device waits for a reader."""

Stage = Literal["waiting", "running", "streaming"]


class Dropped(Exception):  # noqa: N818 - an outcome, not a failure
    """The job ended in ``stage``, without its result."""

    reason = "dropped"
    """Label in the metrics."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(f"dropped while {stage}")
        self.stage: Stage = stage


class DeadlinePassed(Dropped):
    reason = "deadline"


class ClientDisconnected(Dropped):
    reason = "caller"


class SlowReader(Dropped):
    """The client read the stream too slowly while the device waited."""

    reason = "slow_reader"

    def __str__(self) -> str:
        return (
            f"The stream was read at less than {MIN_BYTES_PER_SECOND // 1024} KiB/s over "
            f"{SLOW_READER_WINDOW:g} s while the device waited"
        )


class Job:
    """One admitted request: iterate it for what the model returns (one item) or yields (many)."""

    def __init__(
        self, queue: RequestQueue, call: Callable[[], Any], work: Work, key: str = ""
    ) -> None:
        self.work = work
        self.key = key
        """The balancer's id of the request, the same on every worker."""
        self.streams = False
        """Whether the call returned an iterator; known with the first item."""
        self.admitted = time.perf_counter()
        self.started: float | None = None
        self.ended: float | None = None
        self._queue = queue
        self._call: Callable[[], Any] | None = call
        self._loop = asyncio.get_running_loop()
        self.on_dropped: Callable[[], None] | None = None
        """Called on the event loop when the job ends without its result."""
        self.waited = 0.0
        """Seconds for which the device waited for the stream's reader."""
        self._items: deque[tuple[Any, int]] = deque()
        self._posted = False
        self._posted_bytes = 0
        self._taken_bytes = 0
        self._delivered_bytes = 0.0
        self._held_bytes = 0
        self._window_start = (0.0, 0.0)
        self._done = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._room = threading.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._future: Future[None] | None = None

    @property
    def queue_seconds(self) -> float:
        """Seconds that it waited, or has been waiting."""
        return (self.started or time.perf_counter()) - self.admitted

    @property
    def service_seconds(self) -> float:
        """Seconds that it has held the device; 0 before it ran."""
        if self.started is None:
            return 0.0
        return (self.ended or time.perf_counter()) - self.started

    @property
    def busy_seconds(self) -> float:
        """Seconds that the device has worked on it, without waiting for its reader."""
        return self.service_seconds - self.waited

    @property
    def error(self) -> Exception | None:
        """Why it ended without its result; None while it runs, and after a result."""
        return self._error

    @property
    def stage(self) -> Stage:
        if self.started is None:
            return "waiting"
        return "streaming" if self.streams and self._posted else "running"

    def __aiter__(self) -> Job:
        return self

    async def __anext__(self) -> Any:
        """Return the next item. Raises what the model raised (without its frames), or a Dropped."""
        while not self._items:
            if self._error is not None:
                raise self._error
            if self._done:
                raise StopAsyncIteration
            self._waiter = self._loop.create_future()
            await self._waiter
        item, size = self._items.popleft()
        self._delivered_bytes = float(self._taken_bytes)
        self._held_bytes = size
        self._taken_bytes += size
        self._room.set()
        return item

    def delivered(self, share: float) -> None:
        """Record the share, 0 to 1, of the last item that has been sent to the client."""
        self._delivered_bytes = self._taken_bytes - self._held_bytes * (1 - share)

    def cancel(self) -> None:
        """Drop the job, because the client has disconnected. Nothing to do after its end."""
        if not self._done:
            self._drop(ClientDisconnected)

    def _begin(self, executor: Executor) -> None:
        if self.work.deadline is not None:
            left = max(0.0, self.work.deadline - time.monotonic())
            self._timer = self._loop.call_later(left, self._expire)
        self._future = executor.submit(self._run)

    def _expire(self) -> None:
        if not self._done:
            self._drop(DeadlinePassed)

    def _drop(self, reason: type[Dropped]) -> None:
        stage = self.stage
        self.work.cancel()
        self._room.set()
        assert self._future is not None
        if self._future.cancel():
            # It never ran and never will: release its place in the queue at once.
            self._call = None
            self._queue._release()
        self._items.clear()
        self._close(reason(stage))
        if self.on_dropped is not None:
            self.on_dropped()

    def _close(self, error: Exception | None) -> None:
        self._done = True
        self._error = error
        if self._timer is not None:
            self._timer.cancel()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _receive(self, item: Any, size: int) -> None:
        if not self._done:
            self._items.append((item, size))
            self._wake()

    def _finish(self, error: Exception | None, *last: Any) -> None:
        """Called when the device thread is done with it, also where it was dropped meanwhile."""
        assert self.started is not None
        assert self.ended is not None
        self._queue._job_ended(self.ended - self.started, error)
        if not self._done:
            self._items.extend((item, 0) for item in last)
            self._close(error)

    def _run(self) -> None:
        """Device thread."""
        if self._queue.closed:
            # The process is about to exit: without a response, the balancer tries another worker.
            return
        self.started = time.perf_counter()
        self._queue._current = self
        self._queue.crash_guard.begin(self.key)
        error: Exception | None = None
        last: tuple[Any, ...] = ()
        try:
            last = self._call_model()
        except BaseException as raised:
            error = without_frames(raised)
        self._call = None
        self._queue.crash_guard.end()
        self._queue._current = None
        self.ended = time.perf_counter()
        if isinstance(error, ModelFailed) and error.sticky:
            self._queue.closed = True
        with contextlib.suppress(RuntimeError):  # the loop is gone after a drain's deadline
            self._loop.call_soon_threadsafe(self._finish, error, *last)

    def _call_model(self) -> tuple[Any, ...]:
        """Device thread. Return the value as the last item; post a stream's items one by one."""
        self.work.check()
        assert self._call is not None
        value = self._call()
        if not isinstance(value, Iterator):
            return (value,)
        self.streams = True
        try:
            for item in value:
                self._wait_for_room()
                self._post(item)
        finally:
            close = getattr(value, "close", None)
            if close is not None:
                close()
        return ()

    def _post(self, item: Any) -> None:
        """Device thread."""
        size = _size(item)
        self._posted = True
        self._posted_bytes += size
        self._loop.call_soon_threadsafe(self._receive, item, size)

    def _wait_for_room(self) -> None:
        """Device thread. Called only with an item to post: after its last one the model never waits
        for a reader."""
        while True:
            self._room.clear()  # before the check, so that an item taken meanwhile wakes it
            self.work.check()
            if self._posted_bytes - self._taken_bytes <= MAX_UNREAD:
                return
            began = time.perf_counter()
            self._room.wait(_POLL_INTERVAL)
            self.waited += time.perf_counter() - began
            self._check_reading_rate()

    def _check_reading_rate(self) -> None:
        """Device thread. Drop the job where its reader is too slow."""
        waited, delivered = self._window_start
        seconds = self.waited - waited
        if seconds < SLOW_READER_WINDOW:
            return
        if self._delivered_bytes - delivered < MIN_BYTES_PER_SECOND * seconds:
            self.work.cancel()
            self._loop.call_soon_threadsafe(self._drop_slow_reader)
            self.work.check()
        self._window_start = self.waited, self._delivered_bytes

    def _drop_slow_reader(self) -> None:
        if not self._done:
            self._drop(SlowReader)


def _size(item: Any) -> int:
    """Size of a stream's item in bytes, as far as it is known."""
    if isinstance(item, bytes):
        return len(item)
    size = getattr(item, "nbytes", None)  # arrays and tensors
    return size if isinstance(size, int) else sys.getsizeof(item)
