"""Admission: run, wait, or reject. A one-thread executor is the queue, first in, first out.

The next job is already in the executor when one ends, so the device idles for a fraction of a
millisecond between two. The model runs on that one thread only; everything here runs on the event
loop, except where a docstring says otherwise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from workers.errors import ModelFailed
from workers.model.contract import Work
from workers.queueing.crash_guard import MAX_CRASHES, CrashGuard
from workers.queueing.job import Job

_FIRST_GUESS = 1.0  # seconds a request takes, before one was seen
_WEIGHT = 0.2  # of the newest service time in the running mean


class QueueFull(Exception):  # noqa: N818 - an outcome, not a failure
    """The queue is full. ``retry_after``: whole seconds until its requests are served."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; retry after {retry_after} s")
        self.retry_after = retry_after


class QueueClosed(Exception):  # noqa: N818 - an outcome, not a failure
    """The worker is shutting down and accepts no more requests."""


class CrashesWorkers(Exception):  # noqa: N818 - an outcome, not a failure
    """The request has crashed other workers."""

    def __init__(self, ended: int) -> None:
        super().__init__(f"the request crashed {ended} workers")
        self.ended = ended


class RequestQueue:
    """Runs one job, lets at most ``limit`` wait, and rejects the others."""

    def __init__(
        self, executor: Executor, limit: int, crash_guard: CrashGuard | None = None
    ) -> None:
        self.limit = limit
        self.crash_guard = crash_guard or CrashGuard(None, "")
        self.closed = False
        """Set to accept and run nothing more."""
        self.on_device_lost: Callable[[], None] | None = None
        """Called on the event loop when the device is lost to this process."""
        self.on_request_ended: Callable[[], None] | None = None
        """Called on the event loop when a request has left the device."""
        self.completed = 0
        self._executor = executor
        self._admitted = 0
        self._current: Job | None = None
        self._internal_since: float | None = None
        self._mean: float | None = None

    @property
    def running(self) -> int:
        return int(self._current is not None)

    @property
    def running_seconds(self) -> float:
        """Seconds that the running job has held the device; 0 where none runs. Any thread."""
        job = self._current
        return job.service_seconds if job is not None else 0.0

    @property
    def internal_seconds(self) -> float:
        """Seconds that a call of ``run_internal`` has held the device; 0 where none runs. Any
        thread."""
        since = self._internal_since
        return time.perf_counter() - since if since is not None else 0.0

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
        """Whole seconds, at least 1, until all admitted requests are served."""
        mean = _FIRST_GUESS if self._mean is None else self._mean
        return max(1, math.ceil(mean * self._admitted))

    def check(self) -> None:
        """Raise QueueFull or QueueClosed where a request would not be admitted now."""
        if self.closed:
            raise QueueClosed
        if self._admitted > self.limit:
            raise QueueFull(self.retry_after)

    def submit(self, call: Callable[[], Any], work: Work, key: str = "") -> Job:
        """Admit ``call``, which the device thread will run.

        Raises QueueFull, QueueClosed, or CrashesWorkers for a request that has crashed others.
        """
        self.check()
        if (ended := self.crash_guard.ended(key)) >= MAX_CRASHES:
            raise CrashesWorkers(ended)
        job = Job(self, call, work, key)
        self._admitted += 1
        job._begin(self._executor)
        return job

    def run_internal(self, call: Callable[[], None]) -> None:
        """Run ``call``, which is not a request, on the device thread after what waits now."""

        def run() -> None:
            self._internal_since = time.perf_counter()
            try:
                call()
            finally:
                self._internal_since = None

        self._executor.submit(run)

    def mark_device_lost(self) -> None:
        """Close the queue and report that the device is lost to this process."""
        self.closed = True
        if self.on_device_lost is not None:
            self.on_device_lost()

    def _release(self) -> None:
        self._admitted -= 1

    def _job_ended(self, seconds: float, error: Exception | None) -> None:
        self._release()
        if isinstance(error, ModelFailed) and error.sticky:
            self.mark_device_lost()
        if error is None:
            self.completed += 1
            old = seconds if self._mean is None else self._mean
            self._mean = old + _WEIGHT * (seconds - old)
        if self.on_request_ended is not None:
            self.on_request_ended()
