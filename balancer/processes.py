"""Find and end the nginx processes of a prefix, also after their master was killed.

nginx overwrites its environment, and after a `kill -9` of its master the child processes keep
running and hold the port. So every master's start is recorded, and a process belongs to it only if
process group, boot, start time and open files agree. Without the record, nginx's process title and
open logs identify it.

Read from /proc rather than by psutil: its start times move with the clock, and its list of open
files leaves out deleted ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from balancer.configuration import ERROR_LOG

RECORD = "run/nginx-masters.json"
PROC = Path("/proc")
CHECK_SECONDS = 0.02
"""Seconds between two checks whether processes have ended."""
KILL_SECONDS = 5.0
"""Seconds that the kernel may take to end a killed process before it is ignored."""


@dataclass(frozen=True)
class Master:
    """One nginx master of a prefix; its pid is also its process group."""

    pid: int
    ticks: int
    """Start time in clock ticks since boot: with the pid and the boot it identifies one process."""
    boot: str


def boot_id() -> str:
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def start_ticks(pid: int) -> int | None:
    """Return a process's start time in clock ticks since boot; None if it does not run."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def parent(pid: int) -> int | None:
    """Return a process's parent; None if it does not run."""
    fields = _stat(pid)
    return int(fields[1]) if fields else None


def _stat(pid: int) -> list[str]:
    """Return the fields of a running process's stat from its state on; empty if it has ended."""
    try:
        stat = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return []
    # The second field is the program's name in brackets and may contain anything.
    fields = stat.rpartition(")")[2].split()
    return [] if fields[0] in "ZX" else fields


def this_process() -> Master:
    """Return the record of this process, to be written before it execs nginx."""
    return Master(os.getpid(), start_ticks(os.getpid()) or 0, boot_id())


def read(prefix: Path) -> list[Master]:
    """Return the recorded masters of this boot, oldest first."""
    try:
        entries = json.loads((prefix / RECORD).read_text())
        masters = [Master(**entry) for entry in entries]
    except (OSError, ValueError, TypeError):
        return []
    return [master for master in masters if master.boot == boot_id()]


def write(prefix: Path, masters: list[Master]) -> None:
    path = prefix / RECORD
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps([asdict(master) for master in masters]))
    fresh.replace(path)


def running_master(prefix: Path) -> int | None:
    """Return the pid of the running master, or None."""
    for master in reversed(read(prefix)):
        if start_ticks(master.pid) == master.ticks:
            return master.pid
    return None


def pids() -> list[int]:
    """Return the pids of all processes."""
    return [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]


def members(master: Master, prefix: Path) -> list[int]:
    """Return a master's running processes, never an unrelated one that reuses its pid or group."""
    found, inside = [], f"{prefix.resolve()}/"
    for pid in pids():
        try:
            if os.getpgid(pid) != master.pid or pid == os.getpid():
                continue
        except ProcessLookupError:
            continue
        ticks = start_ticks(pid)
        if ticks is not None and ticks >= master.ticks and _has_open(pid, inside):
            found.append(pid)
    return found


def _has_open(pid: int, prefix: str) -> bool:
    """Return whether it has a file open whose path starts with ``prefix``."""
    try:
        return any(
            str(link.readlink()).startswith(prefix) for link in (PROC / str(pid) / "fd").iterdir()
        )
    except OSError:
        return False


def all_members(prefix: Path) -> list[int]:
    """Return every running nginx process that was started below this prefix."""
    recorded = {pid for master in read(prefix) for pid in members(master, prefix)}
    return sorted(recorded | _find_by_title(prefix))


def _find_by_title(prefix: Path) -> set[int]:
    found = set()
    for pid in pids():
        with contextlib.suppress(OSError):
            if (PROC / str(pid) / "cmdline").read_bytes().startswith(b"nginx: "):
                found.add(pid)
    # Only the logs: another farm's directory may be inside the prefix.
    logs = f"{prefix.resolve()}/{ERROR_LOG.rpartition('/')[0]}/nginx-"
    return {pid for pid in found if start_ticks(pid) and _has_open(pid, logs)}


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def end(prefix: Path, graceful_seconds: float) -> list[int]:
    """End all nginx processes of this prefix: QUIT, then KILL after ``graceful_seconds``.

    Returns the pids that were found. Blocks until they have ended.
    """
    found = all_members(prefix)
    send(found, signal.SIGQUIT)
    deadline = time.monotonic() + graceful_seconds
    while left := all_members(prefix):
        if time.monotonic() > deadline:
            send(left, signal.SIGKILL)
        if time.monotonic() > deadline + KILL_SECONDS:
            break
        time.sleep(CHECK_SECONDS)
    (prefix / RECORD).unlink(missing_ok=True)
    return found


def reopen_logs(prefix: Path) -> bool:
    """Have the running nginx reopen its log files after they were moved or deleted.

    Returns False if no nginx runs.
    """
    pid = running_master(prefix)
    if pid is None:
        return False
    send([pid], signal.SIGUSR1)
    return True
