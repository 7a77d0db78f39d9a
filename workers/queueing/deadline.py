"""The time limit of a request: one deadline across all workers that the balancer tries."""

from __future__ import annotations

import math
import time

from workers.errors import invalid

_OLDEST = 3600.0
"""Largest plausible age of a request in seconds, or four times its limit where that is longer. A
header with a greater age comes from another clock."""

_CLOCK_STEP = 1.0
"""Seconds by which X-Request-Start may lie in the future: it is rounded."""


class TimeLimit:
    """Starts when the balancer received the request (X-Request-Start: Unix seconds, the same on
    every worker that it tries), else now."""

    def __init__(self, seconds: float, started: str) -> None:
        """``seconds``: the configured limit. ``started``: the header, empty if missing."""
        self.seconds = seconds
        self.began = time.monotonic() - _age(started, seconds)
        self._source = "workers.request_timeout"

    def __str__(self) -> str:
        return f"{self.seconds:g} s ({self._source})"

    @property
    def deadline(self) -> float:
        """A ``time.monotonic()`` value."""
        return self.began + self.seconds

    @property
    def remaining(self) -> float:
        """Seconds until the deadline; 0 when it has passed."""
        return max(0.0, self.deadline - time.monotonic())

    def shorten(self, requested: str) -> None:
        """Lower the limit to X-Request-Timeout. Raises ApiError 400 where it is not a duration."""
        try:
            seconds = float(requested)
        except ValueError:
            seconds = math.nan
        if not (math.isfinite(seconds) and seconds > 0):
            raise invalid(
                f"X-Request-Timeout must be a positive number of seconds, got {requested[:40]!r}.",
                "X-Request-Timeout",
            )
        if seconds < self.seconds:
            self.seconds, self._source = seconds, "X-Request-Timeout"


def _age(started: str, seconds: float) -> float:
    """Seconds since the request started; 0 where the header is missing or implausible."""
    try:
        age = time.time() - float(started) if started else 0.0
    except ValueError:
        return 0.0
    sane = -_CLOCK_STEP <= age <= max(_OLDEST, 4 * seconds)
    return max(0.0, age) if sane else 0.0
