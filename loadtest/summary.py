"""Figures from raw samples, and from nothing else: for every step of a run, and for all of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from loadtest.samples import FAILED, OK, REFUSED, UNFINISHED, Sample

# A step ends when the next begins. The shape moves on within a second or so; where the next step
# left no request at all, the planned length counts instead.
_LATE = 2.0
_TOLERANCE = 1e-6
_FEW = 10
"""With fewer values than this, nothing is said of how far their average may be off: latencies are
far from normally distributed, and a handful of them does not show how far."""

Figures = dict[str, Any]


class MismatchError(ValueError):
    """A stored figure that does not follow from its rows."""


def summarise(samples: Sequence[Sample]) -> Figures:
    """``{"steps": [figures …], "total": figures}``."""
    windows = _windows(samples)
    groups = [
        (start, end, [sample for sample in samples if sample.step_start == start])
        for start, end in windows
    ]
    steps = []
    for start, end, rows in groups:
        users = rows[0].step_users
        steps.append({"users": users, **_figures(rows, samples, [(start, end)])})
    return {"steps": steps, "total": {"users": None, **_figures(samples, samples, windows)}}


def _windows(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """When each step began and ended, in unix seconds."""
    planned = {sample.step_start: sample.step_seconds for sample in samples}
    starts = sorted(planned)
    windows = []
    for start, after in zip(starts, [*starts[1:], math.inf], strict=True):
        last = max(sample.ended for sample in samples if sample.step_start == start)
        end = start + planned[start] if planned[start] else last
        windows.append((start, after if after <= end + _LATE else end))
    return windows


def _figures(
    rows: Sequence[Sample], everyone: Sequence[Sample], windows: Sequence[tuple[float, float]]
) -> Figures:
    """Latencies are those of ``rows``; rates are of whatever ended inside of the windows."""
    seconds = sum(end - start for start, end in windows)
    ended = [
        sample
        for sample in everyone
        if sample.outcome == OK and any(start <= sample.ended < end for start, end in windows)
    ]
    answered = [sample for sample in rows if sample.outcome == OK]
    outcomes = Counter(sample.outcome for sample in rows)
    per_second = len(ended) / seconds if seconds else 0.0
    audio = sum(sample.audio_seconds or 0.0 for sample in ended)
    return {
        "seconds": seconds,
        "requests": len(rows),
        "answered": outcomes[OK],
        "failed": outcomes[FAILED],
        "refused": outcomes[REFUSED],
        "unfinished": outcomes[UNFINISHED],
        "requests_per_second": per_second,
        "requests_per_minute": 60 * per_second,
        "times_real_time": audio / seconds if seconds else 0.0,
        "latency_ms": _spread([sample.latency_ms for sample in answered]),
        "queue_ms": _spread(list(_reported(answered, lambda sample: sample.queue_ms))),
        "inference_ms": _spread(list(_reported(answered, lambda sample: sample.inference_ms))),
        "first_audio_ms": _spread(
            [
                sample.first_byte_ms
                for sample in answered
                if sample.kind == "stream" and sample.first_byte_ms is not None
            ]
        ),
        "real_time_factor": _spread(
            list(_reported(answered, lambda sample: sample.real_time_factor))
        ),
        "caller_factor": _spread(list(_reported(answered, lambda sample: sample.caller_factor))),
        "workers": len({sample.worker for sample in answered if sample.worker}),
    }


def _reported(
    samples: Sequence[Sample], value: Callable[[Sample], float | None]
) -> Iterator[float]:
    return (known for sample in samples if (known := value(sample)) is not None)


def _spread(values: list[float]) -> Figures | None:
    """n, average with its 95 % interval, percentiles; None where there are no values.

    The interval is the average plus and minus ``average_plus_minus``; None with too few values.
    """
    if not values:
        return None
    values = sorted(values)
    n = len(values)
    average = math.fsum(values) / n
    margin = None
    if n >= _FEW:
        variance = math.fsum((value - average) ** 2 for value in values) / (n - 1)
        margin = _student(n - 1) * math.sqrt(variance / n)
    low, high = _p95_interval(values)
    return {
        "n": n,
        "average": average,
        "average_plus_minus": margin,
        "p50": percentile(values, 0.50),
        "p95": percentile(values, 0.95),
        "p95_low": low,
        "p95_high": high,
        "p99": percentile(values, 0.99),
        "max": values[-1],
    }


def _student(freedom: int) -> float:
    """Student's t that 97.5 % do not exceed, by its expansion; right to 0.001 from 9 degrees on."""
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def percentile(ordered: Sequence[float], share: float) -> float:
    """Nearest rank: the smallest value that ``share`` of all do not exceed, so a real sample."""
    return ordered[max(math.ceil(share * len(ordered) - 1e-9), 1) - 1]


def _p95_interval(ordered: Sequence[float]) -> tuple[float | None, float | None]:
    """Where the true p95 lies, with 95 % confidence, whatever the distribution (order statistics).

    An end for which there are too few samples is None.
    """
    n, cumulated, low, high = len(ordered), 0.0, None, None
    for k in range(n):
        # P(at most k of n samples lie below the true p95)
        cumulated += math.exp(
            math.lgamma(n + 1)
            - math.lgamma(k + 1)
            - math.lgamma(n - k + 1)
            + k * math.log(0.95)
            + (n - k) * math.log(0.05)
        )
        if cumulated <= 0.025:
            low = ordered[k]
        if high is None and cumulated >= 0.975:
            high = ordered[k]
    return low, high


def compare(stored: Any, computed: Any, where: str = "") -> None:
    """Raises MismatchError, naming the first figure that does not follow from the rows."""
    if isinstance(stored, dict) and isinstance(computed, dict):
        for key in sorted({*stored, *computed}):
            place = f"{where}.{key}" if where else str(key)
            if key not in stored or key not in computed:
                raise MismatchError(f"{place} is only in the {_holder(key in stored)}")
            compare(stored[key], computed[key], place)
    elif isinstance(stored, list) and isinstance(computed, list):
        if len(stored) != len(computed):
            raise MismatchError(f"{where}: {len(stored)} stored, but the rows give {len(computed)}")
        for index, pair in enumerate(zip(stored, computed, strict=True)):
            compare(*pair, f"{where}[{index}]")
    elif not _same(stored, computed):
        raise MismatchError(f"{where} is stored as {stored}, but the rows give {computed}")


def _holder(stored: bool) -> str:
    return "stored summary" if stored else "rows"


def _same(stored: Any, computed: Any) -> bool:
    if isinstance(stored, int | float) and isinstance(computed, int | float):
        return math.isclose(stored, computed, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    return bool(stored == computed)
