"""supervisord: render its configuration, and call it over its Unix socket."""

from __future__ import annotations

import http.client
import os
import re
import shlex
import sys
import xmlrpc.client
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jinja2

from launcher.config.sources import ConfigError
from launcher.supervision.unix_http import UnixConnection

T = TypeVar("T")

MODULE = "launcher.supervision.run_supervisord"
CONF = "supervisord.conf"
PID_FILE = "run/supervisord.pid"
LOGS = "logs"
SOCKET = "supervisor.sock"
MARK = "GPUFARM_FARM"
"""Environment variable of every process of a farm: its state directory's real path."""
INTERFACE = "farm"
"""The XML-RPC namespace of `rpc_interface`."""
INTERFACE_FACTORY = "launcher.supervision.rpc_interface:make_interface"

GRACE_AFTER_REQUEST = 15.0
"""Seconds after the request timeout until a draining worker is killed: its own deadline is five
seconds after the request timeout."""
CALL_TIMEOUT = 10.0
"""Seconds for each step of a call."""

ALREADY_STARTED, NOT_RUNNING, SPAWN_ERROR, SHUTTING_DOWN = 60, 70, 50, 6
"""supervisord's fault codes that are expected results rather than errors."""


class SupervisorError(Exception):
    """supervisord does not respond, or rejects a call. One line."""


@dataclass(frozen=True)
class SupervisorConfig:
    """The values that supervisord.conf is rendered from."""

    state: Path
    """The farm's state directory."""
    socket: Path
    slots: int
    """Number of processes in the group of workers: one for each port of the farm."""
    request_timeout: float
    nginx_command: tuple[str, ...]
    stop_whole_group: bool
    """For external servers: often a shell runs them that does not forward SIGTERM."""
    log_bytes: int
    log_backups: int

    @property
    def worker_stop_seconds(self) -> int:
        return round(self.request_timeout + GRACE_AFTER_REQUEST)


def render(config: SupervisorConfig) -> str:
    """Return the text of supervisord.conf."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("launcher.supervision"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - not HTML
    )
    state, logs = str(config.state), config.state / LOGS
    controller = python_module("launcher.controller", "--state", state)
    worker = python_module("launcher.supervision.slot", "--state", state, "--slot")
    return environment.get_template("supervisord.conf.j2").render(
        socket=escaped(str(config.socket)),
        pid_file=escaped(str(config.state / PID_FILE)),
        log=escaped(str(logs / "supervisord.log")),
        childlogdir=escaped(str(logs)),
        # supervisord expands the names of log files twice.
        logs=escaped(escaped(str(logs))),
        log_bytes=config.log_bytes,
        log_backups=config.log_backups,
        controller_command=command_line(controller),
        nginx_command=command_line(config.nginx_command),
        nginx_stop_seconds=config.worker_stop_seconds,
        worker_command=command_line(worker) + " %(process_num)d",
        worker_stop_seconds=config.worker_stop_seconds,
        slots=config.slots,
        stop_whole_group=config.stop_whole_group,
        interface=INTERFACE,
        interface_factory=INTERFACE_FACTORY,
    )


def python_module(module: str, *arguments: str) -> tuple[str, ...]:
    """Return a command line of this interpreter; `-P` keeps the current folder off its path."""
    return (sys.executable, "-P", "-m", module, *arguments)


def escaped(value: str) -> str:
    """Escape a value for supervisord's file, where `%` begins an expansion.

    Raises ConfigError for a value that the file cannot express.
    """
    if re.search(r"[\x00-\x1f]|\s[;#]|^\s|\s$", value):
        raise ConfigError(
            f"state_dir: supervisord cannot read this path: {value!r}; choose one without control "
            "characters, blanks at either end, or a blank before ; or #"
        )
    return value.replace("%", "%%")


def command_line(arguments: tuple[str, ...]) -> str:
    """Join arguments so that supervisord's `shlex` splits them alike."""
    return escaped(shlex.join(arguments))


class _UnixTransport(xmlrpc.client.Transport):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        if self._connection and host == self._connection[0] and self._connection[1]:
            return self._connection[1]
        connection = UnixConnection(self._path, CALL_TIMEOUT)
        self._connection = host, connection
        return connection


@dataclass(frozen=True)
class ProcessInfo:
    """One process as supervisord sees it."""

    name: str
    state: str
    """STOPPED, STARTING, RUNNING, BACKOFF, STOPPING, EXITED, FATAL or UNKNOWN."""
    pid: int
    exit_code: int
    """Exit code of the last process; -1 if a signal ended it, 0 if there was none."""
    started: float
    """Time of its last start in Unix seconds; 0 if it never started."""

    @property
    def alive(self) -> bool:
        return self.pid > 0 and self.state in ("STARTING", "RUNNING", "STOPPING")

    @property
    def stopping(self) -> bool:
        return self.state == "STOPPING"


