"""Processes of a farm that outlived their parent, found by the mark that each of them carries.

The mark is a variable of their environment that names the state directory, so they are found
whatever else has vanished: records, sockets, the directory itself. nginx overwrites its
environment, and `balancer.processes` knows it by other marks.
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
KILLED_SECONDS = 10.0
"""How long the kernel may take to end what was killed."""


class StillRunningError(Exception):
    """Processes of the farm could not be ended. One line that names them; exit code 1."""


def marked(state: Path, name: str = "") -> list[psutil.Process]:
    """Living processes of the farm in ``state`` other than this one and those above it.

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
            if ours and name in ("", environment.get(NAME_MARK)) and _lives(process):
                found.append(process)
    return found


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def find_supervisors(state: Path) -> list[psutil.Process]:
    """supervisord processes that run this state directory's file."""
    conf = str(state / CONF)
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            line = process.cmdline()
            if MODULE in line and conf in line and _lives(process):
                found.append(process)
    return found


def end(processes: Iterable[psutil.Process], graceful_seconds: float) -> None:
    """SIGTERM, time to finish, SIGKILL; returns when they are gone."""
    left = list(processes)
    for process in left:
        _send(process, signal.SIGTERM)
    if left:
        _, left = psutil.wait_procs(left, timeout=graceful_seconds)
    kill(left)


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL at once; returns when they are gone."""
    left = list(processes)
    for process in left:
        _send(process, signal.SIGKILL)
    deadline = time.monotonic() + KILLED_SECONDS
    while left and time.monotonic() < deadline:
        time.sleep(CHECK_SECONDS)
        left = [process for process in left if _alive(process)]


def _alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return _lives(process)
    return False


def _send(process: psutil.Process, number: signal.Signals) -> None:
    # psutil compares the start time first, so a re-used pid is never signalled.
    with suppress(psutil.Error):
        process.send_signal(number)


def find(state: Path) -> list[psutil.Process]:
    """Everything that runs of a farm, nginx and supervisord included."""
    found = {process.pid: process for process in [*find_supervisors(state), *marked(state)]}
    for pid in nginx_processes.all_members(state):
        with suppress(psutil.Error):
            found.setdefault(pid, psutil.Process(pid))
    return list(found.values())


def clean(state: Path, graceful_seconds: float) -> int:
    """End whatever is left of a farm whose supervisor does not answer: a hanging supervisor
    itself, then nginx, then all others together. Returns how many processes there were.

    Raises StillRunningError when something outlives a SIGKILL.
    """
    hanging = find_supervisors(state)
    kill(hanging)
    count = len(hanging) + len(nginx_processes.end(state, graceful_seconds))
    left = marked(state)
    end(left, graceful_seconds)
    if stuck := find(state):
        names = ", ".join(str(process.pid) for process in stuck)
        raise StillRunningError(
            f"processes of the farm in {state} cannot be ended: {names}; end them by hand, or "
            f"restart the machine where the kernel does not let go of them"
        )
    return count + len(left)
