"""Find and end processes of a farm that outlived their parent.

Each carries an environment variable that names the state directory, so it is found even if records,
sockets or the directory itself are missing. nginx overwrites its environment; `balancer.processes`
finds it in other ways.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from balancer import processes as nginx_processes
from launcher.supervision.supervisord import CONF, MARK, MODULE, mark

NAME_MARK = "SUPERVISOR_PROCESS_NAME"
CHECK_SECONDS = 0.05
"""Seconds between two checks whether killed processes have ended."""
KILLED_SECONDS = 10.0
"""Seconds that the kernel may take to end a killed process."""


class StillRunningError(Exception):
    """Processes of the farm do not end. One line that names them; exit code 1."""


def marked(state: Path, name: str = "") -> list[psutil.Process]:
    """Return running processes with the farm's mark, except this process and its parents.

    ``name`` restricts them to what supervisord started under that name, such as ``w1``.
    """
    found, value = [], mark(state)
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    for process in psutil.process_iter():
        if process.pid in own:
            continue
        with suppress(psutil.Error, OSError):
            environment = process.environ()
            ours = environment.get(MARK) == value
            if ours and name in ("", environment.get(NAME_MARK)) and _is_running(process):
                found.append(process)
    return found


def _is_running(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def find_supervisors(state: Path) -> list[psutil.Process]:
    """supervisord processes that run this state directory's file."""
    conf, value = str(state / CONF), mark(state)
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            line = process.cmdline()
            ours = conf in line or process.environ().get(MARK) == value
            if MODULE in line and ours and _is_running(process):
                found.append(process)
    return found


def end(processes: Iterable[psutil.Process], graceful_seconds: float) -> None:
    """Send SIGTERM, and SIGKILL after ``graceful_seconds``; wait until they have ended."""
    left = list(processes)
    for process in left:
        _send(process, signal.SIGTERM)
    if left:
        _, left = psutil.wait_procs(left, timeout=graceful_seconds)
    kill(left)


def kill(processes: Iterable[psutil.Process]) -> None:
    """Send SIGKILL; wait until they have ended, KILLED_SECONDS at most."""
    left = list(processes)
    for process in left:
        _send(process, signal.SIGKILL)
    deadline = time.monotonic() + KILLED_SECONDS
    while left and time.monotonic() < deadline:
        time.sleep(CHECK_SECONDS)
        left = [process for process in left if _still_running(process)]


def _still_running(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return _is_running(process)
    return False


def _send(process: psutil.Process, number: signal.Signals) -> None:
    # psutil compares the start time first, so a re-used pid is never signalled.
    with suppress(psutil.Error):
        process.send_signal(number)


def find(state: Path) -> list[psutil.Process]:
    """Return every running process of a farm, including nginx and supervisord."""
    found = {process.pid: process for process in [*find_supervisors(state), *marked(state)]}
    for pid in nginx_processes.all_members(state):
        with suppress(psutil.Error):
            found.setdefault(pid, psutil.Process(pid))
    return list(found.values())


def clean(state: Path, graceful_seconds: float) -> int:
    """End every process of a farm whose supervisord does not respond; return their number.

    A hanging supervisord ends first, then nginx, then all others together. Raises StillRunningError
    when a process survives SIGKILL.
    """
    hanging = find_supervisors(state)
    kill(hanging)
    count = len(hanging) + len(nginx_processes.end(state, graceful_seconds))
    left = marked(state)
    end(left, graceful_seconds)
    if stuck := find(state):
        names = ", ".join(str(process.pid) for process in stuck)
        raise StillRunningError(
            f"processes of the farm in {state} do not end: {names}; end them by hand, or restart "
            f"the machine if the kernel cannot end them"
        )
    return count + len(left)
