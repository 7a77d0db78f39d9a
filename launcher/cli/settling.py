"""What `up` settles before anything is started: the public port, the devices, the plan."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from balancer.start import why_not_free
from launcher.config.settings import ConfigError, Settings
from launcher.config.sizes import format_size
from launcher.config.state import StateDir
from launcher.planning import reservations, sizing
from launcher.planning.devices import CPU, discover
from launcher.planning.held import Held, about_to_use
from launcher.planning.inventory import Device
from launcher.planning.plan import DoesNotFit, Plan
from launcher.supervision.measurement_worker import measurement_start

Say = Callable[[str], None]


def check_port(settings: Settings, running: Settings | None = None) -> None:
    """Raises ConfigError where nginx could not listen on the public address.

    ``running``: the settings of this farm, where it runs.
    """
    where = f"{settings.host}:{settings.port}"
    problem = why_not_free(settings.host, settings.port)
    if problem is None:
        return
    key, told = f"port = {settings.port}", "another program listens on"
    remedy = "choose another with --port"
    if isinstance(problem, socket.gaierror):
        key, told = f"host = {settings.host}", "there is no such address:"
        remedy = "name one of this machine with --host"
    elif problem.errno == errno.EADDRNOTAVAIL:
        key, told = f"host = {settings.host}", "this machine does not have the address of"
        remedy = "name one that it has with --host"
    elif problem.errno in (errno.EACCES, errno.EPERM):
        told, remedy = "only root may listen on", "choose one from 1024 on with --port"
    elif problem.errno == errno.EADDRINUSE and running and running.port == settings.port:
        told, remedy = "this farm's own nginx is in the way of", "run `gpufarm down` first"
    elif problem.errno != errno.EADDRINUSE:
        told = f"{problem.strerror}:"
    raise ConfigError(f"{key}: {told} {where}; {remedy}")


def make_plan(settings: Settings, state: StateDir, say: Say, held: Held | None = None) -> Plan:
    """Devices, footprint (measured where it is not known) and the plan, which fits.

    ``held``: what a farm's own workers hold. What the workers to come will use is reserved for this
    farm, so that another that starts now does not plan with it; a refusal changes no reservation.
    Raises DoesNotFit, MeasureError.
    """
    mine = held or Held()
    found = discover(sizing.read_host(settings), settings.budget.devices)
    for note in found.notes:
        say(note)
    footprint = sizing.known_footprint(settings, found.devices, state)
    if footprint is None:
        try:
            footprint = sizing.measure_footprint(
                settings, found.devices, state, measurement_start(settings, state), say
            )
        except DoesNotFit as error:
            own = sum(mine.devices.values())
            if not own:
                raise
            raise DoesNotFit(
                f"{error}. This farm's own workers hold {format_size(own)}: run `gpufarm down` "
                f"first, or state footprint.bytes"
            ) from None
    with reservations.locked():
        reserved = reservations.others(state.path)  # before what is free is read
        host = sizing.read_host(settings, mine.ram, reserved.get(CPU, 0))
        devices = tuple(
            _with_room(device, mine, reserved.get(device.id, 0))
            for device in discover(host, settings.budget.devices).devices
        )
        told = _tell_reserved(devices, reserved, say)
        plan = sizing.build_plan(settings, devices, host, footprint)
        if plan.refusal:
            raise DoesNotFit(plan.refusal + told)
        reservations.reserve(state.path, about_to_use(plan, mine))
    for warning in plan.warnings:
        say(f"warning: {warning}")
    return plan


def _with_room(device: Device, held: Held, reserved: int) -> Device:
    """The device with what the farm's own workers hold, without what others will use of it."""
    if device.id == CPU:  # `sizing.read_host` has reckoned with both
        return device
    free = device.free + held.devices.get(device.id, 0) - reserved
    return replace(device, free=max(0, min(device.total, free)))


def _tell_reserved(devices: Sequence[Device], reserved: Mapping[str, int], say: Say) -> str:
    """Say what other farms are about to use; the same as an end to a refusal."""
    named = {device.id: device.name for device in devices} | {CPU: "RAM"}
    notes = [
        f"{format_size(size)} of {named[id_]} are about to be used by another farm"
        for id_, size in reserved.items()
        if id_ in named
    ]
    for note in notes:
        say(note)
    return "".join(f"; {note}" for note in notes)
