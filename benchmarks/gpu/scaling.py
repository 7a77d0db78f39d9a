"""One to many worker processes on one device, each decoding in a closed loop."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.gpu import mps
from benchmarks.gpu.job import GIB, Job, Row, Rows
from benchmarks.gpu.meter import Meter, meter_of
from benchmarks.gpu.pool import Crew, crew

AHEAD = 0.2
"""Seconds between the order to begin and the beginning, so that all begin together."""
Requests = list[tuple[float, float, int]]


def run(job: Job) -> Rows:
    """Rows of the tables ``workers`` (one for each number of them) and ``requests`` (all)."""
    (model,) = job.models
    meter = meter_of(job.uuid)
    with crew(model, job, f"{model}{'-mps' if job.mps else ''}") as workers:
        workers.hire(1)
        counts = _affordable(job, workers, meter)
        workers.hire(max(counts) - 1)
        attached = ""
        if job.mps:
            attached = mps.check_attached(os.environ, [w.pid for w in workers.members])
        for count in counts:
            for pinned in (False, True):
                if pinned and count > _cores():
                    continue
                same: Row = {"model": model, "mode": "mps" if job.mps else "time-sliced"}
                same |= {"workers": count, "pinned": pinned, "attached": attached}
                yield from _measure(workers, count, pinned, meter, same)


def _affordable(job: Job, workers: Crew, meter: Meter) -> list[int]:
    """The numbers of workers for which the device's memory suffices, by what the first takes."""
    free, took = meter.free(), meter.used([workers.members[0].pid])
    if free is None:
        return list(job.scale.workers)
    room = 1 + max(0, int((free - max(GIB, 0.05 * (free + took))) // max(took * 1.1, 1)))
    return [count for count in job.scale.workers if count <= room]


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _measure(workers: Crew, count: int, pinned: bool, meter: Meter, same: Row) -> Rows:
    members = workers.members[:count]
    available = sorted(os.sched_getaffinity(0))
    begin = time.monotonic() + AHEAD
    end = begin + workers.job.scale.window
    share = len(available) // count
    for number, member in enumerate(members):
        own = available[number * share : (number + 1) * share] if pinned else available
        member.send(do="run", begin=begin, end=end, cores=own)
    with _watching(meter, end) as vitals:
        answers: list[Requests] = [member.receive()["requests"] for member in members]
    for number, requests in enumerate(answers, 1):
        for begun, seconds, frames in requests:
            yield {
                "table": "requests",
                **same,
                "worker": number,
                "begun": begun - begin,
                "seconds": seconds,
                "frames": frames,
            }
    rates = [rate(requests, end) for requests in answers]
    taken = sorted(seconds for requests in answers for begun, seconds, _ in requests)
    yield {
        "table": "workers",
        **same,
        "requests": len(taken),
        "frames_per_second": sum(rates),
        "slowest_worker": min(rates),
        "fastest_worker": max(rates),
        "p50": quantile(taken, 0.50),
        "p95": quantile(taken, 0.95),
        **{name: statistics.fmean(values) for name, values in vitals.items()},
    }


def rate(requests: Requests, end: float) -> float:
    """Frames a second of one worker, from its first request's beginning to an end.

    What ended after ``end`` was helped by workers that had stopped already; it counts only where
    there is nothing else.
    """
    counted = [r for r in requests if r[0] + r[1] <= end] or requests[:1]
    last = max(begun + seconds for begun, seconds, _ in counted)
    return sum(frames for _, _, frames in counted) / (last - counted[0][0])


def quantile(ascending: list[float], share: float) -> float:
    """The smallest value that at least ``share`` of all do not exceed."""
    index = -(-len(ascending) * share // 1) - 1
    return ascending[max(0, min(len(ascending) - 1, int(index)))]


@contextmanager
def _watching(meter: Meter, end: float) -> Iterator[dict[str, list[float]]]:
    """The device's power and clock, a few times a second until ``end``."""
    found: dict[str, list[float]] = {}
    over = threading.Event()

    def watch() -> None:
        while time.monotonic() < end and not over.wait(0.1):
            for name, value in meter.vitals().items():
                found.setdefault(name, []).append(value)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
