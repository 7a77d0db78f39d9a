"""What `up` settles before anything is started: the public port, the devices, the plan."""

from __future__ import annotations

import errno
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from balancer.start import why_not_free
from launcher.configuration.config import ConfigError, Settings
from launcher.configuration.sizes import format_size
from launcher.configuration.state import StateDir
from launcher.planning import sizing
from launcher.planning.devices import discover
from launcher.planning.inventory import Device
from launcher.planning.plan import DoesNotFit, Plan
from launcher.processes.lone_worker import lone_start

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


def make_plan(
    settings: Settings, state: StateDir, say: Say, held: Counter[str] | None = None
) -> Plan:
    """Devices, footprint (measured where it is not known) and the plan, which fits.

    ``held``: bytes that a farm's own workers hold on each device. Raises DoesNotFit, MeasureError.
    """
    found = discover(sizing.read_host(settings), settings.budget.devices)
    for note in found.notes:
        say(note)
    footprint = sizing.known_footprint(settings, found.devices, state)
    if footprint is None:
        try:
            footprint = sizing.measure_footprint(
                settings, found.devices, state, lone_start(settings, state), say
            )
        except DoesNotFit as error:
            if not held:
                raise
            own = format_size(held.total())
            raise DoesNotFit(
                f"{error}. This farm's own workers hold {own}: run `gpufarm down` first, or state "
                f"footprint.bytes"
            ) from None
    host = sizing.read_host(settings)
    devices = discover(host, settings.budget.devices).devices
    mine = held or Counter()
    devices = tuple(_with_room(device, mine[device.id]) for device in devices)
    if host.ram_free is not None:
        host = replace(host, ram_free=host.ram_free + mine["cpu"])
    plan = sizing.build_plan(settings, devices, host, footprint).checked()
    for warning in plan.warnings:
        say(f"warning: {warning}")
    return plan


def _with_room(device: Device, held: int) -> Device:
    return replace(device, free=min(device.total, device.free + held))
