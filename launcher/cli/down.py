"""`gpufarm down`: stop a farm, and leave nothing behind."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from launcher.cli.client import NotRunningError
from launcher.config.state import StateDir
from launcher.planning import reservations
from launcher.supervision import farm as farms
from launcher.supervision import leftovers, ports
from launcher.supervision import supervisord as supervisor
from launcher.supervision.farm import Farm
from launcher.supervision.measurement_worker import MEASUREMENT_SPEC
from launcher.supervision.supervisord import Supervisor

END_GRACE = 60.0
"""Added to the time in which the processes stop, before what is left is killed."""
POLL = 0.1
LEFTOVER_SECONDS = 60.0
"""For workers to finish, where no record says how long a request may take."""


def bring_down(state: StateDir, say: Callable[[str], None]) -> None:
    """Stop the farm, or what is left of one. Raises NotRunningError, and StillRunningError where
    something could not be ended."""
    none = NotRunningError(f"no farm is running in {state.path}")
    if not state.path.is_dir():
        if not leftovers.find(state.path):
            raise none
        state.create()  # it was removed below a running farm
    with state.lock():
        farm = farms.load(state)
        if farm is None:
            marker = state.farm_file.exists()
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
    """End what runs although no record says so. Returns how many processes that were."""
    supervisors = leftovers.find_supervisors(state.path)
    leftovers.end(supervisors, LEFTOVER_SECONDS)  # asked to end, it stops the others in order
    return len(supervisors) + leftovers.clean(state.path, LEFTOVER_SECONDS)


def shut_down(farm: Farm) -> None:
    """Stop a running farm in order: nginx, then the workers together. Returns when all is gone.

    Whatever does not end in its time is killed. Raises StillRunningError.
    """
    stop = stop_seconds(farm)
    deadline = time.monotonic() + 2 * stop + END_GRACE
    control = Supervisor(farm.socket)
    running = leftovers.find_supervisors(farm.state.path)
    if control.alive():
        control.shutdown()
    else:
        # Without its socket it can still be asked to end by a signal.
        leftovers.end(running, 0 if not running else 2 * stop + END_GRACE)
    while leftovers.find_supervisors(farm.state.path) and time.monotonic() < deadline:
        time.sleep(POLL)
    leftovers.clean(farm.state.path, graceful_seconds=0 if running else stop)


def stop_seconds(farm: Farm) -> float:
    """How long a worker may take to finish what it has."""
    requests = [generation.settings.workers.request_timeout for generation in farm.generations]
    return max(requests) + supervisor.GRACE_AFTER_REQUEST


def remove_traces(state: StateDir) -> None:
    """Remove what only a running farm needs; logs, caches, footprints and ports stay."""
    names = [supervisor.CONF, "nginx.conf", MEASUREMENT_SPEC]
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
