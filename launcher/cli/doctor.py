"""`gpufarm doctor`: what a farm needs, checked one by one, each with a remedy."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata

from balancer import nginx
from balancer import processes as nginx_processes
from balancer.nginx import BalancerError
from balancer.start import port_is_free
from launcher.cli.client import AwayError, Client, NotRunningError, running_farm
from launcher.cli.stream_check import SentinelError, stream_through
from launcher.config.settings import ConfigError, Settings
from launcher.config.sizes import GIB, format_size
from launcher.config.state import StateDir, StateError
from launcher.planning import sizing
from launcher.planning.devices import discover
from launcher.supervision.farm import Farm

LEAST_SPACE = 2 * GIB
OLDEST_NGINX = (1, 18)
PARTS = ("supervisor", "uvicorn", "starlette", "psutil", "nvidia-ml-py")
OPTIONAL = ("torch", "onnxruntime", "onnxruntime-gpu")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    fine: bool
    told: str
    """What was found, and, where it is not fine, the remedy."""


def examine(settings: Settings) -> list[Finding]:
    """Everything, in the order in which it would fail."""
    checks: Sequence[Callable[[Settings], Iterator[Finding]]] = (
        _versions,
        _nginx,
        _devices,
        _space,
        _farm,
    )
    return [finding for check in checks for finding in check(settings)]


def _versions(settings: Settings) -> Iterator[Finding]:
    del settings
    yield Finding("python", sys.version_info >= (3, 11), platform.python_version())
    found = {name: _version(name) for name in (*PARTS, *OPTIONAL)}
    for name in PARTS:
        version = found[name]
        yield Finding(name, version is not None, version or "missing: run `make setup`")
    told = ", ".join(f"{name} {found[name]}" for name in OPTIONAL if found[name])
    yield Finding("engines", True, told or "neither torch nor onnxruntime is installed")
    if found["onnxruntime"] and found["onnxruntime-gpu"]:
        yield Finding(
            "onnxruntime",
            False,
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "remove both, then install one",
        )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _nginx(settings: Settings) -> Iterator[Finding]:
    del settings
    try:
        program = nginx.find()
        version = nginx.version(program)
    except BalancerError as error:
        yield Finding("nginx", False, str(error))
        return
    told = f"{'.'.join(map(str, version))} ({program})"
    if version < OLDEST_NGINX:
        yield Finding("nginx", False, f"{told} is too old: install 1.18 or later")
    else:
        yield Finding("nginx", True, told)


def _devices(settings: Settings) -> Iterator[Finding]:
    try:
        found = discover(sizing.read_host(settings), settings.budget.devices)
    except ConfigError as error:
        yield Finding("devices", False, str(error))
        return
    for note in found.notes:
        yield Finding("devices", True, note)
    for device in found.devices:
        room = f"{format_size(device.free)} of {format_size(device.total)} free"
        yield Finding(
            f"device {device.name}", not device.problem, device.problem or f"{room} ({device.id})"
        )


def _space(settings: Settings) -> Iterator[Finding]:
    folder = settings.state_dir
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    told = f"{format_size(free)} free in {folder}"
    fine = free >= LEAST_SPACE
    remedy = "" if fine else f": free {format_size(LEAST_SPACE)}, or choose another --state-dir"
    yield Finding("disk", fine, told + remedy)


def _farm(settings: Settings) -> Iterator[Finding]:
    """The running farm; where there is none, the port and a proxy made for the purpose."""
    try:
        farm = running_farm(StateDir(settings.state_dir))
    except NotRunningError:
        free = port_is_free(settings.host, settings.port)
        told = "free" if free else "taken by another program: choose another with --port"
        if not free and nginx_processes.all_members(settings.state_dir):
            told = "held by this farm's own nginx: `gpufarm up` or `gpufarm down` mends that"
        yield Finding(f"port {settings.port}", free, told)
        farm = None
    except (AwayError, ConfigError, StateError) as error:  # AwayError: its records are lost
        yield Finding("state", False, str(error))
        return
    if farm is not None:
        yield from _workers(farm)
    try:
        yield Finding("stream", True, stream_through(farm))
    except (SentinelError, BalancerError) as error:
        yield Finding("stream", False, str(error))


def _workers(farm: Farm) -> Iterator[Finding]:
    """What the controller of a running farm has to report."""
    try:
        view = Client(farm).workers()
    except AwayError as error:
        yield Finding("controller", False, f"{error}; see `gpufarm logs controller`")
        return
    if view["problem"]:
        yield Finding("controller", False, view["problem"])
    if failure := view["generation"]["failure"]:
        yield Finding(
            "configuration",
            False,
            f"{failure}; the one of before stays in force: correct it, then run `gpufarm up`",
        )
    states = [worker["state"] for worker in view["workers"]]
    troubles = [worker["error"] for worker in view["workers"] if worker["error"]]
    ready = f"{states.count('ready')} of {view['count']} ready"
    yield Finding("workers", not troubles, "; ".join([ready, *troubles]))


def print_findings(findings: Sequence[Finding], as_json: bool) -> None:
    """A line each; those that are not fine say what to do."""
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
        return
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        mark = "ok  " if finding.fine else "FAIL"
        print(f"{mark}  {finding.what:<{width}}  {finding.told}")
