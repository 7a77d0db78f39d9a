"""What commands print: workers, plans and progress, for people or as JSON."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console, JustifyMethod
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from launcher.config.settings import Settings
from launcher.config.sizes import format_size
from launcher.planning.inventory import Device, Footprint, Host
from launcher.planning.plan import CAP_NAMES, DevicePlan, Plan, is_limited_by_budget

if TYPE_CHECKING:
    from launcher.supervision.farm import Farm

WIDTH = 1000
"""Columns of output that is no terminal: wide enough that no line is wrapped."""
MAX_EXAMPLE = 200
"""Characters of the longest example request that is printed."""
WORKER_STYLES = {"ready": "green", "failed": "red", "starting": "yellow", "draining": "yellow"}
SHORT_DEVICE_CHARACTERS = 12
"""Characters of a UUID that tell devices apart in a narrow terminal."""
_size = format_size


def console(file: TextIO | None = None) -> Console:
    """Build a console for standard output, or for ``file``."""
    stream = file or sys.stdout
    return Console(
        file=stream, width=None if stream.isatty() else WIDTH, highlight=False, soft_wrap=False
    )


@contextmanager
def progress(title: str) -> Iterator[Callable[[str], None]]:
    """Yield a function that prints one line on standard error, below a spinner on a terminal.

    Standard output is kept for the command's result.
    """
    if not sys.stderr.isatty():
        yield lambda line: print(line, file=sys.stderr, flush=True)
        return
    console = Console(stderr=True, highlight=False)
    with console.status(title) as status:

        def report(line: str) -> None:
            console.print(Text(line))
            status.update(title)

        yield report


@dataclass(frozen=True)
class Column:
    """A column of the table of workers."""

    title: str
    text: Callable[[Mapping[str, Any]], str]
    numeric: bool = False
    importance: int = 0
    """The least important columns are left out first in a narrow terminal."""


def _state(worker: Mapping[str, Any]) -> str:
    return f"{worker['state']} (drained)" if worker.get("drained") else str(worker["state"])


def _memory(worker: Mapping[str, Any]) -> str:
    return _size(worker["memory_bytes"]) if worker["memory_bytes"] else "-"


def _ready_after(worker: Mapping[str, Any]) -> str:
    seconds = worker["ready_seconds"]
    return "-" if seconds is None else f"{seconds:.1f} s"


DEVICE = Column("Device", lambda worker: worker["device"], importance=4)
COLUMNS = (
    Column("Worker", lambda worker: worker["id"], importance=7),
    Column("State", _state, importance=6),
    Column("Pid", lambda worker: str(worker["pid"] or "-"), True, importance=2),
    Column("Port", lambda worker: str(worker["port"]), True, importance=1),
    DEVICE,
    Column("Memory", _memory, True, importance=5),
    Column("Restarts", lambda worker: str(worker["restarts"]), True, importance=3),
    Column("Ready after", _ready_after, True, importance=0),
)
SHORT_DEVICE = replace(DEVICE, text=lambda worker: _short_device(worker["device"]))


def _short_device(device: str) -> str:
    return (
        device if len(device) <= SHORT_DEVICE_CHARACTERS else f"{device[:SHORT_DEVICE_CHARACTERS]}…"
    )


def print_workers(view: Mapping[str, Any], out: Console) -> None:
    """Print one row for each worker, then the errors.

    A narrow terminal gets short device names, then loses the least important columns.
    """
    columns: tuple[Column, ...] = COLUMNS
    while len(columns) > 2 and _full_width(_worker_table(columns, view), out) > out.width:
        if DEVICE in columns:
            columns = tuple(SHORT_DEVICE if column is DEVICE else column for column in columns)
            continue
        least = min(columns, key=lambda column: column.importance)
        columns = tuple(column for column in columns if column is not least)
    out.print(_worker_table(columns, view))
    for worker in view["workers"]:
        if worker["error"]:
            out.print(Text(worker["error"], style="red"))
    if failure := view["generation"]["failure"]:
        out.print(Text(f"{failure}; the previous configuration stays in force", style="red"))
    if view.get("problem"):
        out.print(Text(f"controller: {view['problem']}", style="red"))


def _worker_table(columns: tuple[Column, ...], view: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        justify: JustifyMethod = "right" if column.numeric else "left"
        table.add_column(column.title, justify=justify, no_wrap=True)
    for worker in view["workers"]:
        style = WORKER_STYLES.get(worker["state"], "")
        table.add_row(
            *(
                Text(column.text(worker), style=style if column.title == "State" else "")
                for column in columns
            )
        )
    return table


def _full_width(table: Table, out: Console) -> int:
    """Measure the columns of a terminal that the whole table takes."""
    return Measurement.get(out, out.options.update(max_width=WIDTH), table).maximum


def example_request(farm: Farm, view: Mapping[str, Any]) -> str:
    """Build a curl command line that the farm can answer."""
    if farm.is_external:
        return f"curl {farm.url}{farm.settings.model.ready_url}"
    reports = [worker.get("health") or {} for worker in view["workers"]]
    if any("sample_rate" in health or health.get("voices") for health in reports):
        return (
            f"curl {farm.url}/v1/audio/speech -H 'Content-Type: application/json' "
            """-d '{"input": "Hello, world.", "response_format": "wav"}' -o hello.wav"""
        )
    path, body = _configured_request(farm.settings) or ("/predict", "'…'")
    return f"curl {farm.url}{path} -H 'Content-Type: application/json' -d {body}"


def _configured_request(settings: Settings) -> tuple[str, str] | None:
    """Find a JSON request in footprint.requests: its path, and its body quoted for a shell."""
    for request in settings.footprint.requests:
        if request.body is not None:
            body = json.dumps(request.body, ensure_ascii=False)
            if len(body) <= MAX_EXAMPLE:
                return request.path, shlex.quote(body)
    return None


def print_result(data: Any) -> None:
    """Print a command's result as JSON."""
    print(json.dumps(data, indent=2))


