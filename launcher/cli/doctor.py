"""`gpufarm doctor`: check what a farm needs, with a remedy for each failure."""

from __future__ import annotations

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
from launcher.cli.client import Client, ControllerUnavailableError, NotRunningError, running_farm
from launcher.cli.output import print_result
from launcher.cli.stream_check import StreamError, check_stream
from launcher.config.settings import ConfigError, Settings
from launcher.config.sizes import GIB, format_size
from launcher.config.state import StateDir, StateError
from launcher.planning import sizing
from launcher.planning.devices import discover
from launcher.supervision.farm import Farm

MIN_DISK_SPACE = 2 * GIB
MIN_NGINX = (1, 18)
REQUIRED_PACKAGES = ("supervisor", "uvicorn", "starlette", "psutil", "nvidia-ml-py")
ENGINE_PACKAGES = ("torch", "onnxruntime", "onnxruntime-gpu")


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    ok: bool
    message: str
    """What was found and, for a failure, the remedy."""


def run_checks(settings: Settings) -> list[Finding]:
    """Run every check, in the order in which a start would fail."""
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
    found = {name: _version(name) for name in (*REQUIRED_PACKAGES, *ENGINE_PACKAGES)}
    for name in REQUIRED_PACKAGES:
        version = found[name]
        yield Finding(name, version is not None, version or "missing; run `make setup`")
    engines = ", ".join(f"{name} {found[name]}" for name in ENGINE_PACKAGES if found[name])
    yield Finding("engines", True, engines or "neither torch nor onnxruntime is installed")
    if found["onnxruntime"] and found["onnxruntime-gpu"]:
        yield Finding(
            "onnxruntime",
            False,
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; "
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
    description = f"{'.'.join(map(str, version))} ({program})"
    if version < MIN_NGINX:
        yield Finding("nginx", False, f"{description} is too old; install 1.18 or later")
    else:
        yield Finding("nginx", True, description)


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
    space = f"{format_size(free)} free in {folder}"
    ok = free >= MIN_DISK_SPACE
    remedy = "" if ok else f"; free {format_size(MIN_DISK_SPACE)}, or choose another --state-dir"
    yield Finding("disk", ok, space + remedy)


def _farm(settings: Settings) -> Iterator[Finding]:
    """Check the running farm, or the port of one to come; and a stream through nginx."""
    try:
        farm = running_farm(StateDir(settings.state_dir))
    except NotRunningError:
        free = port_is_free(settings.host, settings.port)
        status = "free" if free else "in use by another program; choose another with --port"
        if not free and nginx_processes.all_members(settings.state_dir):
            status = "held by this farm's own nginx; run `gpufarm up` or `gpufarm down`"
        yield Finding(f"port {settings.port}", free, status)
        farm = None
    except (ControllerUnavailableError, ConfigError, StateError) as error:
        yield Finding("state", False, str(error))
        return
    if farm is not None:
        yield from _workers(farm)
    try:
        yield Finding("stream", True, check_stream(farm))
    except (StreamError, BalancerError) as error:
        yield Finding("stream", False, str(error))


def _workers(farm: Farm) -> Iterator[Finding]:
    """Check what the controller of a running farm reports."""
    try:
        view = Client(farm).workers()
    except ControllerUnavailableError as error:
        yield Finding("controller", False, f"{error}; see `gpufarm logs controller`")
        return
    if view["problem"]:
        yield Finding("controller", False, view["problem"])
    if failure := view["generation"]["failure"]:
        yield Finding(
            "configuration",
            False,
            f"{failure}; the previous one stays in force: correct it, then run `gpufarm up`",
        )
    states = [worker["state"] for worker in view["workers"]]
    errors = [worker["error"] for worker in view["workers"] if worker["error"]]
    ready = f"{states.count('ready')} of {view['count']} ready"
    yield Finding("workers", not errors, "; ".join([ready, *errors]))


def print_findings(findings: Sequence[Finding], as_json: bool) -> None:
    """Print one line for each check."""
    if as_json:
        print_result([asdict(finding) for finding in findings])
        return
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        mark = "ok  " if finding.ok else "FAIL"
        print(f"{mark}  {finding.check:<{width}}  {finding.message}")
