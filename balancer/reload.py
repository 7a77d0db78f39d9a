"""A reload of nginx's file that loses no request.

At SIGHUP the old processes close their idle connections, and a client that sends its next request
just then gets an error; only from version 1.27.4 on can nginx keep them open for a moment. So the
connections in use are ended before that, in the one way that no client can miss: while the file
``run/closing`` exists, each answer says ``Connection: close``. What an old process has not begun to
answer by then says so by itself.
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
"""For the open connections to end. One that is left has been idle for so long, or carries a stream
that began before."""
START_SECONDS = 10.0
"""For the new processes to serve. Where they do not, nginx has refused the file."""
CHECK_SECONDS = 0.01
ESTABLISHED = "01"
SHUTTING_DOWN = b"nginx: worker process is shutting down"


def reload(prefix: Path) -> bool:
    """Let the running nginx read its file again.

    Blocks until its new processes alone take requests, for CLOSING_SECONDS + START_SECONDS at most.
    False when no nginx runs, or when it goes on with the old file because it refuses the new one.
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
    """Let connections live again where a reload was killed before it could say so."""
    with contextlib.suppress(OSError):
        age = time.time() - (prefix / CLOSING).stat().st_mtime
        if age > 2 * (CLOSING_SECONDS + START_SECONDS):
            (prefix / CLOSING).unlink()


def connections(port: int) -> set[tuple[str, str]]:
    """The established connections to a local port: (local, remote) as the kernel writes them."""
    found = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (PROC / "net" / table).read_text().splitlines()[1:]:
                _, local, remote, state, *_ = line.split()
                if state == ESTABLISHED and int(local.rpartition(":")[2], 16) == port:
                    found.add((local, remote))
    return found


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether it became true within that time."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(CHECK_SECONDS)
    return met


def _children(master: int) -> set[int]:
    """The pids of nginx's processes; none where its master has ended."""
    return {pid for pid in pids() if parent(pid) == master}


def _are_replaced(master: int, old: set[int]) -> bool:
    """Whether there are new processes, and no old one takes connections any more."""
    return bool(_children(master) - old) and all(_has_stopped(pid) for pid in old)


def _has_stopped(pid: int) -> bool:
    try:
        title = (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return True
    return not title or title.startswith(SHUTTING_DOWN)
