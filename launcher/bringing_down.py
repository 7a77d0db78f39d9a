"""`gpufarm down`: stop a farm, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable

from launcher import farm as farms
from launcher.bringing_up import remove_traces, shut_down
from launcher.client import NotRunningError
from launcher.state import StateDir
from launcher.supervisor import Supervisor


def bring_down(state: StateDir, say: Callable[[str], None]) -> None:
    """Stop the farm, or what a killed supervisor left of one. Raises NotRunningError."""
    none = NotRunningError(f"no farm is running in {state.path}")
    if not state.path.is_dir():
        raise none
    with state.lock():
        farm = farms.load(state)
        if farm is None:
            raise none
        alive = Supervisor(farm.socket).alive()
        say("stopping nginx, then the workers" if alive else "ending what is left of the farm")
        shut_down(farm)
        remove_traces(farm)
        say("the farm is down")
