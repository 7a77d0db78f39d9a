"""Plans for people: tables, and every number that led to the count."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.config.sizes import format_size
from launcher.planning.inventory import Device, Footprint, Host
from launcher.planning.plan import CAP_NAMES, DevicePlan, Plan, is_limited_by_budget

WIDTH = 1000
"""Where no terminal tells its width, no line is broken."""


def console(file: TextIO | None = None) -> Console:
    """Where reports go: standard output unless ``file`` is given."""
    stream = file or sys.stdout
    return Console(
        file=stream, width=None if stream.isatty() else WIDTH, highlight=False, soft_wrap=False
    )


def print_plan(plan: Plan, out: Console, notes: Sequence[str] = ()) -> None:
    """The arithmetic: devices, footprint, the four caps and which of them binds."""
    for note in notes:
        out.print(Text(note))
    if plan.devices:
        out.print(_device_table(plan))
    for row in plan.devices:
        where = f"{row.device.name} ({row.device.id})"
        out.print(Text(f"{where}: {arithmetic(row, plan.footprint)}"))
        _print_tenants(row.device, out)
    out.print(Text(f"Footprint: {footprint_line(plan.footprint)}"))
    out.print(_cap_table(plan))
    out.print(Text(conclusion(plan), style="bold"))
    for warning in plan.warnings:
        out.print(Text(f"warning: {warning}", style="yellow"))


def print_devices(devices: Sequence[Device], out: Console, notes: Sequence[str] = ()) -> None:
    """What there is, where nothing can be planned yet."""
    for note in notes:
        out.print(Text(note))
    table = Table("Device", "Id", box=None, pad_edge=False)
    for title in ("Total", "Free now"):
        table.add_column(title, justify="right")
    for device in devices:
        sizes = ("-", "-") if device.problem else (_size(device.total), _size(device.free))
        table.add_row(Text(device.name), Text(device.problem or device.id), *sizes)
    out.print(table)
    for device in devices:
        _print_tenants(device, out)


def arithmetic(row: DevicePlan, footprint: Footprint) -> str:
    """The formula of one device with its numbers filled in."""
    if row.fits == 0:
        short = footprint.peak - row.budget
        return (
            f"{_size(row.budget)} usable of {_size(row.device.free)} free, {_size(row.headroom)} "
            f"headroom; the first worker needs {_size(footprint.peak)}: {_size(short)} too little"
        )
    free = f"{_size(row.device.free)} free - {_size(row.headroom)} headroom"
    if is_limited_by_budget(row.device, row.budget, row.headroom):
        free = f"{_size(row.budget)} budget.memory"
    text = (
        f"1 + floor(({free} - {_size(footprint.steady)} first worker"
        f" - {_size(footprint.peak - footprint.steady)} start) / {_size(footprint.steady)})"
    )
    if row.device.exclusive:
        return "1, since its compute mode lets only one process in"
    return f"{text} = {row.fits}"


def footprint_line(footprint: Footprint) -> str:
    """What one worker takes, and how that is known."""
    line = f"{_size(footprint.steady)} serving, {_size(footprint.peak)} starting"
    if footprint.host_ram is not None and footprint.host_ram != footprint.steady:
        line += f", {_size(footprint.host_ram)} of host RAM"
    if footprint.how != "measured":
        return f"{line} ({footprint.how})"
    return (
        f"{line} (measured {footprint.measured_at} on {footprint.device}: "
        f"{footprint.samples} samples, {footprint.requests} requests)"
    )


def conclusion(plan: Plan) -> str:
    """How many, where, and what binds. One line."""
    if plan.refusal:
        return "This does not fit."
    shares = " + ".join(str(row.workers) for row in plan.devices)
    split = f" ({shares})" if len(plan.devices) > 1 else ""
    plural = "" if plan.count == 1 else "s"
    more = f"; up to {plan.capacity} with gpufarm scale" if plan.capacity > plan.count else ""
    return f"{plan.count} worker{plural}{split}, bound by {CAP_NAMES[plan.binding]}{more}."


def _device_table(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("Device", overflow="fold")
    titles = ("Total", "Free now", "Usable", "Workers", "Left", "Next needs")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    several = len(plan.devices) > 1
    for row in plan.devices:
        needs = f"{_size(row.next_worker_needs)} more" if row.next_worker_needs else "nothing more"
        table.add_row(
            Text(f"{row.device.index} {row.device.name}" if several else row.device.name),
            _size(row.device.total),
            _size(row.device.free),
            _size(row.budget),
            str(row.workers),
            _size(row.left),
            needs,
        )
    return table


def _cap_table(plan: Plan) -> Table:
    table = Table("Cap", box=None, pad_edge=False)
    table.add_column("Workers", justify="right")
    table.add_column("Because")
    for name, number, why in _caps(plan):
        mark = " <- binding" if name == plan.binding else ""
        table.add_row(CAP_NAMES[name], "-" if number is None else str(number), Text(why + mark))
    if plan.binding == "count":
        table.add_row(CAP_NAMES["count"], str(plan.count), "asked for <- binding")
    return table


def _caps(plan: Plan) -> list[tuple[str, int | None, str]]:
    caps, host, footprint = plan.caps, plan.host, plan.footprint
    fits = " + ".join(str(row.fits) for row in plan.devices) or "no device"
    return [
        ("memory", caps.memory, f"{fits} on the device{'' if len(plan.devices) == 1 else 's'}"),
        ("ram", caps.ram, _ram_reason(plan, host, footprint)),
        ("cores", caps.cores, _cores_reason(plan, host)),
        ("max", caps.max, "configured"),
    ]


def _cores_reason(plan: Plan, host: Host) -> str:
    if host.cores is None:
        return "not considered"
    threads = f"{plan.threads} thread{'' if plan.threads == 1 else 's'} each"
    return f"{host.cores:g} cores ({host.cores_from or 'given'}), {threads}; caps auto only"


def _ram_reason(plan: Plan, host: Host, footprint: Footprint) -> str:
    if host.ram_free is None:
        return "not considered"
    if plan.devices and all(row.device.kind == "cpu" for row in plan.devices):
        return "the same as the device's memory"
    if footprint.host_ram is None:
        return "not measured"
    return f"{_size(footprint.host_ram)} each of {_size(host.ram_free)} ({host.ram_from})"


def _print_tenants(device: Device, out: Console) -> None:
    if not device.tenants:
        return
    known = ", ".join(
        f"{tenant.name or 'process'} {tenant.pid}"
        + (f" ({_size(tenant.bytes)})" if tenant.bytes is not None else "")
        for tenant in device.tenants
    )
    out.print(Text(f"  also there: {known}"))


_size = format_size
