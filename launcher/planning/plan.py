"""Plan which worker runs on which device, and explain the numbers. Pure.

Memory, host RAM and ``workers.max`` are hard limits; cores limit only ``auto``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pydantic import TypeAdapter

from launcher.config.sizes import GIB, format_size
from launcher.planning.inventory import Device, Footprint, Host

Count = Literal["auto"] | int
Binding = Literal["memory", "ram", "cores", "max", "count"]

CAP_NAMES: Mapping[str, str] = {
    "memory": "device memory",
    "ram": "host RAM",
    "cores": "cores",
    "max": "workers.max",
    "count": "workers.count",
}


MEMORY_REMEDY = "free device memory, or lower budget.headroom"


class DoesNotFit(Exception):  # noqa: N818 - a result, not a fault
    """The requested workers do not fit. One line with the numbers; exit code 3."""


@dataclass(frozen=True)
class Limits:
    """What the configuration says about the size of the farm."""

    count: Count = "auto"
    max: int = 16
    threads: int = 1
    memory: int | None = None
    """Maximum bytes that the farm may use of each device."""
    headroom: int | None = None
    """Bytes kept free on each device; None: ``default_headroom``."""


@dataclass(frozen=True)
class Slot:
    """A place for one worker."""

    index: int
    id: str
    """``w1``, ``w2``, …"""
    device_id: str
    port: int = 0
    """0 until ``Plan.with_ports``."""


@dataclass(frozen=True)
class DevicePlan:
    """One device's share, and why. Sizes are bytes."""

    device: Device
    headroom: int
    budget: int
    """Bytes that workers may use: free - headroom, and at most ``budget.memory``."""
    fits: int
    """Workers that its memory allows."""
    slots: int
    """Maximum number of workers it can get in this plan."""
    workers: int
    """Workers that it gets now."""
    left: int
    """Budget that its workers leave unused."""
    next_worker_needs: int
    """Bytes that are missing for one more; 0 when its memory would allow it."""

    @property
    def id(self) -> str:
        return self.device.id


@dataclass(frozen=True)
class Caps:
    """The four limits, in workers. None: not considered, or not measured."""

    memory: int
    ram: int | None
    cores: int | None
    max: int

    @property
    def hard(self) -> tuple[Binding, int]:
        """The smallest hard limit: its name and its number."""
        named: list[tuple[Binding, int | None]] = [
            ("memory", self.memory),
            ("ram", self.ram),
            ("max", self.max),
        ]
        return min(((n, c) for n, c in named if c is not None), key=lambda item: item[1])


@dataclass(frozen=True)
class Plan:
    """Immutable; the only input to rendering."""

    slots: tuple[Slot, ...]
    """As many as the farm can scale to; every prefix spreads evenly over the devices."""
    devices: tuple[DevicePlan, ...]
    count: int
    """The desired number of workers now: the first ``count`` slots."""
    requested: Count
    binding: Binding
    """The cap that gave ``count``."""
    caps: Caps
    footprint: Footprint
    host: Host
    threads: int = 1
    warnings: tuple[str, ...] = ()
    refusal: str = ""
    """Why the plan is not possible, with the numbers; empty when it is."""

    @property
    def capacity(self) -> int:
        """The maximum number of workers of this plan."""
        return len(self.slots)

    def device_of(self, slot: Slot) -> Device:
        return next(plan.device for plan in self.devices if plan.id == slot.device_id)

    def with_ports(self, ports: Sequence[int]) -> Plan:
        """Return the same plan with one port for each slot, in order."""
        if len(ports) < len(self.slots):
            raise ValueError(f"{len(ports)} ports for {len(self.slots)} slots")
        slots = tuple(
            replace(slot, port=port) for slot, port in zip(self.slots, ports, strict=False)
        )
        return replace(self, slots=slots)

    def refusal_for(self, count: int) -> str:
        """Return why ``count`` workers do not fit, with the numbers; empty when they do."""
        return "" if count <= self.caps.hard[1] else _refusal(self, count)

    def warnings_for(self, count: int) -> tuple[str, ...]:
        """Return warnings about ``count`` workers that fit but are not advised."""
        if self.caps.cores is None or count <= self.caps.cores:
            return ()
        return (
            f"{_workers(count)} of {_threads(self.threads)} on {self.host.cores:g} "
            f"cores will slow each other down",
        )

    def checked(self) -> Plan:
        """Return itself. Raises DoesNotFit when the plan has a refusal."""
        if self.refusal:
            raise DoesNotFit(self.refusal)
        return self

    def to_json(self) -> dict[str, Any]:
        """Return it ready for JSON; ``total_workers`` repeats ``count`` for ``plan --json``."""
        return {**asdict(self), "total_workers": self.count, "capacity": self.capacity}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        return TypeAdapter(cls).validate_python(dict(data))


