"""nginx's processes after the fact: which of them are ours, and how they are ended.

nginx overwrites the environment that it was given, and after a `kill -9` of its master the
processes below it live on and hold the port. So the start of every master is written down, and a
process counts as ours only when its group, the boot, its start time and its open files agree. Where
that record was lost, the title that nginx gives itself stands for it.
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
KILL_SECONDS = 5.0
"""How long the kernel may take to end a killed process; one that hangs in it is given up."""


@dataclass(frozen=True)
class Master:
    """One nginx master that was started below a prefix; its pid is also its process group."""

    pid: int
    ticks: int
    """Start time in clock ticks since boot: with the pid and the boot it names one process."""
    boot: str


def boot_id() -> str:
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None when there is no such process."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def parent(pid: int) -> int | None:
    """The process that started it; None when there is no such process."""
    fields = _stat(pid)
    return int(fields[1]) if fields else None


def _stat(pid: int) -> list[str]:
    """What the kernel tells of a living process, from its state on; nothing of an ended one."""
    try:
        stat = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return []
    # The second field is the program's name in brackets and may contain anything.
    fields = stat.rpartition(")")[2].split()
    return [] if fields[0] in "ZX" else fields


def this_process() -> Master:
    """The record of the calling process, to be written before it becomes nginx."""
    return Master(os.getpid(), start_ticks(os.getpid()) or 0, boot_id())


def read(prefix: Path) -> list[Master]:
    """The recorded masters of this boot, oldest first."""
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
    """The pid of the nginx that serves now, or None."""
    for master in reversed(read(prefix)):
        if start_ticks(master.pid) == master.ticks:
            return master.pid
    return None


def pids() -> list[int]:
    """Of all processes that there are."""
    return [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]


def members(master: Master, prefix: Path) -> list[int]:
    """The living processes of a recorded nginx: never a stranger that got its numbers later."""
    found, inside = [], f"{prefix.resolve()}/"
    for pid in pids():
        try:
            if os.getpgid(pid) != master.pid or pid == os.getpid():
                continue
        except ProcessLookupError:
            continue
        ticks = start_ticks(pid)
        if ticks is not None and ticks >= master.ticks and _holds(pid, inside):
            found.append(pid)
    return found


def _holds(pid: int, beginning: str) -> bool:
    """Whether it has a file open whose path begins so."""
    try:
        return any(
            str(link.readlink()).startswith(beginning)
            for link in (PROC / str(pid) / "fd").iterdir()
        )
    except OSError:
        return False


def all_members(prefix: Path) -> list[int]:
    """Every living nginx process that was ever started below this prefix."""
    recorded = {pid for master in read(prefix) for pid in members(master, prefix)}
    return sorted(recorded | _titled(prefix))


def _titled(prefix: Path) -> set[int]:
    found = set()
    for pid in pids():
        with contextlib.suppress(OSError):
            if (PROC / str(pid) / "cmdline").read_bytes().startswith(b"nginx: "):
                found.add(pid)
    # Not all below the prefix: another farm's may lie inside of it.
    logs = f"{prefix.resolve()}/{ERROR_LOG.rpartition('/')[0]}/nginx-"
    return {pid for pid in found if start_ticks(pid) and _holds(pid, logs)}


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def end(prefix: Path, graceful_seconds: float) -> list[int]:
    """End all nginx processes of this prefix: QUIT, then KILL after ``graceful_seconds``.

    Returns the pids that were found. Blocks until they are gone.
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
    """Let the running nginx open its log files again, after they were moved aside or deleted.

    False when no nginx runs."""
    pid = running_master(prefix)
    if pid is None:
        return False
    send([pid], signal.SIGUSR1)
    return True
