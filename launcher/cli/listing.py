"""Workers for people: the table of `up` and `ps`, and a line to try it with."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console, JustifyMethod
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from launcher.cli.report import WIDTH
from launcher.config.settings import Settings
from launcher.config.sizes import format_size
from launcher.supervision.farm import Farm

LONGEST_SHOWN = 200
"""Characters of a request that is shown to be tried."""
STYLES = {"ready": "green", "failed": "red", "starting": "yellow", "draining": "yellow"}
SHORT_DEVICE = 12
"""Characters of a UUID that tell devices apart where its whole does not fit."""


@dataclass(frozen=True)
class Column:
    """One column of the table."""

    title: str
    text: Callable[[Mapping[str, Any]], str]
    numeric: bool = False
    importance: int = 0
    """The less important ones are left out first where the terminal is narrow."""


def _state(worker: Mapping[str, Any]) -> str:
    return f"{worker['state']} (drained)" if worker.get("drained") else str(worker["state"])


def _memory(worker: Mapping[str, Any]) -> str:
    return format_size(worker["memory_bytes"]) if worker["memory_bytes"] else "-"


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
SHORTENED = replace(DEVICE, text=lambda worker: _shortened(worker["device"]))


def _shortened(device: str) -> str:
    return device if len(device) <= SHORT_DEVICE else f"{device[:SHORT_DEVICE]}…"


def print_workers(view: Mapping[str, Any], out: Console) -> None:
    """One row a worker, then the error of each worker that has one.

    In a narrow terminal devices are shortened, then the least important columns are left out.
    """
    columns: tuple[Column, ...] = COLUMNS
    while len(columns) > 2 and _width(_table(columns, view), out) > out.width:
        if DEVICE in columns:
            columns = tuple(SHORTENED if column is DEVICE else column for column in columns)
            continue
        least = min(columns, key=lambda column: column.importance)
        columns = tuple(column for column in columns if column is not least)
    out.print(_table(columns, view))
    for worker in view["workers"]:
        if worker["error"]:
            out.print(Text(worker["error"], style="red"))
    if failure := view["generation"]["failure"]:
        out.print(Text(f"{failure}; the configuration of before stays in force", style="red"))
    if view.get("problem"):
        out.print(Text(f"controller: {view['problem']}", style="red"))


def _table(columns: tuple[Column, ...], view: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        justify: JustifyMethod = "right" if column.numeric else "left"
        table.add_column(column.title, justify=justify, no_wrap=True)
    for worker in view["workers"]:
        style = STYLES.get(worker["state"], "")
        table.add_row(
            *(
                Text(column.text(worker), style=style if column.title == "State" else "")
                for column in columns
            )
        )
    return table


def _width(table: Table, out: Console) -> int:
    """Characters that the table takes where there is room for all of it."""
    return Measurement.get(out, out.options.update(max_width=WIDTH), table).maximum


def curl_line(farm: Farm, view: Mapping[str, Any]) -> str:
    """A command that makes the farm do something."""
    if farm.is_external:
        return f"curl {farm.url}{farm.settings.model.ready_url}"
    told = [worker.get("health") or {} for worker in view["workers"]]
    if any("sample_rate" in health or health.get("voices") for health in told):
        return (
            f"curl {farm.url}/v1/audio/speech -H 'Content-Type: application/json' "
            """-d '{"input": "Hello, world.", "response_format": "wav"}' -o hello.wav"""
        )
    path, body = _known_request(farm.settings) or ("/predict", "'…'")
    return f"curl {farm.url}{path} -H 'Content-Type: application/json' -d {body}"


def _known_request(settings: Settings) -> tuple[str, str] | None:
    """A JSON request that the configuration names, its body quoted for a shell."""
    for request in settings.footprint.requests:
        if request.body is not None:
            body = json.dumps(request.body, ensure_ascii=False)
            if len(body) <= LONGEST_SHOWN:
                return request.path, shlex.quote(body)
    return None
