"""Reserve device memory that a starting farm will use and does not use yet.

Two farms that start on one GPU at once would both plan with the same free bytes. So each farm reads
the others' reservations, plans, and writes its own under one lock. The directory is shared by all
users of the machine: its sticky bit protects each user's files, links are never followed, and a
file counts only if its owner is the user in its name. Users can reserve any amount, as they can
allocate the memory itself. Without a usable directory farms plan without reservations. Farms in
other containers that share a GPU but not the directory are not visible.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import stat
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

PARENTS = (Path("/run/lock"), Path("/tmp"))  # noqa: S108 - checked before use
FOLDER = "gpufarm-reservations"
LOCK = "lock"
LOCK_SECONDS = 15.0
"""Timeout for the lock in seconds: planning takes one, but any user could hold it for ever."""
KEPT_SECONDS = 15.0
"""Seconds that a reservation outlives its process, until another process of its farm renews it."""
MAX_BYTES = 64 * 1024
"""Maximum size of a reservation file in bytes; a larger one is ignored."""


@dataclass(frozen=True)
class Owner:
    """The process that renews a reservation."""

    boot: str
    pid: int
    started: int
    """Start time in clock ticks since boot; with the pid it identifies one process of this boot."""


@contextmanager
def locked() -> Iterator[None]:
    """Hold the machine-wide lock while planning and reserving.

    Continues without it, with a warning, when there is no directory or the lock times out.
    """
    handle = _open_lock()
    try:
        if handle is not None and not _flock(handle):
            log.warning("the lock for reservations is held by another user; continuing without it")
        yield
    finally:
        if handle is not None:
            os.close(handle)


def others(state: Path) -> dict[str, int]:
    """Return device id → bytes that the other farms of this machine will use.

    Call it before reading the devices' free memory: memory allocated in between then counts twice
    rather than not at all.
    """
    total: Counter[str] = Counter()
    folder = _folder()
    if folder is None:
        return {}
    own = _file_name(state)
    with suppress(OSError):
        for path in sorted(folder.glob("*.json")):
            if path.name != own and (record := _read(path)) is not None:
                if _is_valid(record):
                    total.update(record["devices"])
                elif _owner_of(path.name) == os.getuid():
                    path.unlink(missing_ok=True)
    return dict(total)


def reserve(state: Path, devices: Mapping[str, int]) -> None:
    """Replace this farm's reservation, with this process as its owner.

    Does nothing without a shared directory.
    """
    folder = _folder()
    if folder is None:
        return
    needed = {device: size for device, size in devices.items() if size > 0}
    if not needed:
        release(state)
        return
    record = {"owner": asdict(_this_process()), "renewed": _now(), "devices": needed}
    target = folder / _file_name(state)
    temporary = folder / f".{target.name}.{os.getpid()}"
    with suppress(OSError):
        temporary.unlink(missing_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            os.fchmod(handle, 0o644)
            json.dump(record, file)
        temporary.replace(target)
        return
    log.warning("%s cannot be written; other farms do not see this reservation", target)


def release(state: Path) -> None:
    """Remove this farm's reservation, if it has one."""
    if (folder := _folder()) is not None:
        with suppress(OSError):
            (folder / _file_name(state)).unlink(missing_ok=True)


def _file_name(state: Path) -> str:
    digest = hashlib.sha256(os.fsencode(state.resolve())).hexdigest()[:16]
    return f"{os.getuid()}-{digest}.json"


def _owner_of(name: str) -> int:
    uid = name.partition("-")[0]
    return int(uid) if uid.isdecimal() else -1


def _folder() -> Path | None:
    """Return the shared directory, created if missing; None when it cannot be.

    Its parent has to be world-writable and sticky, so that all users choose the same one.
    """
    for parent in PARENTS:
        if not _is_shared(parent):
            continue
        folder = parent / FOLDER
        if _is_shared(folder) or _create(folder):
            return folder
    return None


def _create(folder: Path) -> bool:
    """Create it with its final mode at once: another farm may look for it at the same time."""
    new = folder.with_name(f".{FOLDER}.{os.getpid()}")
    with suppress(OSError):
        new.mkdir()
        new.chmod(0o1777)  # whatever the umask
        new.rename(folder)  # replaces only an empty directory
    with suppress(OSError):
        new.rmdir()
    return _is_shared(folder)


def _is_shared(folder: Path) -> bool:
    """Return whether it is a real directory, no link, that is world-writable and sticky."""
    try:
        mode = folder.lstat().st_mode
    except OSError:
        return False
    return stat.S_ISDIR(mode) and stat.S_IMODE(mode) & 0o1777 == 0o1777


def _open_lock() -> int | None:
    folder = _folder()
    if folder is None:
        log.warning(
            "no directory for reservations; farms that start together may plan too much memory"
        )
        return None
    path, flags = folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        # Not with O_CREAT first: Linux refuses that for another user's file in such a directory.
        return os.open(path, flags)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("%s: %s; continuing without this lock", path, error.strerror)
        return None
    try:
        handle = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:  # another farm created it first
        return _open_lock()
    os.fchmod(handle, 0o666)  # whatever the umask
    return handle


def _flock(handle: int) -> bool:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)


def _read(path: Path) -> dict[str, Any] | None:
    """Read a reservation; None when the file has another owner or is invalid."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != _owner_of(path.name):
                return None
            data = json.loads(file.read(MAX_BYTES + 1)[:MAX_BYTES])
        devices = data["devices"]
        owner = data["owner"]
        numbers = [owner["pid"], owner["started"], *devices.values()]
        if not all(_is_size(number) for number in numbers):
            return None
        return {
            "owner": Owner(str(owner["boot"]), owner["pid"], owner["started"]),
            "renewed": float(data["renewed"]),
            "devices": {str(device): size for device, size in devices.items()},
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 60


def _is_valid(record: Mapping[str, Any]) -> bool:
    """Return whether its process runs or has just ended."""
    owner: Owner = record["owner"]
    if owner.boot != _boot_id():
        return False
    if 0 <= _now() - record["renewed"] < KEPT_SECONDS:
        return True
    return _started(owner.pid) == owner.started


def _this_process() -> Owner:
    return Owner(_boot_id(), os.getpid(), _started(os.getpid()) or 0)


def _started(pid: int) -> int | None:
    """Return a process's start time in clock ticks since boot; None when it does not run."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        state, *fields = text.rpartition(")")[2].split()
        return None if state in "ZX" else int(fields[18])
    except (OSError, ValueError, IndexError):
        return None


def _boot_id() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def _now() -> float:
    """Return the seconds since boot: monotonic, and the same for every process."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
