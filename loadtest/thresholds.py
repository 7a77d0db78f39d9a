"""Judges a run by the thresholds of its command line, from Locust's statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loadtest.arguments import limit
from loadtest.measures import CALLER_FACTOR, REFUSED_ROW


@dataclass(frozen=True)
class Verdict:
    name: str
    value: float | None
    """None: there was nothing to judge, which is no pass."""
    limit: float

    @property
    def held(self) -> bool:
        return self.value is not None and self.value <= self.limit

    def __str__(self) -> str:
        value = "nothing to judge" if self.value is None else f"{self.value:.4g}"
        return f"{'held' if self.held else 'EXCEEDED'}: {self.name} {value}, limit {self.limit:g}"


def judge(options: Any, stats: Any) -> list[Verdict]:
    """The verdict on each threshold that is set. ``stats``: a locust.stats.RequestStats."""
    total = stats.total
    answered = total.num_requests - total.num_failures
    refused = sum(entry.num_requests for entry in _rows(stats, REFUSED_ROW))
    asked = total.num_requests + refused
    values = {
        "max_latency_ms": total.get_response_time_percentile(0.95) if answered else None,
        "max_failure_share": total.num_failures / asked if asked else None,
        "max_refused_share": refused / asked if asked else None,
        "max_real_time_factor": _factor(stats),
    }
    names = {
        "max_latency_ms": "p95 of latency in ms",
        "max_failure_share": "share of failed requests",
        "max_refused_share": "share of refused requests",
        "max_real_time_factor": "p95 of the real-time factor, waiting included",
    }
    limits = {key: limit(getattr(options, key)) for key in values}
    return [
        Verdict(names[key], values[key], bound)
        for key, bound in limits.items()
        if bound is not None
    ]


def _factor(stats: Any) -> float | None:
    factors: dict[int, int] = {}
    for entry in _rows(stats, CALLER_FACTOR):
        for value, count in entry.response_times.items():
            factors[value] = factors.get(value, 0) + count
    # Nearest rank: the smallest value that 95 % do not exceed.
    left = sum(factors.values()) * 0.95
    for value in sorted(factors):
        left -= factors[value]
        if left <= 1e-9:
            return value / 1000
    return None


def _rows(stats: Any, name: str) -> Iterator[Any]:
    return (entry for key, entry in stats.entries.items() if key[0] == name)
