"""Watching the memory that one worker takes, about twenty times a second, in a thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from launcher.config.sizes import MIB
from launcher.planning.nvml import Driver

INTERVAL = 0.05
"""Seconds between samples."""
SETTLE_TIMEOUT = 10.0
"""Seconds to wait for a device's memory to come to rest."""
SETTLED = 64 * MIB
"""Free device memory that differs by less is the same: drivers round, other tenants breathe."""


@dataclass(frozen=True)
class Usage:
    """Bytes at one moment."""

    device: int
    host: int
    """PSS of the process tree."""


class Sampler(Protocol):
    """How much a worker takes of its device and of the host."""

    def begin(self) -> None:
        """Called before the worker starts, with the device as others leave it."""

    def sample(self, pid: int) -> Usage:
        """Now. Raises LookupError when the device does not answer."""

    def returned(self) -> bool:
        """After the worker has ended: whether the device is again as it was at the beginning, and
        no other process is known to have moved its memory meanwhile."""


class CpuSampler:
    """The device is the CPU: its memory is the RAM of the process tree."""

    def begin(self) -> None:
        pass

    def sample(self, pid: int) -> Usage:
        pss = tree_pss(pid)
        return Usage(device=pss, host=pss)

    def returned(self) -> bool:
        return True


class GpuSampler:
    """Changes of the device's free memory; what the driver tells of a process is unreliable."""

    def __init__(self, driver: Driver, uuid: str, timeout: float = SETTLE_TIMEOUT) -> None:
        """``patience``: seconds to wait for the device's memory to come to rest."""
        self._driver = driver
        self._uuid = uuid
        self._timeout = timeout
        self._baseline = 0
        self._host = 0
        self._round = 0
        self._tenants: set[int] = set()
        self._freed = False
        """Whether more was free than at the beginning: another process gave memory back."""

    def begin(self) -> None:
        """Wait until nothing moves, so that somebody's exit is not taken for our start."""
        last = self._driver.free(self._uuid)
        deadline = time.monotonic() + self._timeout
        while time.monotonic() < deadline:
            time.sleep(min(0.25, self._timeout))
            now = self._driver.free(self._uuid)
            if abs(now - last) < MIB:
                last = now
                break
            last = now
        self._baseline = last
        self._freed = False
        self._tenants = {tenant.pid for tenant in self._driver.tenants(self._uuid)}

    def sample(self, pid: int) -> Usage:
        if self._round % 10 == 0:  # reading a large process's maps takes milliseconds
            self._host = tree_pss(pid)
        self._round += 1
        taken = self._baseline - self._driver.free(self._uuid)
        self._freed = self._freed or taken <= -SETTLED
        return Usage(max(0, taken), self._host)

    def returned(self) -> bool:
        return self._is_as_before() and not self._freed and self._tenants_stayed()

    def _tenants_stayed(self) -> bool:
        """Whether all who were there still are. One that left while another came moves memory
        without a trace in the sum. Of those who came the sum tells."""
        return self._tenants <= {tenant.pid for tenant in self._driver.tenants(self._uuid)}

    def _is_as_before(self) -> bool:
        deadline = time.monotonic() + self._timeout
        while True:
            difference = self._driver.free(self._uuid) - self._baseline
            if abs(difference) < SETTLED:
                return True
            if difference > 0 or time.monotonic() > deadline:
                return False
            time.sleep(0.1)


def tree_pss(pid: int) -> int:
    """Proportional set size of a process and its descendants, in bytes; 0 once it has gone."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0
    return sum(_pss(member) for member in family)


def _pss(process: psutil.Process) -> int:
    rollup = Path(f"/proc/{process.pid}/smaps_rollup")
    with contextlib.suppress(OSError, ValueError):
        for line in rollup.read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


class MemoryWatch:
    """The highest usage of each phase. ``phase`` is switched by whoever runs the worker."""

    def __init__(self, sample: Callable[[], Usage], interval: float = INTERVAL) -> None:
        self._sample = sample
        self._interval = interval
        self._stopping = threading.Event()
        self.phase = "starting"
        self.samples = 0
        self.device: dict[str, int] = {}
        """Phase → the most bytes of the device."""
        self.host = 0
        """The most bytes of RAM, whatever the phase."""
        self.failed = ""
        """Why sampling ended early; empty while all is well."""

    @contextmanager
    def watching(self) -> Iterator[MemoryWatch]:
        thread = threading.Thread(target=self._run, name="sampling", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stopping.set()
            thread.join()

    def enter(self, phase: str) -> None:
        """From here on, samples belong to ``phase``; it gets one at once."""
        self.phase = phase
        self.take()

    def take(self) -> None:
        phase, usage = self.phase, self._sample()
        self.samples += 1
        self.device[phase] = max(self.device.get(phase, 0), usage.device)
        self.host = max(self.host, usage.host)

    def _run(self) -> None:
        while not self._stopping.is_set():
            begun = time.monotonic()
            try:
                self.take()
            except LookupError as error:
                self.failed = str(error)
                return
            cost = time.monotonic() - begun
            # Never spend more than a fifth of a core on looking.
            self._stopping.wait(max(self._interval - cost, 4 * cost))


def sampler_for(kind: str, uuid: str, driver: Driver | None) -> Sampler:
    """The sampler of a device."""
    if kind == "cpu" or driver is None:
        return CpuSampler()
    return GpuSampler(driver, uuid, SETTLE_TIMEOUT)