def default_headroom(total: int) -> int:
    """Return max(1 GiB, 5 % of the device), in bytes."""
    return max(GIB, total // 20)


def fitting(budget: int, footprint: Footprint) -> int:
    """Return how many workers fit into ``budget`` bytes.

    They start one at a time, so the extra memory of one start (peak - steady) stays free; the first
    one has to fit with its whole peak.
    """
    if budget < footprint.peak or footprint.steady <= 0:
        return 0
    after_first = budget - footprint.steady
    return 1 + (after_first - (footprint.peak - footprint.steady)) // footprint.steady


def usable_memory(device: Device, limits: Limits) -> int:
    """Return the bytes that workers may use of a device now."""
    return _budget(device, _headroom(device, limits), limits)


def devices_to_measure(devices: Sequence[Device], limits: Limits) -> tuple[Device, ...]:
    """Return the device with the most usable memory of each kind, the largest first.

    Raises DoesNotFit when no device has any.
    """
    usable = [device for device in devices if not device.problem]
    if not usable:
        problems = "; ".join(f"{d.name}: {d.problem}" for d in devices) or "none found"
        raise DoesNotFit(f"no device to run on ({problems}); name one with budget.devices")
    rooms = {d.id: usable_memory(d, limits) for d in usable}
    best: dict[tuple[str, int], Device] = {}
    for device in sorted(usable, key=lambda d: rooms[d.id]):
        if rooms[device.id] > 0:
            best[device.name, device.total] = device
    if not best:
        rows = ", ".join(_row(d, rooms[d.id], _headroom(d, limits)) for d in usable)
        raise DoesNotFit(f"no memory to measure a worker in ({rows}); {MEMORY_REMEDY}")
    return tuple(sorted(best.values(), key=lambda d: -rooms[d.id]))


def plan(devices: Sequence[Device], footprint: Footprint, host: Host, limits: Limits) -> Plan:
    """Place workers on devices. Never raises: a plan that is not possible carries its refusal."""
    usable = [device for device in devices if not device.problem]
    headrooms = {d.id: _headroom(d, limits) for d in usable}
    budgets = {d.id: usable_memory(d, limits) for d in usable}
    fits = {d.id: _fits(d, budgets[d.id], footprint) for d in usable}
    caps = Caps(
        memory=sum(fits.values()),
        ram=_ram_cap(usable, footprint, host, limits),
        cores=None if host.cores is None else max(1, int(host.cores // limits.threads)),
        max=limits.max,
    )
    order = _spread(usable, fits, min(cap for _, cap in [caps.hard]))
    binding, count = _count(caps, limits.count)
    granted = order[:count]
    rows = []
    for device in usable:
        here = granted.count(device.id)
        left = budgets[device.id] - here * footprint.steady
        rows.append(
            DevicePlan(
                device=device,
                headroom=headrooms[device.id],
                budget=budgets[device.id],
                fits=fits[device.id],
                slots=order.count(device.id),
                workers=here,
                left=left,
                next_worker_needs=max(0, footprint.peak - left),
            )
        )
    result = Plan(
        slots=tuple(Slot(i, f"w{i + 1}", device_id) for i, device_id in enumerate(order)),
        devices=tuple(rows),
        count=count,
        requested=limits.count,
        binding=binding,
        caps=caps,
        footprint=footprint,
        host=host,
        threads=limits.threads,
    )
    needed = max(1, count) if limits.count == "auto" else limits.count
    refusal = result.refusal_for(needed)
    warnings = [f"{d.name} ({d.id}) is left out: {d.problem}" for d in devices if d.problem]
    warnings += [
        f"{d.name} ({d.id}) gets one worker: its compute mode is EXCLUSIVE_PROCESS"
        for d in usable
        if d.exclusive
    ]
    if not refusal:
        warnings += result.warnings_for(count)
    return replace(result, refusal=refusal, warnings=tuple(warnings))


def _fits(device: Device, budget: int, footprint: Footprint) -> int:
    number = fitting(budget, footprint)
    return min(number, 1) if device.exclusive else number


def _headroom(device: Device, limits: Limits) -> int:
    return default_headroom(device.total) if limits.headroom is None else limits.headroom


def _budget(device: Device, headroom: int, limits: Limits) -> int:
    free = max(0, device.free - headroom)
    return free if limits.memory is None else min(free, limits.memory)


def _ram_cap(
    devices: Sequence[Device], footprint: Footprint, host: Host, limits: Limits
) -> int | None:
    """Return how many workers fit into the host's RAM; None where it does not limit them.

    The CPU's device memory is RAM already and is not counted twice. A GPU worker's RAM may be
    unknown.
    """
    if host.ram_free is None or host.ram_total is None or not footprint.host_ram:
        return None
    if all(device.kind == "cpu" for device in devices):
        return None
    return max(0, host.ram_free - default_headroom(host.ram_total)) // footprint.host_ram


def _count(caps: Caps, requested: Count) -> tuple[Binding, int]:
    binding, most = caps.hard
    if requested != "auto":
        return ("count", requested) if requested <= most else (binding, most)
    if caps.cores is not None and caps.cores < most:
        return "cores", caps.cores
    return binding, most


def _spread(devices: Sequence[Device], fits: Mapping[str, int], most: int) -> list[str]:
    """Return device ids in slot order: next is the device with the fewest, then the most room."""
    taken = {device.id: 0 for device in devices}
    order: list[str] = []
    while len(order) < most:
        open_ids = [d.id for d in devices if taken[d.id] < fits[d.id]]
        if not open_ids:
            break
        chosen = min(open_ids, key=lambda id_: (taken[id_], taken[id_] - fits[id_]))
        taken[chosen] += 1
        order.append(chosen)
    return order


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _refusal(plan: Plan, count: int) -> str:
    """Explain in one line, with the numbers and the remedy."""
    if not plan.devices:
        return "no device to run on; name one with budget.devices, or give --device 24GiB"
    (binding, most), footprint, host = plan.caps.hard, plan.footprint, plan.host
    subject = f"{_workers(count)} do{'es' if count == 1 else ''} not fit"
    if binding == "max":
        return f"{subject}: workers.max = {most}; raise it (and run `gpufarm up`) for more"
    if binding == "ram":
        return (
            f"{subject}: host RAM allows {most} ({format_size(footprint.host_ram or 0)} each of "
            f"{format_size(host.ram_free or 0)} free); free some RAM"
        )
    need = f"{format_size(footprint.steady)} each"
    if footprint.peak > footprint.steady:
        need += f", {format_size(footprint.peak)} while one starts"
    rows = ", ".join(_row(row.device, row.budget, row.headroom) for row in plan.devices)
    remedy = f"ask for {most}"
    if most == 0:
        limited = any(
            is_limited_by_budget(row.device, row.budget, row.headroom) for row in plan.devices
        )
        remedy = "raise budget.memory" if limited else MEMORY_REMEDY
    return f"{subject}: memory allows {most} ({need}; {rows}); {remedy}"


def is_limited_by_budget(device: Device, budget: int, headroom: int) -> bool:
    """Return whether budget.memory allows less than is free."""
    return budget < device.free - headroom


def _row(device: Device, budget: int, headroom: int) -> str:
    if is_limited_by_budget(device, budget, headroom):
        return f"{device.name}: {format_size(budget)} usable (budget.memory)"
    return (
        f"{device.name}: {format_size(budget)} usable of {format_size(device.free)} free, "
        f"{format_size(headroom)} headroom"
    )
