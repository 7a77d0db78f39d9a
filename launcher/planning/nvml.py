"""GPUs and MIG slices as the driver reports them (NVML): identity, free memory, tenants."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Protocol

import psutil

from launcher.planning.inventory import Device, Tenant

EXCLUSIVE_PROCESS, PROHIBITED = 3, 2
"""Compute modes: one process at a time; none at all."""


class Nvml(Protocol):
    """The part of the module ``pynvml`` that is used here; tests pass a fake."""

    NVMLError: type[Exception]
    NVMLLibraryMismatchError: type[Exception]

    # ruff: noqa: N802 - their names
    def nvmlInit(self) -> Any: ...
    def nvmlShutdown(self) -> Any: ...
    def nvmlSystemGetDriverVersion(self) -> Any: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> Any: ...
    def nvmlDeviceGetHandleByUUID(self, uuid: Any, /) -> Any: ...
    def nvmlDeviceGetUUID(self, handle: Any, /) -> Any: ...
    def nvmlDeviceGetName(self, handle: Any, /) -> Any: ...
    def nvmlDeviceGetMemoryInfo(self, handle: Any, /) -> Any: ...
    def nvmlDeviceGetComputeMode(self, handle: Any, /) -> int: ...
    def nvmlDeviceGetMigMode(self, handle: Any, /) -> Sequence[int]: ...
    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any, /) -> int: ...
    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, index: int, /) -> Any: ...
    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any, /) -> Sequence[Any]: ...
    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: Any, /) -> Sequence[Any]: ...


class Driver:
    """An open NVML. Use ``Driver.open``, and close it (or ``with``)."""

    def __init__(self, nvml: Nvml) -> None:
        self._nvml = nvml
        self.version = _text(nvml.nvmlSystemGetDriverVersion())

    @classmethod
    def open(cls, nvml: Nvml | None = None) -> Driver | None:
        """Open NVML; None without a driver that responds, which means no GPUs."""
        if nvml is None:
            import pynvml  # noqa: PLC0415 - 35 ms that a plan for hypothetical devices need not spend

            nvml = pynvml
        try:
            nvml.nvmlInit()
        except (nvml.NVMLError, OSError):
            return None
        try:
            return cls(nvml)
        except nvml.NVMLError:
            with suppress(nvml.NVMLError):
                nvml.nvmlShutdown()
            return None

    def __enter__(self) -> Driver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        with suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def devices(self) -> list[list[Device]]:
        """Return for each GPU, in the driver's order, itself or its MIG slices where MIG is on.

        A GPU that does not respond is listed with its ``problem``.
        """
        try:
            count = self._nvml.nvmlDeviceGetCount()
        except self._nvml.NVMLError:
            return []
        return [self._gpu(index) for index in range(count)]

    def free(self, uuid: str) -> int:
        """Return the bytes free on a GPU or slice. Raises LookupError if it is unknown."""
        try:
            handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
            return int(self._nvml.nvmlDeviceGetMemoryInfo(handle).free)
        except self._nvml.NVMLError as error:
            raise LookupError(f"{uuid}: {error}") from None

    def tenants(self, uuid: str) -> tuple[Tenant, ...]:
        """Return the processes on a GPU or slice, as far as the driver reports them."""
        try:
            return self._tenants(self._nvml.nvmlDeviceGetHandleByUUID(uuid))
        except self._nvml.NVMLError:
            return ()

    def _gpu(self, index: int) -> list[Device]:
        nvml = self._nvml
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            # First: a process that may use a slice may not query more of the GPU that holds it.
            if self._mig_is_on(handle):
                return self._mig(handle, index)
            return [self._device(handle, index, "gpu")]
        except nvml.NVMLError as error:
            name = f"GPU {index}"
            return [Device(f"gpu{index}", name, "gpu", 0, 0, index, problem=str(error))]

    def _mig(self, handle: Any, index: int) -> list[Device]:
        nvml = self._nvml
        parent, slices = _text(nvml.nvmlDeviceGetUUID(handle)), []
        for place in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            with suppress(nvml.NVMLError):  # an empty place, or another user's slice
                one = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place)
                slices.append(replace(self._device(one, index, "mig"), parent=parent))
        if slices:
            return slices
        name = _text(nvml.nvmlDeviceGetName(handle))
        return [Device(parent, name, "gpu", 0, 0, index, problem="MIG is on, no slice")]

    def _mig_is_on(self, handle: Any) -> bool:
        try:
            return bool(self._nvml.nvmlDeviceGetMigMode(handle)[0])
        except self._nvml.NVMLError:
            return False

    def _device(self, handle: Any, index: int, kind: str) -> Device:
        nvml = self._nvml
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        mode = 0
        with suppress(nvml.NVMLError):
            mode = nvml.nvmlDeviceGetComputeMode(handle)
        return Device(
            id=_text(nvml.nvmlDeviceGetUUID(handle)),
            name=_text(nvml.nvmlDeviceGetName(handle)),
            kind="mig" if kind == "mig" else "gpu",
            total=int(memory.total),
            free=int(memory.free),
            index=index,
            tenants=self._tenants(handle),
            driver=self.version,
            problem="its compute mode is PROHIBITED" if mode == PROHIBITED else "",
            exclusive=mode == EXCLUSIVE_PROCESS,
        )

    def _tenants(self, handle: Any) -> tuple[Tenant, ...]:
        nvml = self._nvml
        found: dict[int, Tenant] = {}
        for ask in (
            nvml.nvmlDeviceGetComputeRunningProcesses,
            nvml.nvmlDeviceGetGraphicsRunningProcesses,
        ):
            # The binding's error for a driver too old for this call is not an NVMLError.
            with suppress(nvml.NVMLError, nvml.NVMLLibraryMismatchError):
                for process in ask(handle):
                    pid = int(process.pid)
                    found[pid] = Tenant(pid, _process_name(pid), process.usedGpuMemory)
        return tuple(found[pid] for pid in sorted(found))


def _process_name(pid: int) -> str:
    """Return its name; empty where unknown: in a container the driver lists the host's pids."""
    try:
        return psutil.Process(pid).name()
    except (psutil.Error, ValueError):
        return ""


def _text(value: Any) -> str:
    """Decode what old versions of the binding return as bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)
