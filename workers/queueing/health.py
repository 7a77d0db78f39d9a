"""Refresh the model's health report after requests, never while a client waits for it.

`health()` is the model's own code and runs on the device thread, where it may take long or hang. So
no route calls it: clients get the last report. It is refreshed when a request has ended, under the
watchdog.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from workers.device_errors import is_sticky
from workers.logs import log
from workers.model.loader import LoadedModel
from workers.queueing.queue import RequestQueue

MIN_INTERVAL = 1.0
"""Minimum seconds between two reports."""

_MIN_INTERVAL_FACTOR = 100
"""A slow report is refreshed so rarely that it takes a hundredth of the device's time."""


class HealthReports:
    """Keeps ``loaded.report`` at most a second older than the last request, where health() is
    quick. Runs on the event loop, except where a docstring says "device thread"."""

    def __init__(self, queue: RequestQueue, loaded: LoadedModel) -> None:
        self._queue = queue
        self._loaded = loaded
        self._next_at = 0.0
        self._pending = False

    def request_ended(self) -> None:
        """Schedule a refresh, one for all requests that end until then."""
        if self._pending:
            return
        self._pending = True
        loop = asyncio.get_running_loop()
        loop.call_later(max(0.0, self._next_at - time.monotonic()), self._submit, loop)

    def _submit(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._queue.closed:
            self._queue.run_internal(lambda: self._refresh(loop))

    def _refresh(self, loop: asyncio.AbstractEventLoop) -> None:
        """Device thread."""
        began = time.monotonic()
        try:
            self._loaded.refresh_report()
        except Exception as error:
            log.warning("the model's health() failed: %s: %s", type(error).__name__, error)
            if is_sticky(error):
                with contextlib.suppress(RuntimeError):  # the loop is gone after a drain
                    loop.call_soon_threadsafe(self._queue.mark_device_lost)
        finally:
            ended = time.monotonic()
            self._next_at = ended + max(MIN_INTERVAL, _MIN_INTERVAL_FACTOR * (ended - began))
            self._pending = False