def show_workers(
    farm: Farm, view: Mapping[str, Any], as_json: bool, with_example: bool = False
) -> None:
    """Print the workers; ``with_example`` adds the farm's address and a request to try."""
    if as_json:
        print_result(view)
        return
    print_workers(view, console())
    if with_example and not any(worker["state"] == "ready" for worker in view["workers"]):
        print(f"\n{farm.url} answers 503: no worker is desired. `gpufarm scale 1` starts one,")
        print("`gpufarm restart w1` refills a drained slot.")
    elif with_example:
        print(f"\nReady at {farm.url}. Try:\n  {example_request(farm, view)}")


def print_plan(plan: Plan, out: Console, notes: Sequence[str] = ()) -> None:
    """Print devices, footprint, the four caps and the one that binds."""
    for note in notes:
        out.print(Text(note))
    if plan.devices:
        out.print(_device_table(plan))
    for row in plan.devices:
        where = f"{row.device.name} ({row.device.id})"
        out.print(Text(f"{where}: {arithmetic(row, plan.footprint)}"))
        _print_other_processes(row.device, out)
    out.print(Text(f"Footprint: {footprint_line(plan.footprint)}"))
    out.print(_cap_table(plan))
    out.print(Text(conclusion(plan), style="bold"))
    for warning in plan.warnings:
        out.print(Text(f"warning: {warning}", style="yellow"))


def print_devices(devices: Sequence[Device], out: Console, notes: Sequence[str] = ()) -> None:
    """Print the devices, where nothing can be planned yet."""
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
        _print_other_processes(device, out)


def arithmetic(row: DevicePlan, footprint: Footprint) -> str:
    """Format the formula of one device with its numbers."""
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
        return "1, because its compute mode admits only one process"
    return f"{text} = {row.fits}"


def footprint_line(footprint: Footprint) -> str:
    """Format what one worker takes, and how that is known."""
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
    """Format how many workers run where, and what binds: one line."""
    if plan.refusal:
        return "The plan does not fit."
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
        table.add_row(CAP_NAMES["count"], str(plan.count), "requested <- binding")
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


def _print_other_processes(device: Device, out: Console) -> None:
    if not device.tenants:
        return
    known = ", ".join(
        f"{tenant.name or 'process'} {tenant.pid}"
        + (f" ({_size(tenant.bytes)})" if tenant.bytes is not None else "")
        for tenant in device.tenants
    )
    out.print(Text(f"  other processes: {known}"))
