"""`gpufarm down`: stop a farm, and leave nothing behind."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from launcher.command.client import NotRunningError
from launcher.configuration.state import StateDir
from launcher.processes import farm as farms
from launcher.processes import orphans, ports, supervisor
from launcher.processes.farm import Farm
from launcher.processes.lone_worker import MEASURED_SPEC
from launcher.processes.supervisor import Supervisor

END_GRACE = 60.0
"""Added to the time in which the processes stop, before what is left is killed."""
POLL = 0.1
LEFTOVER_SECONDS = 60.0
"""For workers to finish, where no record tells how long a request may take."""


def bring_down(state: StateDir, say: Callable[[str], None]) -> None:
    """Stop the farm, or what a killed supervisor left of one. Raises NotRunningError."""
    none = NotRunningError(f"no farm is running in {state.path}")
    if not state.path.is_dir():
        if not orphans.supervisors_of(state.path):
            raise none
        state.create()  # somebody removed it below a running farm
    with state.lock():
        farm = farms.load(state)
        if farm is None:
            marker = (state.path / farms.FARM_FILE).exists()
            if not (end_unrecorded(state) or marker):
                raise none
            remove_traces(state)
            say("ended a farm whose records were lost or unreadable")
            return
        alive = Supervisor(farm.socket).alive()
        say("stopping nginx, then the workers" if alive else "ending what is left of the farm")
        shut_down(farm)
        remove_traces(state)
        say("the farm is down")


def end_unrecorded(state: StateDir) -> int:
    """End what runs although no record tells of it. Returns how many processes that were."""
    supervisors = orphans.supervisors_of(state.path)
    orphans.end(supervisors, LEFTOVER_SECONDS)  # told to end, it stops the others in order
    return len(supervisors) + end_leftovers(state, LEFTOVER_SECONDS)


def shut_down(farm: Farm) -> None:
    """Stop a running farm in order: nginx, then the workers together. Returns when all is gone.

    Whatever does not end in its time is killed.
    """
    control = Supervisor(farm.socket)
    stop = farm.settings.workers.request_timeout + supervisor.GRACE_AFTER_REQUEST
    deadline = time.monotonic() + 2 * stop + END_GRACE
    pid = control.pid() if control.alive() else 0
    if pid:
        control.shutdown()
    while pid and _runs(pid, farm.state.path) and time.monotonic() < deadline:
        time.sleep(POLL)
    orphans.clean(farm.state.path, farm.socket, graceful_seconds=0 if pid else stop)


def _runs(pid: int, state: Path) -> bool:
    return any(process.pid == pid for process in orphans.supervisors_of(state))


def end_leftovers(state: StateDir, graceful_seconds: float) -> int:
    """End the processes of a farm whose supervisor does not answer. Returns how many."""
    runtime = state.recorded_runtime()
    socket = runtime / supervisor.SOCKET if runtime is not None else None
    return orphans.clean(state.path, socket, graceful_seconds)


def remove_traces(state: StateDir) -> None:
    """Remove what only a running farm needs; logs, caches, footprints and ports stay."""
    rendered = ("supervisord.conf", "nginx.conf", "worker.json", "slots.json")
    names = [*rendered, farms.FARM_FILE, MEASURED_SPEC]
    for path in (
        *(state.path / name for name in names),
        *(state.settings_file, state.plan_file, state.desired_file),
        state.logs / "supervisord.out.log",
    ):
        path.unlink(missing_ok=True)
    for folder in ("run", "nginx-tmp"):
        shutil.rmtree(state.path / folder, ignore_errors=True)
    state.remove_runtime()
    ports.release(state.path)
