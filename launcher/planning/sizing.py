"""Turn settings into a plan: find the stored footprint or measure it, then plan with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from launcher.config.settings import Settings
from launcher.config.sizes import format_size
from launcher.config.state import StateDir
from launcher.planning import host as hosts
from launcher.planning.footprint import (
    DisturbedError,
    MeasureError,
    Probe,
    Progress,
    RunningWorker,
    measure,
)
from launcher.planning.footprint_store import FootprintStore, key_of
from launcher.planning.inventory import Device, Footprint, Host
from launcher.planning.plan import DoesNotFit, Limits, Plan, devices_to_measure, plan, usable_memory

ATTEMPTS = 3
"""Maximum number of measurements while other processes disturb them."""
Start = Callable[[Device], RunningWorker]
"""Starts the configured worker on a device, to be measured."""


def limits(settings: Settings) -> Limits:
    return Limits(
        count=settings.workers.count,
        max=settings.workers.max,
        threads=settings.workers.threads,
        memory=settings.budget.memory,
        headroom=settings.budget.headroom,
    )


def read_host(settings: Settings, held: int = 0, reserved: int = 0) -> Host:
    """Return this host's cores and RAM, or what budget.cores and budget.ram say instead.

    ``held``: bytes of RAM that the farm's own workers hold; they count as free. ``reserved``: bytes
    that other farms will use; they do not.
    """
    found = hosts.read_host()
    if found.ram_free is not None:
        free = max(0, found.ram_free + held - reserved)
        found = replace(found, ram_free=min(free, found.ram_total or free))
    host = hosts.overridden(found, settings.budget.cores, settings.budget.ram)
    if found.ram_total is not None and (settings.budget.ram or 0) > found.ram_total:
        # A budget above the host's RAM is trusted, less what other farms will use.
        host = replace(host, ram_free=max(0, (host.ram_free or 0) - reserved))
    return host


def known_footprint(
    settings: Settings, devices: Sequence[Device], state: StateDir
) -> Footprint | None:
    """Return footprint.bytes, else one that covers the stored measurements for these devices.

    None when a kind of device could hold a worker and has no measurement.
    """
    if settings.footprint.bytes:
        return Footprint.given(settings.footprint.bytes)
    usable = [device for device in devices if not device.problem]
    store = FootprintStore(state)
    kept = [found for device in usable if (found := store.find(key_of(settings, device)))]
    if not kept:
        return None
    footprint = Footprint.covering(kept)
    with suppress(DoesNotFit):
        for device in devices_to_measure(usable, limits(settings)):
            missing = store.find(key_of(settings, device)) is None
            if missing and _has_room(device, footprint, settings):
                return None
    return footprint


def _has_room(device: Device, footprint: Footprint, settings: Settings) -> bool:
    return usable_memory(device, limits(settings)) >= footprint.peak


def measure_footprint(
    settings: Settings,
    devices: Sequence[Device],
    state: StateDir,
    start: Start,
    progress: Progress = lambda message: None,
    *,
    again: bool = False,
) -> Footprint:
    """Measure on one device of each kind, store exact results, and return one that covers all.

    ``again``: measure even where a footprint is stored. Raises MeasureError; DoesNotFit when there
    is no memory to try, or when the OOM killer ended the worker.
    """
    store = FootprintStore(state)
    found: list[Footprint] = []
    for device in devices_to_measure(devices, limits(settings)):
        key = key_of(settings, device)
        footprint = None if again else store.find(key)
        known_too_small = found and not _has_room(device, Footprint.covering(found), settings)
        if footprint is None and known_too_small:
            continue  # it gets no worker anyway
        if footprint is None:
            progress(f"measuring the footprint of one worker on {device.name}")
            footprint = _measure_undisturbed(settings, device, start, progress)
            if footprint.exact:  # an estimate serves this run and is not stored
                store.put(key, footprint)
        found.append(footprint)
    return Footprint.covering(found)


def _measure_undisturbed(
    settings: Settings, device: Device, start: Start, progress: Progress
) -> Footprint:
    """Measure until an attempt is undisturbed, at most ATTEMPTS times.

    If all were disturbed, returns an estimate that covers them. Raises DisturbedError when none had
    a result.
    """
    estimates: list[Footprint] = []
    for attempt in range(1, ATTEMPTS + 1):
        try:
            footprint = _measure_once(settings, device, start, progress)
        except DisturbedError:
            if attempt == ATTEMPTS and not estimates:
                raise
        else:
            if footprint.exact:
                return footprint
            estimates.append(footprint)
        if attempt < ATTEMPTS:
            progress(
                f"other processes changed the memory of {device.name}; measuring again "
                f"({attempt + 1} of {ATTEMPTS})"
            )
    return Footprint.covering(estimates)


def _measure_once(
    settings: Settings, device: Device, start: Start, progress: Progress
) -> Footprint:
    from launcher.planning.nvml import Driver  # noqa: PLC0415 - together with pynvml, only for a GPU
    from launcher.planning.sampling import sampler_for  # noqa: PLC0415

    killed_before = hosts.killed_for_memory()
    driver = Driver.open() if device.is_gpu else None
    try:
        return measure(
            lambda: start(device),
            sampler_for(device.kind, device.id, driver),
            [Probe.of(request) for request in settings.footprint.requests],
            load_timeout=settings.workers.load_timeout,
            request_timeout=settings.workers.request_timeout,
            device=device.name,
            progress=progress,
        )
    except MeasureError as error:
        if hosts.killed_for_memory() > killed_before:
            total = format_size(read_host(settings).ram_total or 0)
            raise DoesNotFit(
                f"one worker does not fit into {total} of RAM: the kernel's OOM killer ended it; "
                f"free RAM, or raise the memory limit"
            ) from error
        if device.is_gpu:  # name it: there may be several
            raise type(error)(f"on {device.name}: {error}") from None
        raise
    finally:
        if driver is not None:
            driver.close()


def build_plan(
    settings: Settings, devices: Sequence[Device], host: Host, footprint: Footprint
) -> Plan:
    """Return the plan, with warnings about a footprint that may be wrong."""
    result = plan(devices, footprint, host, limits(settings))
    warnings = [*result.warnings]
    if footprint.how == "measured" and footprint.requests == 0:
        warnings.append(
            "the footprint was measured without a request; set footprint.requests to the longest, "
            "or define longest_request() in the model class"
        )
    if footprint.how == "measured" and any(device.kind == "hypothetical" for device in devices):
        warnings.append(
            f"the footprint was measured on {footprint.device} and may differ on another device"
        )
    if not footprint.exact:
        warnings.append(
            "other processes changed the device's memory during every measurement: "
            f"{format_size(footprint.steady)} is an estimate and is not stored; measure again with "
            "`gpufarm plan --measure` when the device is idle"
        )
    return replace(result, warnings=tuple(warnings))


__all__ = [
    "MeasureError",
    "build_plan",
    "known_footprint",
    "limits",
    "measure_footprint",
    "read_host",
]
