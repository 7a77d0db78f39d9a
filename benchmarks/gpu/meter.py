"""Memory in use on the device by the driver's report: changes of its free memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import psutil

RESTING = 1 << 20  # bytes: a smaller change counts as none
Phase = Callable[[], None]


@dataclass(frozen=True)
class Device:
    """A GPU or a MIG slice of one, as NVML names it."""

    uuid: str
    name: str
    total: int
    driver: str


class Meter(Protocol):
    def used(self, pids: Sequence[int]) -> int:
        """Return the bytes taken since the meter was made. Raises LookupError."""

    def free(self) -> int | None:
        """Return the free bytes; None on a CPU, where they are not limited."""

    def telemetry(self) -> dict[str, float]:
        """Return power in W and clock in MHz now, as far as the driver reports them."""


class CpuMeter:
    """Counts the processes' proportional share of RAM in place of device memory."""

    def used(self, pids: Sequence[int]) -> int:
        total = 0
        for pid in pids:
            with suppress(psutil.Error):
                total += psutil.Process(pid).memory_full_info().pss
        return total

    def free(self) -> int | None:
        return None

    def telemetry(self) -> dict[str, float]:
        return {}


class GpuMeter:
    def __init__(self, uuid: str, timeout: float = 10.0) -> None:
        """Wait until the device's memory in use is stable. Raises LookupError."""
        self._nvml = _open()
        try:
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
        except self._nvml.NVMLError as error:
            raise LookupError(f"{uuid}: {error}") from None
        deadline, last = time.monotonic() + timeout, self.free()
        while time.monotonic() < deadline:
            time.sleep(0.25)
            before, last = last, self.free()
            if abs(last - before) < RESTING:
                break
        self._baseline = last

    def used(self, pids: Sequence[int]) -> int:
        return self._baseline - self.free()

    def free(self) -> int:
        try:
            return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).free)
        except self._nvml.NVMLError as error:
            raise LookupError(f"the driver does not report free memory: {error}") from None

    def telemetry(self) -> dict[str, float]:
        nvml, found = self._nvml, {}
        with suppress(nvml.NVMLError):
            found["watts"] = nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000
        with suppress(nvml.NVMLError):
            clock = nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_SM)
            found["sm_mhz"] = float(clock)
        return found


def _open() -> Any:
    """pynvml, initialised. Raises LookupError where there is no driver."""
    import pynvml  # noqa: PLC0415 - a CPU needs none

    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError, OSError) as error:
        raise LookupError(f"the NVIDIA driver does not respond: {error}") from None
    return pynvml


def meter_of(uuid: str) -> Meter:
    return GpuMeter(uuid) if uuid else CpuMeter()


def first_device() -> Device:
    """Return CUDA's device 0 under CUDA_VISIBLE_DEVICES. Raises LookupError."""
    nvml = _open()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    try:
        if chosen.startswith(("GPU-", "MIG-")):
            handle = nvml.nvmlDeviceGetHandleByUUID(chosen)
        else:
            handle = nvml.nvmlDeviceGetHandleByIndex(int(chosen or 0))
            handle = _slice(nvml, handle)
        return Device(
            str(nvml.nvmlDeviceGetUUID(handle)),
            str(nvml.nvmlDeviceGetName(handle)),
            int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
            str(nvml.nvmlSystemGetDriverVersion()),
        )
    except (nvml.NVMLError, ValueError) as error:
        raise LookupError(
            f"CUDA_VISIBLE_DEVICES names no device of the driver: {chosen!r}; {error}"
        ) from None


def _slice(nvml: Any, handle: Any) -> Any:
    """Return the first MIG slice of the GPU, or the GPU itself where MIG is off."""
    slots = 0
    with suppress(nvml.NVMLError):
        if nvml.nvmlDeviceGetMigMode(handle)[0]:
            slots = nvml.nvmlDeviceGetMaxMigDeviceCount(handle)
    for slot in range(slots):
        with suppress(nvml.NVMLError):  # a slot without a slice
            return nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, slot)
    return handle
