"""The inputs of a plan: devices, the host, and the footprint of one worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

DeviceKind = Literal["gpu", "mig", "cpu", "hypothetical"]


@dataclass(frozen=True)
class Tenant:
    """Another process on a device."""

    pid: int
    name: str = ""
    bytes: int | None = None
    """Device memory it holds; None where the driver does not report it."""


@dataclass(frozen=True)
class Device:
    """A GPU, a MIG slice, the CPU with its RAM, or a hypothetical device given by its size."""

    id: str
    """The UUID (``GPU-…``, ``MIG-…``), ``cpu``, or ``device0`` for a hypothetical one."""
    name: str
    kind: DeviceKind
    total: int
    """Bytes."""
    free: int
    """Bytes that are free now."""
    index: int = 0
    """Its position in the driver's order; for display, never for selecting."""
    tenants: tuple[Tenant, ...] = ()
    driver: str = ""
    parent: str = ""
    """UUID of the GPU that a MIG slice is cut from."""
    exclusive: bool = False
    """Whether its compute mode allows only one process."""
    problem: str = ""
    """Why it cannot be used (lost, reset required, no permission); empty when it can."""

    @property
    def is_gpu(self) -> bool:
        return self.kind in ("gpu", "mig")


@dataclass(frozen=True)
class Host:
    """The cores and the RAM that this process may use."""

    cores: float | None = None
    """Affinity and CPU quota taken together; may be a fraction. None: not considered."""
    ram_total: int | None = None
    ram_free: int | None = None
    """Bytes available without swapping, within the memory limits. None: not considered."""
    cores_from: str = ""
    ram_from: str = ""
    """Which limit gave the numbers: "affinity", "cgroup v2 quota", "MemAvailable", …"""


@dataclass(frozen=True)
class Footprint:
    """What one worker needs of its device, in bytes."""

    peak: int
    """The highest use while starting."""
    steady: int
    """The highest use while serving, after warm-up."""
    host_ram: int | None = None
    """PSS of its process tree, for workers whose device is a GPU. None: not measured."""
    how: str = "given"
    """"given" or "measured" """
    measured_at: str = ""
    """UTC, ISO 8601; empty for a given one."""
    device: str = ""
    """Name of the device on which it was measured."""
    samples: int = 0
    requests: int = 0
    """How many requests were run while measuring."""
    exact: bool = True
    """False when other processes changed the device's memory during the measurement: then it is an
    estimate, too large where one started and too small where one ended."""

    @classmethod
    def covering(cls, several: Sequence[Footprint]) -> Footprint:
        """Return one that suffices on every device on which one of ``several`` was measured."""
        largest = max(several, key=lambda one: one.steady)
        return replace(
            largest,
            peak=max(one.peak for one in several),
            host_ram=max((one.host_ram or 0 for one in several), default=0) or None,
            exact=all(one.exact for one in several),
        )

    @classmethod
    def given(cls, size: int) -> Footprint:
        """Return the footprint of footprint.bytes: peak and steady are equal."""
        return cls(peak=size, steady=size)
