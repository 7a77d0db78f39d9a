"""Compare a run's statistics or figures with the thresholds of its command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loadtest.arguments import limit
from loadtest.measures import CALLER_FACTOR, REFUSED_ROW

THRESHOLDS = {
    "max_latency_ms": "p95 of latency in ms",
    "max_failure_share": "share of failed requests",
    "max_refused_share": "share of refused requests",
    "max_real_time_factor": "p95 of the real-time factor, waiting included",
}
"""Each option, and what it limits."""


@dataclass(frozen=True)
class Verdict:
    option: str
    value: float | None
    """None: there was nothing to measure, which does not pass."""
    limit: float

    @property
    def held(self) -> bool:
        return self.value is not None and self.value <= self.limit

    def __str__(self) -> str:
        value = "nothing measured" if self.value is None else f"{self.value:.4g}"
        finding = f"{THRESHOLDS[self.option]} {value}, limit {self.limit:g}"
        option = self.option.replace("_", "-")
        return f"{'held' if self.held else 'EXCEEDED'}: {finding} (--{option})"


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
    return _verdicts(options, values)


def judge_figures(options: Any, total: Mapping[str, Any]) -> list[Verdict]:
    """The same from the figures of all samples, so that it agrees with their table."""
    asked = total["answered"] + total["failed"] + total["refused"]
    values = {
        "max_latency_ms": (total["latency_ms"] or {}).get("p95"),
        "max_failure_share": total["failed"] / asked if asked else None,
        "max_refused_share": total["refused"] / asked if asked else None,
        "max_real_time_factor": (total["caller_factor"] or {}).get("p95"),
    }
    return _verdicts(options, values)


def _verdicts(options: Any, values: Mapping[str, float | None]) -> list[Verdict]:
    limits = {option: limit(getattr(options, option)) for option in THRESHOLDS}
    return [
        Verdict(option, values[option], bound)
        for option, bound in limits.items()
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
