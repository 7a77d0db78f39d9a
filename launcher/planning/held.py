"""Memory that a farm's own workers hold: a new plan for a running farm counts it as free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.planning.devices import CPU
from launcher.planning.inventory import Footprint
from launcher.planning.plan import Plan
from launcher.planning.sampling import tree_pss


@dataclass(frozen=True)
class Held:
    """Bytes that a farm's own workers hold."""

    devices: Mapping[str, int] = field(default_factory=dict)
    """Device id → bytes; of the device "cpu" it is the RAM of the workers that run there."""
    host_ram: int = 0
    """RAM of the workers whose device is a GPU."""

    @property
    def ram(self) -> int:
        """All RAM of the farm's workers."""
        return self.host_ram + self.devices.get(CPU, 0)


def held_by(workers: Iterable[Mapping[str, Any]], footprint: Footprint) -> Held:
    """Sum what the workers of ``GET /workers`` hold (pid, device, memory_bytes).

    The measured ``footprint`` counts where the driver does not report a process's memory, and where
    the process cannot be read.
    """
    devices: Counter[str] = Counter()
    host_ram = 0
    for worker in workers:
        if not (pid := worker["pid"]):
            continue
        devices[worker["device"]] += worker["memory_bytes"] or footprint.steady
        if worker["device"] != CPU:
            host_ram += tree_pss(pid) or footprint.host_ram or 0
    return Held(dict(devices), host_ram)


def about_to_use(plan: Plan, held: Held | None = None) -> dict[str, int]:
    """Return device id → bytes that the plan's workers will use beyond what they hold already.

    "cpu" is the host's RAM. Devices without further use are left out.
    """
    held = held or Held()
    footprint, need = plan.footprint, Counter[str]()
    start = footprint.peak - footprint.steady
    for row in plan.devices:
        if row.workers:
            coming = row.workers * footprint.steady + start - held.devices.get(row.id, 0)
            need[row.id] += max(0, coming)
        if row.device.is_gpu:
            need[CPU] += row.workers * (footprint.host_ram or 0)
    if any(row.device.is_gpu for row in plan.devices):
        need[CPU] = max(0, need[CPU] - held.host_ram)
    return {device: size for device, size in need.items() if size > 0}


def of_starts(plan: Plan, devices: Sequence[str]) -> dict[str, int]:
    """Return device id → bytes that workers about to start on ``devices`` will use.

    ``devices`` holds one entry a worker. "cpu" is the host's RAM.
    """
    footprint, need = plan.footprint, Counter[str]()
    for device in devices:
        need[device] += footprint.steady
        if device != CPU:
            need[CPU] += footprint.host_ram or 0
    for device in set(devices):  # workers start one at a time
        need[device] += footprint.peak - footprint.steady
    return dict(need)
