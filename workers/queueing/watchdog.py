"""A model that does not come back: the process ends, and whoever supervises it starts another."""

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
_CHECKS = 20
"""How often the patience is divided; a look costs microseconds."""


def patience(request_timeout: float) -> float:
    """Seconds a call may have the device. Its caller was answered 504 after the first half, and a
    model that is only slow may still come back in the second."""
    return 2 * request_timeout + GRACE


def report_patience(request_timeout: float) -> float:
    """Seconds a call of health() may have the device: so few that a request which waits behind it
    still has half of its time when this process has ended and another worker gets it."""
    return max(GRACE, request_timeout / 2)


def watch(queue: RequestQueue, request_timeout: float) -> None:
    """End this process once a call has had the device for longer than the patience."""
    limits = patience(request_timeout), report_patience(request_timeout)
    threading.Thread(target=_watch, args=(queue, *limits), name="watch", daemon=True).start()


def _watch(queue: RequestQueue, limit: float, report_limit: float) -> None:
    while True:
        seconds, report_seconds = queue.running_seconds, queue.aside_seconds
        if seconds > limit or report_seconds > report_limit:
            break
        time.sleep(min(5.0, limit / _CHECKS))
    log.critical(
        "a call of the model has not come back for %.0f s; ending with %d, it was in: %s",
        max(seconds, report_seconds),
        EXIT_STUCK,
        _where(),
    )
    os._exit(EXIT_STUCK)


def _where() -> str:
    """The innermost frames of the device thread."""
    frames = sys._current_frames()
    for thread in threading.enumerate():
        if thread.name.startswith("device") and thread.ident in frames:
            stack = traceback.extract_stack(frames[thread.ident])[-3:]
            return " < ".join(f"{f.name} ({f.filename}:{f.lineno})" for f in reversed(stack))
    return "a place unknown"
