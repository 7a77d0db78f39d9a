"""From settings to a plan: which footprint is known, how it is measured, and what follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from launcher import host as hosts
from launcher.config import Settings
from launcher.footprint import MeasureError, Probe, Progress, RunningWorker, measure
from launcher.footprint_store import FootprintStore, key_of
from launcher.inventory import Device, Footprint, Host
from launcher.planning import DoesNotFit, Limits, Plan, place_to_measure, plan
from launcher.sizes import format_size
from launcher.state import StateDir

Start = Callable[[Device], RunningWorker]

MEASURED_SPEC = "measure-worker.json"
"""What the worker that is measured is told to serve; there while it is measured."""


def limits(settings: Settings) -> Limits:
    return Limits(
        count=settings.workers.count,
        max=settings.workers.max,
        threads=settings.workers.threads,
        memory=settings.budget.memory,
        headroom=settings.budget.headroom,
    )


def read_host(settings: Settings) -> Host:
    """What this host has, as far as budget.cores and budget.ram do not say otherwise."""
    found = hosts.read_host()
    return hosts.overridden(found, settings.budget.cores, settings.budget.ram)


def known_footprint(
    settings: Settings, devices: Sequence[Device], state: StateDir
) -> Footprint | None:
    """footprint.bytes, else the largest that was measured on such devices; None: measure it."""
    if settings.footprint.bytes:
        return Footprint.given(settings.footprint.bytes)
    store = FootprintStore(state)
    kept = [store.find(key_of(settings, device)) for device in devices if not device.problem]
    return max((found for found in kept if found), key=lambda f: f.steady, default=None)


def measure_footprint(
    settings: Settings,
    devices: Sequence[Device],
    state: StateDir,
    start: Start | None = None,
    progress: Progress = lambda message: None,
) -> Footprint:
    """Measure on the device with the most room and keep the result.

    ``start``: None starts a plain child process. Raises MeasureError; DoesNotFit where there is
    no room to try, or where the kernel ended the worker because memory ran out.
    """
    from launcher.nvml import Driver  # noqa: PLC0415 - together with pynvml, only for a GPU
    from launcher.sampling import sampler_for  # noqa: PLC0415

    device = place_to_measure(devices, limits(settings))
    progress(f"measuring the footprint of one worker on {device.name}")
    begin = start or lone_start(settings, state)
    killed_before = hosts.killed_for_memory()
    driver = Driver.open() if device.is_gpu else None
    try:
        result = measure(
            lambda: begin(device),
            sampler_for(device.kind, device.id, driver),
            [Probe.of(request) for request in settings.footprint.requests],
            load_timeout=settings.workers.load_timeout,
            request_timeout=settings.workers.request_timeout,
            device=device.name,
            progress=progress,
        )
    except MeasureError as error:
        if hosts.killed_for_memory() > killed_before:
            free = format_size(read_host(settings).ram_free or 0)
            raise DoesNotFit(
                f"one worker does not fit: the kernel ended a process of it because memory ran "
                f"out (now {free} of RAM are free); free some, or raise the memory limit"
            ) from error
        raise
    finally:
        (state.path / MEASURED_SPEC).unlink(missing_ok=True)
        if driver is not None:
            driver.close()
    FootprintStore(state).put(key_of(settings, device), result)
    return result


def lone_start(settings: Settings, state: StateDir) -> Start:
    """Start the configured worker as a plain child, on a free port, its log in logs/measure.log."""
    # The launcher's other half; a plan that measures nothing does without it.
    from launcher.launch import launch, worker_spec  # noqa: PLC0415
    from launcher.lone_worker import LoneWorker, free_port  # noqa: PLC0415
    from launcher.state import write_json  # noqa: PLC0415

    def start(device: Device) -> RunningWorker:
        state.create()
        spec = state.path / MEASURED_SPEC
        write_json(spec, worker_spec(settings, state.cache))
        port = free_port()
        begin = launch(settings, device, id="w0", port=port, spec=spec, cache=state.cache)
        return LoneWorker.start(
            begin.argv,
            environment=begin.environment,
            folder=Path(begin.folder),
            port=port,
            ready_path=settings.model.ready_url if settings.model.command else "/readyz",
            log=state.logs / "measure.log",
        )

    return start


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
    if not footprint.exact:
        warnings.append(
            "other processes used the device while the footprint was measured: "
            f"{format_size(footprint.steady)} is a guess; measure again with gpufarm plan --measure"
        )
    return replace(result, warnings=tuple(warnings))


__all__ = [
    "MeasureError",
    "build_plan",
    "known_footprint",
    "limits",
    "lone_start",
    "measure_footprint",
    "read_host",
]
