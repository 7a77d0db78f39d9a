"""Exit when a model call hangs, so that supervisord restarts the worker."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback

from workers.logs import log
from workers.queueing.queue import RequestQueue

EXIT_STUCK = 1
GRACE = 5.0
"""Seconds beyond twice the longest request."""
_CHECKS_PER_TIMEOUT = 20
"""A check costs microseconds."""


def call_timeout(request_timeout: float) -> float:
    """Seconds that a call may hold the device. Its client got a 504 after the first half; a model
    that is merely slow may return in the second."""
    return 2 * request_timeout + GRACE


def health_timeout(request_timeout: float) -> float:
    """Seconds that health() may hold the device: so few that a request which waits behind it still
    has half of its time when this process has exited and another worker gets it."""
    return max(GRACE, request_timeout / 2)


def start_watchdog(queue: RequestQueue, request_timeout: float) -> None:
    """Start the thread that exits this process once a call exceeds its timeout."""
    limits = call_timeout(request_timeout), health_timeout(request_timeout)
    threading.Thread(
        target=_run_watchdog, args=(queue, *limits), name="watchdog", daemon=True
    ).start()


def _run_watchdog(queue: RequestQueue, limit: float, health_limit: float) -> None:
    while True:
        seconds, health_seconds = queue.running_seconds, queue.internal_seconds
        if seconds > limit or health_seconds > health_limit:
            break
        time.sleep(min(5.0, limit / _CHECKS_PER_TIMEOUT))
    log.critical(
        "a call of the model has not returned for %.0f s; exiting with %d, it was in: %s",
        max(seconds, health_seconds),
        EXIT_STUCK,
        _device_thread_stack(),
    )
    os._exit(EXIT_STUCK)


def _device_thread_stack() -> str:
    """The innermost frames of the device thread."""
    frames = sys._current_frames()
    for thread in threading.enumerate():
        if thread.name.startswith("device") and thread.ident in frames:
            stack = traceback.extract_stack(frames[thread.ident])[-3:]
            return " < ".join(f"{f.name} ({f.filename}:{f.lineno})" for f in reversed(stack))
    return "an unknown place"
