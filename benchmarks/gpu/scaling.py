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
from benchmarks.gpu.pool import WorkerPool, worker_pool

START_DELAY = 0.2
"""Seconds between the command and its start time, so that all workers start together."""
Requests = list[tuple[float, float, int]]


def run(job: Job) -> Rows:
    """Yield rows of the tables ``workers`` (one per number of workers) and ``requests`` (all)."""
    (model,) = job.models
    meter = meter_of(job.uuid)
    with worker_pool(model, job, f"{model}{'-mps' if job.mps else ''}") as workers:
        workers.start(1)
        counts = _fitting_counts(job, workers, meter)
        workers.start(max(counts) - 1)
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


def _fitting_counts(job: Job, workers: WorkerPool, meter: Meter) -> list[int]:
    """Return the numbers of workers that fit into device memory, given what the first takes."""
    free, took = meter.free(), meter.used([workers.members[0].pid])
    if free is None:
        return list(job.scale.workers)
    room = 1 + max(0, int((free - max(GIB, 0.05 * (free + took))) // max(took * 1.1, 1)))
    return [count for count in job.scale.workers if count <= room]


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _measure(workers: WorkerPool, count: int, pinned: bool, meter: Meter, same: Row) -> Rows:
    members = workers.members[:count]
    available = sorted(os.sched_getaffinity(0))
    begin = time.monotonic() + START_DELAY
    end = begin + workers.job.scale.window
    share = len(available) // count
    for number, member in enumerate(members):
        own = available[number * share : (number + 1) * share] if pinned else available
        member.send(do="run", begin=begin, end=end, cores=own)
    with _sampling_telemetry(meter, end) as telemetry:
        responses: list[Requests] = [member.receive()["requests"] for member in members]
    for number, requests in enumerate(responses, 1):
        for begun, seconds, frames in requests:
            yield {
                "table": "requests",
                **same,
                "worker": number,
                "begun": begun - begin,
                "seconds": seconds,
                "frames": frames,
            }
    rates = [rate(requests, end) for requests in responses]
    taken = sorted(seconds for requests in responses for begun, seconds, _ in requests)
    yield {
        "table": "workers",
        **same,
        "requests": len(taken),
        "frames_per_second": sum(rates),
        "slowest_worker": min(rates),
        "fastest_worker": max(rates),
        "p50": quantile(taken, 0.50),
        "p95": quantile(taken, 0.95),
        **{name: statistics.fmean(values) for name, values in telemetry.items()},
    }


def rate(requests: Requests, end: float) -> float:
    """Return the frames per second of one worker, from the start of its first request.

    A request that finished after ``end`` ran partly while other workers were idle; it counts only
    if there is no other.
    """
    counted = [r for r in requests if r[0] + r[1] <= end] or requests[:1]
    last = max(begun + seconds for begun, seconds, _ in counted)
    return sum(frames for _, _, frames in counted) / (last - counted[0][0])


def quantile(ascending: list[float], share: float) -> float:
    """Return the smallest value that at least ``share`` of all values do not exceed."""
    index = -(-len(ascending) * share // 1) - 1
    return ascending[max(0, min(len(ascending) - 1, int(index)))]


@contextmanager
def _sampling_telemetry(meter: Meter, end: float) -> Iterator[dict[str, list[float]]]:
    """Sample the device's power and clock several times per second until ``end``."""
    found: dict[str, list[float]] = {}
    over = threading.Event()

    def sampler() -> None:
        while time.monotonic() < end and not over.wait(0.1):
            for name, value in meter.telemetry().items():
                found.setdefault(name, []).append(value)

    thread = threading.Thread(target=sampler, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
