"""Discover the devices a farm may use: GPUs and MIG slices by UUID, else the CPU and its RAM."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.config.sizes import parse_size_with_unit
from launcher.config.sources import ConfigError
from launcher.planning.inventory import Device, Host
from launcher.planning.nvml import Driver, Nvml

CPU = "cpu"


@dataclass(frozen=True)
class DiscoveredDevices:
    """The devices to plan with, and notes for the user about the choice."""

    devices: tuple[Device, ...]
    notes: tuple[str, ...] = ()


def discover(
    host: Host,
    selected: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    nvml: Nvml | None = None,
) -> DiscoveredDevices:
    """Return the devices that ``CUDA_VISIBLE_DEVICES`` and ``budget.devices`` (``selected``) leave.

    Indices are in the driver's order (PCI, as in nvidia-smi). Raises ConfigError for a selected
    device that does not exist.
    """
    environ = os.environ if environ is None else environ
    if list(selected) == [CPU]:
        return DiscoveredDevices((cpu_device(host),))
    driver = Driver.open(nvml)
    groups: list[list[Device]] = []
    if driver is not None:
        with driver:
            groups = driver.devices()
    mask = environ.get("CUDA_VISIBLE_DEVICES")
    visible = groups if mask is None else visible_groups(groups, mask)
    if selected:
        return DiscoveredDevices(_selected_devices(visible, selected, host))
    devices = tuple(device for group in visible for device in group)
    if devices:
        return DiscoveredDevices(devices)
    note = "No GPU: workers run on the CPU, and memory means RAM."
    if groups:
        note = (
            f"CUDA_VISIBLE_DEVICES={mask!r} hides {len(groups)} GPU"
            f"{'' if len(groups) == 1 else 's'}: workers run on the CPU, and memory means RAM."
        )
    return DiscoveredDevices((cpu_device(host),), (note,))


def cpu_device(host: Host) -> Device:
    """Return the CPU as a device; its memory is the RAM that this process may use."""
    return Device(
        id=CPU,
        name=f"CPU ({host.cores:g} cores)" if host.cores else "CPU",
        kind="cpu",
        total=host.ram_total or 0,
        free=host.ram_free or 0,
    )


def hypothetical_devices(sizes: Sequence[str]) -> tuple[Device, ...]:
    """Return one device, all of it free, for each size. Raises ConfigError for a bad size."""
    devices = []
    for index, text in enumerate(sizes):
        try:
            size = parse_size_with_unit(text)
        except ValueError as error:
            raise ConfigError(f"--device {text}: {error}") from None
        devices.append(Device(f"device{index}", text, "hypothetical", size, size, index))
    return tuple(devices)


def visible_groups(groups: Sequence[Sequence[Device]], mask: str) -> list[list[Device]]:
    """Return the devices that a value of ``CUDA_VISIBLE_DEVICES`` selects, in its order.

    CUDA's rules: indices, UUIDs or unambiguous prefixes of them, up to the first invalid entry
    (``-1`` and the empty string select no device). A GPU with MIG enabled stands for its slices,
    because each worker gets one slice by UUID.
    """
    chosen: list[list[Device]] = []
    seen: set[str] = set()
    for token in mask.split(","):
        group = _match(groups, token.strip())
        if not group:
            break
        new = [device for device in group if device.id not in seen]
        seen.update(device.id for device in new)
        if new:
            chosen.append(new)
    return chosen


def _match(groups: Sequence[Sequence[Device]], token: str) -> list[Device]:
    if token.isdecimal():
        return [device for group in groups for device in group if device.index == int(token)]
    if not token.startswith(("GPU-", "MIG-")):
        return []
    matches = [d for group in groups for d in group if d.id.startswith(token) or d.parent == token]
    parents = {d.parent for group in groups for d in group if d.parent.startswith(token)}
    if not matches and len(parents) == 1:
        return [d for group in groups for d in group if d.parent in parents]
    exact = [device for device in matches if token in (device.id, device.parent)]
    return exact or (matches if len(matches) == 1 else [])


def _selected_devices(
    groups: Sequence[Sequence[Device]], selected: Sequence[str], host: Host
) -> tuple[Device, ...]:
    chosen: list[Device] = []
    for name in selected:
        found = [cpu_device(host)] if name == CPU else _match(groups, name)
        if not found:
            available = [f"{d.index} ({d.id})" for group in groups for d in group] + [CPU]
            raise ConfigError(
                f"budget.devices: no device {name!r}, or CUDA_VISIBLE_DEVICES hides it; "
                f"available: {', '.join(available)}"
            )
        chosen += [device for device in found if device not in chosen]
    if len({device.kind == CPU for device in chosen}) > 1:
        raise ConfigError('budget.devices mixes GPUs and "cpu"; choose one or the other')
    return tuple(chosen)
