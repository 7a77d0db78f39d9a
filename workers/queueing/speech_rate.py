"""Measure how fast this worker speaks, and reject input that would not finish in time.

The rate is a lower bound, so that nothing feasible is rejected: the fixed cost of a request (the
fastest one observed) is subtracted, a low quantile of the rates is used, and a speed counts only
where it makes the request shorter.
"""

from __future__ import annotations

from collections import deque

from workers.errors import ApiError, invalid
from workers.model.contract import SpeechRequest
from workers.queueing.deadline import TimeLimit

MIN_REQUESTS = 8
"""Requests to measure before any is rejected."""

MIN_CHARACTERS = 40
"""Length in characters from which a request is measured; a shorter one is mostly noise."""

_KEPT = 64
_LOW = 0.1  # the quantile that counts


class SpeechRate:
    """Device seconds per character of input. Used on the event loop only."""

    def __init__(self) -> None:
        self._fastest = float("inf")
        self._measured: deque[tuple[float, float]] = deque(maxlen=_KEPT)

    def add(self, request: SpeechRequest, seconds: float) -> None:
        """Record a complete request that held the device for ``seconds``."""
        self._fastest = min(self._fastest, seconds)
        if len(request.input) >= MIN_CHARACTERS:
            at_full_length = min(1.0, request.speed) / len(request.input)
            self._measured.append((seconds, at_full_length))

    def rate(self) -> float:
        """A lower bound of the seconds per character; 0 before enough requests were measured."""
        if len(self._measured) < MIN_REQUESTS:
            return 0.0
        rates = sorted((seconds - self._fastest) * share for seconds, share in self._measured)
        return rates[int(_LOW * len(rates))]

    def check(self, request: SpeechRequest, limit: TimeLimit) -> None:
        """Raise ApiError 400 with the numbers, where the input cannot be spoken within the limit.

        The whole limit counts, not what other workers left of it: a retry would succeed then.
        """
        rate = self.rate() * min(1.0, 1 / request.speed)
        count = len(request.input)
        if rate * count > limit.seconds:
            raise _too_long(count, rate, limit)


def _too_long(count: int, rate: float, limit: TimeLimit) -> ApiError:
    return invalid(
        f"input is too long: {count} characters would take about {rate * count:.0f} s at the "
        f"measured {1000 * rate:.3g} ms per character, and the limit is {limit}; shorten the "
        f"input, or raise the limit.",
        "input",
    )
