"""What one worker and a second one take of the device, against what torch says it has taken."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.gpu.job import Job, ProofError, Row, Rows
from benchmarks.gpu.meter import Meter, meter_of
from benchmarks.gpu.pool import Crew, crew

INTERVAL = 0.05  # seconds: 20 Hz


class Watch:
    """Samples of the memory taken, each with the phase it fell into."""

    def __init__(self, meter: Meter, workers: Crew) -> None:
        self.meter, self.workers = meter, workers
        self.phase = "baseline"
        self.samples: list[Row] = []
        self.failed = ""
        self._over = threading.Event()

    def most(self, *phases: str) -> int:
        return max((s["bytes"] for s in self.samples if s["phase"] in phases), default=0)

    def last(self, phase: str) -> int:
        """Raises ProofError when the driver told nothing of that phase."""
        found = [s["bytes"] for s in self.samples if s["phase"] == phase]
        if not found:
            raise ProofError(f"no sample of the memory while {phase}: {self.failed or 'too short'}")
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
    """Rows of the tables ``memory`` (every sample), ``footprint`` and ``codec``."""
    meter = meter_of(job.uuid)
    with crew("speech", job, "footprint") as workers:
        watch = Watch(meter, workers)
        with watch.running():
            time.sleep(job.scale.rest)
            for number in (1, 2):
                watch.phase = f"{number} starting"
                workers.hire(1)
                watch.phase = f"{number} speaking"
                workers.members[-1].ask(do="once")
                watch.phase = f"{number} resting"
                time.sleep(job.scale.rest)
            torch_says = [member.ask(do="memory") for member in workers.members]
        told = workers.members[0].told
    yield from watch.samples
    before = 0
    for number, said in enumerate(torch_says, 1):
        steady = watch.last(f"{number} resting")
        most = watch.most(*(f"{number} {what}" for what in ("starting", "speaking", "resting")))
        reserved = said.get("reserved")
        yield {
            "table": "footprint",
            "worker": number,
            "peak": most - before,
            "steady": steady - before,
            "torch_reserved": reserved,
            "torch_reserved_most": said.get("reserved_most"),
            "torch_allocated": said.get("allocated"),
            "not_torch": None if reserved is None else steady - before - reserved,
            "ready_seconds": workers.members[number - 1].told["seconds"],
            "samples": sum(s["phase"].startswith(f"{number} ") for s in watch.samples),
        }
        before = steady
    if job.uuid:
        yield {"table": "returned", "bytes": _returned(meter)}
    health = told["told"]
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
    """Bytes still taken once all workers have ended, after a moment for the driver."""
    deadline = time.monotonic() + 5
    while (left := meter.used([])) > 1 << 26 and time.monotonic() < deadline:
        time.sleep(0.1)
    return left
