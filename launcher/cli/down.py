"""`gpufarm down`: stop a farm and remove what only a running farm needs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from launcher.cli.client import NotRunningError, poll_until
from launcher.config.state import StateDir
from launcher.planning import reservations
from launcher.supervision import farm as farms
from launcher.supervision import leftovers, ports, supervisord
from launcher.supervision.farm import Farm
from launcher.supervision.measurement_worker import MEASUREMENT_SPEC
from launcher.supervision.supervisord import Supervisor

SHUTDOWN_GRACE = 60.0
"""Seconds added to the time in which the processes stop, before what is left is killed."""
POLL_SECONDS = 0.1
LEFTOVER_SECONDS = 60.0
"""For workers to finish, where no record gives the request timeout."""


def bring_down(state: StateDir, report: Callable[[str], None]) -> None:
    """Stop the farm, or what is left of one.

    Raises NotRunningError, and StillRunningError where a process could not be ended.
    """
    not_running = NotRunningError(f"no farm is running in {state.path}")
    if not state.path.is_dir():
        if not leftovers.find(state.path):
            raise not_running
        state.create()  # it was deleted while the farm ran
    with state.lock():
        farm = farms.load(state)
        if farm is None:
            recorded = state.farm_file.exists()
            if not (end_unrecorded(state) or recorded):
                raise not_running
            remove_runtime_files(state)
            report("ended a farm whose records were lost or unreadable")
            return
        alive = Supervisor(farm.socket).alive()
        report("stopping nginx, then the workers" if alive else "ending what is left of the farm")
        shut_down(farm)
        remove_runtime_files(state)
        report("the farm is down")


def end_unrecorded(state: StateDir) -> int:
    """End the processes of a farm without records. Returns how many there were."""
    supervisors = leftovers.find_supervisors(state.path)
    leftovers.end(supervisors, LEFTOVER_SECONDS)  # supervisord stops the others in order
    return len(supervisors) + leftovers.clean(state.path, LEFTOVER_SECONDS)


def shut_down(farm: Farm) -> None:
    """Stop a running farm in order: nginx, then the workers together.

    Returns when every process has ended; those that exceed their time are killed.
    Raises StillRunningError.
    """
    stop = stop_seconds(farm)
    limit = 2 * stop + SHUTDOWN_GRACE
    control = Supervisor(farm.socket)
    running = leftovers.find_supervisors(farm.state.path)
    if control.alive():
        control.shutdown()
    else:
        # Without its socket it still obeys a signal.
        leftovers.end(running, limit if running else 0)
    poll_until(lambda: not leftovers.find_supervisors(farm.state.path), limit, POLL_SECONDS)
    leftovers.clean(farm.state.path, graceful_seconds=0 if running else stop)


def stop_seconds(farm: Farm) -> float:
    """Return the seconds that a worker may take to finish its requests."""
    requests = [generation.settings.workers.request_timeout for generation in farm.generations]
    return max(requests) + supervisord.GRACE_AFTER_REQUEST


def remove_runtime_files(state: StateDir) -> None:
    """Remove what only a running farm needs; keep logs, caches, footprints and ports."""
    names = [supervisord.CONF, "nginx.conf", MEASUREMENT_SPEC]
    for path in (
        *(state.path / name for name in names),
        *(state.farm_file, state.desired_file),
        state.logs / "supervisord.out.log",
    ):
        path.unlink(missing_ok=True)
    state.remove_runtime()
    for folder in (Path("run"), Path("nginx-tmp"), state.generations, state.specs, state.slots):
        shutil.rmtree(state.path / folder, ignore_errors=True)
    ports.release(state.path)
    reservations.release(state.path)