class Supervisor:
    """A client of supervisord. Blocking; for one thread at a time."""

    def __init__(self, socket_path: Path) -> None:
        self._transport = _UnixTransport(socket_path)
        self._proxy = xmlrpc.client.ServerProxy("http://localhost", transport=self._transport)

    def close(self) -> None:
        """Close the connection; the next call opens another."""
        self._transport.close()

    def _call(self, method: Callable[[Any], T]) -> T:
        try:
            return method(self._proxy.supervisor)
        except (OSError, http.client.HTTPException) as error:
            raise SupervisorError(f"supervisord does not respond: {error}") from None
        except xmlrpc.client.ProtocolError as error:
            raise SupervisorError(f"supervisord returned {error.errcode}") from None

    def alive(self) -> bool:
        """Return whether it responds and is not shutting down."""
        try:
            state = self._call(lambda rpc: rpc.getState())
        except (SupervisorError, xmlrpc.client.Fault):
            return False
        return bool(state["statename"] == "RUNNING")

    def pid(self) -> int:
        return int(self._call(lambda rpc: rpc.getPID()))

    def processes(self) -> dict[str, ProcessInfo]:
        """Return every process by its name: nginx, controller, w1, w2, …"""
        infos = self._call_ignoring(lambda _: self._proxy.farm.processes())
        return {info["name"]: ProcessInfo(**info) for info in infos}

    def hold(self, ports: Sequence[int]) -> frozenset[int]:
        """Have it hold the slots' ports; return those that something else has."""
        return frozenset(self._call_ignoring(lambda _: self._proxy.farm.hold(list(ports))))

    def release(self, port: int) -> None:
        """Have it let go of a port just before a server starts that cannot share it."""
        self._call_ignoring(lambda _: self._proxy.farm.release(port))

    def update(self) -> None:
        """Have it read its configuration again without stopping a process."""
        self._call_ignoring(lambda _: self._proxy.farm.update())

    def start(self, name: str) -> None:
        """Start one process without waiting for it.

        supervisord reports a process that ends at once as SPAWN_ERROR; that is ignored, because its
        exit code says more.
        """
        self._call_ignoring(
            lambda rpc: rpc.startProcess(full_name(name), False), ALREADY_STARTED, SPAWN_ERROR
        )

    def stop(self, name: str) -> None:
        """Send the stop signal; supervisord sends SIGKILL after the stop timeout."""
        self._call_ignoring(lambda rpc: rpc.stopProcess(full_name(name), False), NOT_RUNNING)

    def kill(self, name: str) -> None:
        self._call_ignoring(lambda rpc: rpc.signalProcess(full_name(name), "KILL"), NOT_RUNNING)

    def restart(self, name: str) -> None:
        """Stop and start a process that need not drain, such as the controller."""
        self._call_ignoring(lambda rpc: rpc.stopProcess(full_name(name), True), NOT_RUNNING)
        self.start(name)

    def shutdown(self) -> None:
        """Stop all processes in order, then supervisord. Returns at once."""
        self._call_ignoring(lambda rpc: rpc.shutdown(), SHUTTING_DOWN)

    def _call_ignoring(self, method: Callable[[Any], Any], *expected: int) -> Any:
        try:
            return self._call(method)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode in expected:
                return None
            raise SupervisorError(f"supervisord: {fault.faultString}") from None


def full_name(name: str) -> str:
    """Return supervisord's name of a process: workers form a group, others are groups of one."""
    return f"worker:{name}" if name not in ("nginx", "controller") else name


def command(state: Path) -> tuple[str, ...]:
    """Return the command line that runs supervisord in the foreground."""
    return python_module(MODULE, "-c", str(state / CONF), "-n")


def environment(state: Path, base: dict[str, str] | None = None) -> dict[str, str]:
    """Return the environment of supervisord and its processes, with the farm's mark.

    GPUFARM_ variables are dropped because configuration is passed in files, and SUPERVISOR_
    variables because they may be those of another supervisord around this one.
    """
    given = dict(os.environ) if base is None else base
    dropped = ("GPUFARM_", "SUPERVISOR_")
    kept = {name: value for name, value in given.items() if not name.startswith(dropped)}
    return {**kept, MARK: mark(state)}


def mark(state: Path) -> str:
    """Return the value of MARK for the farm in ``state``."""
    return str(state.resolve())
