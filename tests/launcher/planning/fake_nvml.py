"""A driver for tests: what ``pynvml`` answers, without a GPU."""

# ruff: noqa: N802 - the driver's names

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


class FakeError(Exception):
    """As pynvml.NVMLError."""


class MismatchError(Exception):
    """As pynvml.NVMLLibraryMismatchError, which is not derived from the other."""


@dataclass
class Memory:
    total: int
    free: int


@dataclass
class Process:
    pid: int
    usedGpuMemory: int | None  # noqa: N815 - the driver's name


@dataclass
class Gpu:
    uuid: str
    total: int
    free: int
    name: str = "Card"
    mode: int = 0
    processes: list[Process] = field(default_factory=list)
    slices: list[Gpu | None] | None = None
    """None: MIG is off, or unknown to this GPU."""
    error: str = ""
    hidden: bool = False
    """Its memory is not readable: the caller may only use its slices."""


class FakeNvml:
    """Behaves as the module does; as old versions do where ``old``: bytes for texts."""

    NVMLError: type[Exception] = FakeError
    NVMLLibraryMismatchError: type[Exception] = MismatchError

    def __init__(self, *gpus: Gpu, absent: bool = False, old: bool = False) -> None:
        self.gpus = list(gpus)
        self.absent = absent
        self.old = old
        self.opened = 0

    def _text(self, text: str) -> str | bytes:
        return text.encode() if self.old else text

    def nvmlInit(self) -> None:
        if self.absent:
            raise FakeError("NVML Shared Library Not Found")
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlSystemGetDriverVersion(self) -> str | bytes:
        return self._text("580.65")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> Gpu:
        if self.gpus[index].error:
            raise FakeError(self.gpus[index].error)
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: Any, /) -> Gpu:
        for gpu in self.gpus:
            for candidate in (gpu, *(gpu.slices or [])):
                if candidate is not None and candidate.uuid == uuid:
                    return candidate
        raise FakeError("Not Found")

    def nvmlDeviceGetUUID(self, handle: Gpu, /) -> str | bytes:
        return self._text(handle.uuid)

    def nvmlDeviceGetName(self, handle: Gpu, /) -> str | bytes:
        return self._text(handle.name)

    def nvmlDeviceGetMemoryInfo(self, handle: Gpu, /) -> Memory:
        if handle.hidden:
            raise FakeError("Insufficient Permissions")
        return Memory(handle.total, handle.free)

    def nvmlDeviceGetComputeMode(self, handle: Gpu, /) -> int:
        return handle.mode

    def nvmlDeviceGetMigMode(self, handle: Gpu, /) -> Sequence[int]:
        if handle.slices is None:
            raise FakeError("Not Supported")
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Gpu, /) -> int:
        return len(handle.slices or [])

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Gpu, index: int, /) -> Gpu:
        found = (handle.slices or [])[index]
        if found is None:
            raise FakeError("Not Found")
        return found

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Gpu, /) -> Sequence[Process]:
        return handle.processes

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: Gpu, /) -> Sequence[Process]:
        raise MismatchError("Unversioned function")
