"""How much of the device is taken, as the driver tells it: changes of its free memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import psutil

RESTING = 1 << 20  # bytes: what differs by less has not moved
Phase = Callable[[], None]


@dataclass(frozen=True)
class Card:
    """A GPU, or a slice of one, by the driver's names."""

    uuid: str
    name: str
    total: int
    driver: str


class Meter(Protocol):
    def used(self, pids: Sequence[int]) -> int:
        """Bytes that were not taken when the meter was made. Raises LookupError."""

    def free(self) -> int | None:
        """Bytes to be had; None where nothing is to run short."""

    def vitals(self) -> dict[str, float]:
        """Power in W and clock in MHz now, as far as the driver tells."""


class CpuMeter:
    """The processes' own share of the RAM stands in for the device's memory."""

    def used(self, pids: Sequence[int]) -> int:
        total = 0
        for pid in pids:
            with suppress(psutil.Error):
                total += psutil.Process(pid).memory_full_info().pss
        return total

    def free(self) -> int | None:
        return None

    def vitals(self) -> dict[str, float]:
        return {}


class GpuMeter:
    def __init__(self, uuid: str, patience: float = 10.0) -> None:
        """Waits until the device's memory has come to rest. Raises LookupError."""
        self._nvml = _open()
        try:
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
        except self._nvml.NVMLError as error:
            raise LookupError(f"{uuid}: {error}") from None
        deadline, last = time.monotonic() + patience, self.free()
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
            raise LookupError(f"the driver tells no free memory: {error}") from None

    def vitals(self) -> dict[str, float]:
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
        raise LookupError(f"the NVIDIA driver does not answer: {error}") from None
    return pynvml


def meter_of(uuid: str) -> Meter:
    return GpuMeter(uuid) if uuid else CpuMeter()


def first_card() -> Card:
    """The one that CUDA calls 0 under CUDA_VISIBLE_DEVICES. Raises LookupError."""
    nvml = _open()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    try:
        if chosen.startswith(("GPU-", "MIG-")):
            handle = nvml.nvmlDeviceGetHandleByUUID(chosen)
        else:
            handle = nvml.nvmlDeviceGetHandleByIndex(int(chosen or 0))
            handle = _slice(nvml, handle)
        return Card(
            str(nvml.nvmlDeviceGetUUID(handle)),
            str(nvml.nvmlDeviceGetName(handle)),
            int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
            str(nvml.nvmlSystemGetDriverVersion()),
        )
    except (nvml.NVMLError, ValueError) as error:
        raise LookupError(f"no device in the driver's list for {chosen!r}: {error}") from None


def _slice(nvml: Any, handle: Any) -> Any:
    """The first slice where the GPU is divided into such (MIG), else the GPU."""
    places = 0
    with suppress(nvml.NVMLError):
        if nvml.nvmlDeviceGetMigMode(handle)[0]:
            places = nvml.nvmlDeviceGetMaxMigDeviceCount(handle)
    for place in range(places):
        with suppress(nvml.NVMLError):  # a place without a slice
            return nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place)
    return handle
