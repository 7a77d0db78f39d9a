"""Reload nginx's configuration without losing a request.

At SIGHUP the old processes close their idle connections, and a client that sends its next request
at that moment gets an error; nginx can keep them open briefly only from version 1.27.4 on. So open
connections are closed before: while the file ``run/closing`` exists, each response carries
``Connection: close``. Old processes add that header themselves to later responses.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path

from balancer.configuration import CLOSING, listening
from balancer.processes import PROC, parent, pids, running_master, send

CLOSING_SECONDS = 5.0
"""Seconds for open connections to close. One still open was idle that long, or streams a response
that began before."""
START_SECONDS = 10.0
"""Seconds for the new processes to serve. If they do not, nginx has rejected the file."""
CHECK_SECONDS = 0.01
"""Seconds between two checks of connections or processes."""
ESTABLISHED = "01"
"""Its state in /proc/net/tcp."""
SHUTTING_DOWN = b"nginx: worker process is shutting down"


def reload(prefix: Path) -> bool:
    """Have the running nginx read its configuration again.

    Blocks until only its new processes take requests, for CLOSING_SECONDS + START_SECONDS at most.
    Returns False if no nginx runs, or if it rejects the new file and keeps the old one.
    """
    master = running_master(prefix)
    if master is None:
        return False
    flag, port = prefix / CLOSING, listening(prefix)[1]
    try:
        flag.touch(mode=0o600)
        before = connections(port)
        _wait(lambda: not before & connections(port), CLOSING_SECONDS)
        old = _children(master)
        send([master], signal.SIGHUP)
        return _wait(lambda: _are_replaced(master, old), START_SECONDS)
    finally:
        flag.unlink(missing_ok=True)


def remove_abandoned_flag(prefix: Path) -> None:
    """Remove the closing flag that a killed reload left behind."""
    with contextlib.suppress(OSError):
        age = time.time() - (prefix / CLOSING).stat().st_mtime
        if age > 2 * (CLOSING_SECONDS + START_SECONDS):
            (prefix / CLOSING).unlink()


def connections(port: int) -> set[tuple[str, str]]:
    """Return established connections to a local port: (local, remote) as in /proc/net/tcp."""
    found = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (PROC / "net" / table).read_text().splitlines()[1:]:
                _, local, remote, state, *_ = line.split()
                if state == ESTABLISHED and int(local.rpartition(":")[2], 16) == port:
                    found.add((local, remote))
    return found


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait up to ``seconds``; return whether the condition became true."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(CHECK_SECONDS)
    return met


def _children(master: int) -> set[int]:
    """Return the pids of nginx's processes; empty if its master has ended."""
    return {pid for pid in pids() if parent(pid) == master}


def _are_replaced(master: int, old: set[int]) -> bool:
    """Return whether new processes run and no old one accepts connections."""
    return bool(_children(master) - old) and all(_has_stopped(pid) for pid in old)


def _has_stopped(pid: int) -> bool:
    try:
        title = (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return True
    return not title or title.startswith(SHUTTING_DOWN)
