"""From settings to a plan: which footprint is known, how it is measured, and what follows."""

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
"""How often a measurement is made at most that other processes disturb."""
Start = Callable[[Device], RunningWorker]
"""Starts the configured worker on a device, alone."""


def limits(settings: Settings) -> Limits:
    return Limits(
        count=settings.workers.count,
        max=settings.workers.max,
        threads=settings.workers.threads,
        memory=settings.budget.memory,
        headroom=settings.budget.headroom,
    )


def read_host(settings: Settings, held: int = 0, reserved: int = 0) -> Host:
    """What this host has, as far as budget.cores and budget.ram do not say otherwise.

    ``held``: bytes of RAM that the farm's own workers hold, which count as free; ``reserved``:
    bytes that other farms are about to use, which do not.
    """
    found = hosts.read_host()
    if found.ram_free is not None:
        free = max(0, found.ram_free + held - reserved)
        found = replace(found, ram_free=min(free, found.ram_total or free))
    host = hosts.overridden(found, settings.budget.cores, settings.budget.ram)
    if found.ram_total is not None and (settings.budget.ram or 0) > found.ram_total:
        # Such a budget is believed whatever is free, but not beyond what others will use of it.
        host = replace(host, ram_free=max(0, (host.ram_free or 0) - reserved))
    return host


def known_footprint(
    settings: Settings, devices: Sequence[Device], state: StateDir
) -> Footprint | None:
    """footprint.bytes, else one that covers what was measured on such devices.

    None where a kind of device could hold a worker and was not measured.
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
        for place in devices_to_measure(usable, limits(settings)):
            missing = store.find(key_of(settings, place)) is None
            if missing and _has_room(place, footprint, settings):
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
    """Measure on one device of each kind, and keep what is exact. Returns one that covers all.

    ``again``: also where it is known. Raises MeasureError; DoesNotFit where there is no room to
    try, or where the kernel ended the worker because memory ran out.
    """
    store = FootprintStore(state)
    found: list[Footprint] = []
    for place in devices_to_measure(devices, limits(settings)):
        key = key_of(settings, place)
        footprint = None if again else store.find(key)
        too_small = found and not _has_room(place, Footprint.covering(found), settings)
        if footprint is None and too_small:
            continue  # it gets no worker anyway
        if footprint is None:
            progress(f"measuring the footprint of one worker on {place.name}")
            footprint = _measure_undisturbed(settings, place, start, progress)
            if footprint.exact:  # a guess serves this run, and is not kept
                store.put(key, footprint)
        found.append(footprint)
    return Footprint.covering(found)


def _measure_undisturbed(
    settings: Settings, device: Device, start: Start, progress: Progress
) -> Footprint:
    """Measure again while other processes disturb it. Where all attempts were disturbed, one that
    covers them, not exact. Raises DisturbedError where none told anything."""
    guesses: list[Footprint] = []
    for attempt in range(1, ATTEMPTS + 1):
        try:
            footprint = _measure_once(settings, device, start, progress)
        except DisturbedError:
            if attempt == ATTEMPTS and not guesses:
                raise
        else:
            if footprint.exact:
                return footprint
            guesses.append(footprint)
        if attempt < ATTEMPTS:
            progress(
                f"other processes moved memory of {device.name} meanwhile: measuring again "
                f"({attempt + 1} of {ATTEMPTS})"
            )
    return Footprint.covering(guesses)


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
                f"one worker does not fit into {total} of RAM: the kernel ended a process of it "
                f"because memory ran out; free some, or raise the memory limit"
            ) from error
        if device.is_gpu:  # there may be others
            raise type(error)(f"on {device.name}: {error}") from None
        raise
    finally:
        if driver is not None:
            driver.close()


def build_plan(
    settings: Settings, devices: Sequence[Device], host: Host, footprint: Footprint
) -> Plan:
    """The plan, with a warning where the footprint may say too little or too much."""
    result = plan(devices, footprint, host, limits(settings))
    warnings = [*result.warnings]
    if footprint.how == "measured" and footprint.requests == 0:
        warnings.append(
            "the footprint was measured without a request: name the longest in footprint.requests, "
            "or give the class longest_request()"
        )
    if footprint.how == "measured" and any(device.kind == "hypothetical" for device in devices):
        warnings.append(
            f"the footprint was measured on {footprint.device}; elsewhere it may be another"
        )
    if not footprint.exact:
        warnings.append(
            "other processes moved the device's memory whenever the footprint was measured: "
            f"{format_size(footprint.steady)} is a guess and is not kept; measure again with "
            "gpufarm plan --measure when it is quiet"
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
