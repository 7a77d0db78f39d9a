"""How long one request may take: one deadline, whichever workers it is tried on."""

from __future__ import annotations

import math
import time

from workers.errors import invalid

_OLDEST = 3600.0
"""Seconds since the balancer took a request in, or four times its limit where that is longer. A
header that says more than this comes from another clock."""

_CLOCK_STEP = 1.0
"""Seconds by which X-Request-Start may lie in the future: it is rounded."""


class TimeLimit:
    """Runs from when the balancer took the request in (X-Request-Start: Unix seconds, the same at
    every worker that it tries), else from now."""

    def __init__(self, seconds: float, started: str) -> None:
        """``seconds``: what is configured. ``started``: the header, empty where there is none."""
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
        """To what X-Request-Timeout asks for. Raises ApiError 400 for what is no time."""
        try:
            seconds = float(requested)
        except ValueError:
            seconds = math.nan
        if not (math.isfinite(seconds) and seconds > 0):
            raise invalid(
                f"X-Request-Timeout is {requested[:40]!r}; a number of seconds above 0 is needed.",
                "X-Request-Timeout",
            )
        if seconds < self.seconds:
            self.seconds, self._source = seconds, "X-Request-Timeout"


def _age(started: str, seconds: float) -> float:
    """Seconds since then; 0 where the header is missing or not sane."""
    try:
        age = time.time() - float(started) if started else 0.0
    except ValueError:
        return 0.0
    sane = -_CLOCK_STEP <= age <= max(_OLDEST, 4 * seconds)
    return max(0.0, age) if sane else 0.0
