"""Workers for people: the table of `up` and `ps`, and a line to try it with."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.configuration.config import Settings
from launcher.configuration.sizes import format_size
from launcher.processes.farm import Farm

LONGEST_SHOWN = 200
"""Characters of a request that is shown to be tried."""
STYLES = {"ready": "green", "failed": "red", "starting": "yellow", "draining": "yellow"}


def print_workers(view: Mapping[str, Any], out: Console) -> None:
    """One row a worker, then what is wrong with those with which something is."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("Worker", "State", "Pid", "Port", "Device", "Memory", "Restarts", "Ready after"):
        right = title in ("Pid", "Port", "Memory", "Restarts", "Ready after")
        table.add_column(title, justify="right" if right else "left", no_wrap=True)
    for worker in view["workers"]:
        state = worker["state"] + (" (drained)" if worker.get("drained") else "")
        memory, seconds = worker["memory_bytes"], worker["ready_seconds"]
        table.add_row(
            worker["id"],
            Text(state, style=STYLES.get(worker["state"], "")),
            str(worker["pid"] or "-"),
            str(worker["port"]),
            worker["device"],
            format_size(memory) if memory else "-",
            str(worker["restarts"]),
            "-" if seconds is None else f"{seconds:.1f} s",
        )
    out.print(table)
    for worker in view["workers"]:
        if worker["error"]:
            out.print(Text(worker["error"], style="red"))
    if failure := view["generation"]["failure"]:
        out.print(Text(f"{failure}; the configuration of before stays in force", style="red"))
    if view.get("problem"):
        out.print(Text(f"controller: {view['problem']}", style="red"))


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
