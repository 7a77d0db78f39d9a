"""`gpufarm down`: stop a farm, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable

from launcher.command.bringing_up import end_leftovers, remove_traces, shut_down
from launcher.command.client import NotRunningError
from launcher.configuration.state import StateDir
from launcher.processes import farm as farms
from launcher.processes import orphans
from launcher.processes.supervisor import Supervisor

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
            _end_unrecorded(state, none)
            say("ended a farm whose records were lost or unreadable")
            return
        alive = Supervisor(farm.socket).alive()
        say("stopping nginx, then the workers" if alive else "ending what is left of the farm")
        shut_down(farm)
        remove_traces(state)
        say("the farm is down")


def _end_unrecorded(state: StateDir, none: NotRunningError) -> None:
    """End what runs although no record tells of it. Raises ``none`` where there is nothing."""
    supervisors = orphans.supervisors_of(state.path)
    marker = (state.path / farms.FARM_FILE).exists()
    orphans.end(supervisors, LEFTOVER_SECONDS)  # told to end, it stops the others in order
    if not (end_leftovers(state, LEFTOVER_SECONDS) or supervisors or marker):
        raise none
    remove_traces(state)
