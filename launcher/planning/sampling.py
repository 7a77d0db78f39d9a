"""Sample the memory that one worker uses, about twenty times a second, in a thread."""

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
"""Seconds to wait until a device's free memory stops changing."""
TOLERANCE = 64 * MIB
"""Bytes by which free device memory may differ: drivers round, other processes fluctuate."""


@dataclass(frozen=True)
class Usage:
    """Memory in use at one moment, in bytes."""

    device: int
    host: int
    """PSS of the process tree."""


class Sampler(Protocol):
    """Measures a worker's use of its device and of the host."""

    def begin(self) -> None:
        """Take the baseline. Call it before the worker starts."""

    def sample(self, pid: int) -> Usage:
        """Return the current usage. Raises LookupError when the device does not respond."""

    def returned(self) -> bool:
        """Return, after the worker has ended, whether the measurement was undisturbed.

        That is: the device is back at its baseline and no other process is known to have changed
        its memory.
        """


class CpuSampler:
    """Sampler of the CPU: a worker's device memory is the RAM of its process tree."""

    def begin(self) -> None:
        pass

    def sample(self, pid: int) -> Usage:
        pss = tree_pss(pid)
        return Usage(device=pss, host=pss)

    def returned(self) -> bool:
        return True


class GpuSampler:
    """Sampler of a GPU by its free memory: per-process figures of the driver are unreliable."""

    def __init__(self, driver: Driver, uuid: str, timeout: float = SETTLE_TIMEOUT) -> None:
        """``timeout``: seconds to wait until the device's free memory stops changing."""
        self._driver = driver
        self._uuid = uuid
        self._timeout = timeout
        self._baseline = 0
        self._host = 0
        self._round = 0
        self._tenants: set[int] = set()
        self._freed = False
        """Whether more was free than at the baseline: another process freed memory."""

    def begin(self) -> None:
        """Wait until free memory is stable, so that another process's exit does not count."""
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
        self._freed = self._freed or taken <= -TOLERANCE
        return Usage(max(0, taken), self._host)

    def returned(self) -> bool:
        return self._is_at_baseline() and not self._freed and self._tenants_stayed()

    def _tenants_stayed(self) -> bool:
        """Return whether the device's other processes still run.

        If one ends while another starts, the sum of free memory may not show it.
        """
        return self._tenants <= {tenant.pid for tenant in self._driver.tenants(self._uuid)}

    def _is_at_baseline(self) -> bool:
        deadline = time.monotonic() + self._timeout
        while True:
            difference = self._driver.free(self._uuid) - self._baseline
            if abs(difference) < TOLERANCE:
                return True
            if difference > 0 or time.monotonic() > deadline:
                return False
            time.sleep(0.1)


def tree_pss(pid: int) -> int:
    """Return the PSS of a process and its descendants in bytes; 0 when it has ended."""
    try:
        process = psutil.Process(pid)
        tree = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0
    return sum(_pss(member) for member in tree)


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
    """Records the highest usage of each phase. The caller switches the phase with ``enter``."""

    def __init__(self, sample: Callable[[], Usage], interval: float = INTERVAL) -> None:
        self._sample = sample
        self._interval = interval
        self._stopping = threading.Event()
        self.phase = "starting"
        self.samples = 0
        self.device: dict[str, int] = {}
        """Phase → maximum bytes of the device."""
        self.host = 0
        """Maximum bytes of RAM in any phase."""
        self.failed = ""
        """Why sampling ended early; empty if it did not."""

    @contextmanager
    def running(self) -> Iterator[MemoryWatch]:
        thread = threading.Thread(target=self._run, name="sampling", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stopping.set()
            thread.join()

    def enter(self, phase: str) -> None:
        """Assign the following samples to ``phase``, and take one at once."""
        self.phase = phase
        self.take()

    def take(self) -> None:
        """Take one sample. Raises LookupError when the device does not respond."""
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
            # Never spend more than a fifth of a core on sampling.
            self._stopping.wait(max(self._interval - cost, 4 * cost))


def sampler_for(kind: str, uuid: str, driver: Driver | None) -> Sampler:
    """Return the sampler of a device."""
    if kind == "cpu" or driver is None:
        return CpuSampler()
    return GpuSampler(driver, uuid, SETTLE_TIMEOUT)
