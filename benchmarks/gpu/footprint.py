"""Memory that a first and a second worker take of the device, and what torch reports of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.gpu.job import BenchmarkError, Job, Row, Rows
from benchmarks.gpu.meter import Meter, meter_of
from benchmarks.gpu.pool import WorkerPool, worker_pool

INTERVAL = 0.05  # seconds: 20 Hz


class MemorySampler:
    """Samples the memory in use, each sample with its phase."""

    def __init__(self, meter: Meter, workers: WorkerPool) -> None:
        self.meter, self.workers = meter, workers
        self.phase = "baseline"
        self.samples: list[Row] = []
        self.failed = ""
        self._over = threading.Event()

    def most(self, *phases: str) -> int:
        return max((s["bytes"] for s in self.samples if s["phase"] in phases), default=0)

    def last(self, phase: str) -> int:
        """Return the last sample of a phase. Raises BenchmarkError when it has none."""
        found = [s["bytes"] for s in self.samples if s["phase"] == phase]
        if not found:
            raise BenchmarkError(
                f"no sample of the memory while {phase}: {self.failed or 'too short'}"
            )
        return int(found[-1])

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _run(self) -> None:
        begun = time.monotonic()
        try:
            while not self._over.wait(INTERVAL):
                phase = self.phase
                used = self.meter.used([member.pid for member in self.workers.members])
                at = time.monotonic() - begun
                self.samples.append(
                    {"table": "memory", "seconds": at, "phase": phase, "bytes": used}
                )
        except LookupError as error:
            self.failed = str(error)


def run(job: Job) -> Rows:
    """Yield rows of the tables ``memory`` (every sample), ``footprint`` and ``codec``."""
    meter = meter_of(job.uuid)
    with worker_pool("speech", job, "footprint") as workers:
        sampler = MemorySampler(meter, workers)
        with sampler.running():
            time.sleep(job.scale.rest)
            for number in (1, 2):
                sampler.phase = f"{number} starting"
                workers.start(1)
                sampler.phase = f"{number} speaking"
                workers.members[-1].ask(do="once")
                sampler.phase = f"{number} resting"
                time.sleep(job.scale.rest)
            torch_memory = [member.ask(do="memory") for member in workers.members]
        health = workers.members[0].ready["health"]
    yield from sampler.samples
    before = 0
    for number, reported in enumerate(torch_memory, 1):
        steady = sampler.last(f"{number} resting")
        most = sampler.most(*(f"{number} {what}" for what in ("starting", "speaking", "resting")))
        reserved = reported.get("reserved")
        yield {
            "table": "footprint",
            "worker": number,
            "peak": most - before,
            "steady": steady - before,
            "torch_reserved": reserved,
            "torch_reserved_most": reported.get("reserved_most"),
            "torch_allocated": reported.get("allocated"),
            "not_torch": None if reserved is None else steady - before - reserved,
            "ready_seconds": workers.members[number - 1].ready["seconds"],
            "samples": sum(s["phase"].startswith(f"{number} ") for s in sampler.samples),
        }
        before = steady
    if job.uuid:
        yield {"table": "returned", "bytes": _returned(meter)}
    codec = health["codec_decoder"]
    yield {
        "table": "codec",
        "provider": codec["provider"],
        "nodes": codec["nodes"],
        "fallback": codec.get("fallback", []),
        "engine": health["engine"],
        "dtype": health["dtype"],
    }


def _returned(meter: Meter) -> int:
    """Return the bytes still in use after all workers have exited and the driver has caught up."""
    deadline = time.monotonic() + 5
    while (left := meter.used([])) > 1 << 26 and time.monotonic() < deadline:
        time.sleep(0.1)
    return left
