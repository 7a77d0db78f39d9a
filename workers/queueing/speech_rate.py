"""How fast this worker speaks, as measured, and what can therefore not be spoken in time.

An estimate from below, so that nothing is refused which could be done: what a request takes at all
(the fastest one seen) is left out of the rate, of the rates the low ones count, and a speed counts
only where it makes the request shorter.
"""

from __future__ import annotations

from collections import deque

from workers.errors import ApiError, invalid
from workers.model.contract import SpeechRequest
from workers.queueing.deadline import TimeLimit

MIN_REQUESTS = 8
"""Requests that have to be measured before any is refused."""

MIN_CHARACTERS = 40
"""Characters of a request that says something of the rate; a shorter one is mostly noise."""

_KEPT = 64
_LOW = 0.1  # the quantile that counts


class SpeechRate:
    """Device seconds for each character of input. Lives on the event loop."""

    def __init__(self) -> None:
        self._fastest = float("inf")
        self._measured: deque[tuple[float, float]] = deque(maxlen=_KEPT)

    def add(self, request: SpeechRequest, seconds: float) -> None:
        """Count a request that was spoken to its end and had the device for ``seconds``."""
        self._fastest = min(self._fastest, seconds)
        if len(request.input) >= MIN_CHARACTERS:
            at_full_length = min(1.0, request.speed) / len(request.input)
            self._measured.append((seconds, at_full_length))

    def rate(self) -> float:
        """Seconds a character takes, from below; 0 before enough requests were measured."""
        if len(self._measured) < MIN_REQUESTS:
            return 0.0
        rates = sorted((seconds - self._fastest) * share for seconds, share in self._measured)
        return rates[int(_LOW * len(rates))]

    def check(self, request: SpeechRequest, limit: TimeLimit) -> None:
        """Raises ApiError 400 with the numbers, for what cannot be spoken in a request's time.

        That is its whole time, not what other workers left of it: the same text would do then.
        """
        rate = self.rate() * min(1.0, 1 / request.speed)
        count = len(request.input)
        if rate * count > limit.seconds:
            raise _too_long(count, rate, limit)


def _too_long(count: int, rate: float, limit: TimeLimit) -> ApiError:
    return invalid(
        f"input of {count} characters would take about {rate * count:.0f} s at the measured "
        f"{1000 * rate:.3g} ms per character; a request may take {limit}: shorten the input, or "
        f"raise that limit.",
        "input",
    )
