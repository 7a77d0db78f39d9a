"""The state directory: where a farm keeps its files, one directory for each farm.

It is private to its user (0700). It holds the sockets too where its path is short enough: the path
of a Unix socket is limited to some 104 bytes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from launcher.config.sources import ConfigError

log = logging.getLogger(__name__)

SOCKET_PATH_LIMIT = 104
"""Bytes that a Unix socket's path may have, by the strictest system (Linux: 107)."""
FORBIDDEN_IN_SOCKET_PATH = re.compile(r"[\x00-\x1f;{}$\"'\\#:]")
"""Characters that a socket's path in nginx's configuration cannot have."""
LONGEST_SOCKET_NAME = len("/supervisor.sock.12345678")
"""supervisord binds ``NAME.PID`` first and renames it."""


class StateError(Exception):
    """The state directory cannot be used now (a full disk, a held lock). Exit code 1."""


class LockedError(StateError):
    """Another gpufarm command is working on this farm."""


class StateDir:
    """A farm's directory. Building one touches nothing; ``create`` does."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute().resolve()
        """One farm, whichever links lead to it."""

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def cache(self) -> Path:
        """What workers compile or download once (``GPUFARM_CACHE_DIR``)."""
        return self.path / "cache"

    @property
    def farm_file(self) -> Path:
        """Exists from `up` to `down`."""
        return self.path / "farm.json"

    @property
    def generations(self) -> Path:
        """One file for each generation of the configuration that is in use."""
        return self.path / "generations"

    @property
    def specs(self) -> Path:
        """The files that workers read at their start, named by their digest."""
        return self.path / "specs"

    @property
    def slots(self) -> Path:
        """The command and environment of each slot's worker."""
        return self.path / "slots"

    @property
    def desired_file(self) -> Path:
        return self.path / "desired.json"

    @property
    def ports_file(self) -> Path:
        return self.path / "ports.json"

    @property
    def footprints_file(self) -> Path:
        return self.path / "footprints.json"

    def create(self) -> StateDir:
        """Make the directory and its folders, private. Raises ConfigError where it cannot."""
        try:
            if self._holds_other_files():
                raise ConfigError(
                    f"state_dir = {self.path}: holds other files; "
                    f"name a new or an empty folder with --state-dir"
                )
            for folder in self._folders():
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if stat.S_IMODE(self.path.stat().st_mode) & 0o077:
                self.path.chmod(0o700)
        except OSError as error:
            raise self._refused(error) from None
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise self._refused(PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
        return self

    def _folders(self) -> tuple[Path, ...]:
        return (self.path, self.logs, self.cache, self.generations, self.specs, self.slots)

    def _holds_other_files(self) -> bool:
        """Return whether the folder is in use for something else: a farm closes its folder to other
        users, and `down` removes files there."""
        if not self.path.is_dir():
            return False
        there = {entry.name for entry in self.path.iterdir()} - {"lost+found"}
        marks = {"lock", self.ports_file.name, self.footprints_file.name}
        ours = there & marks or {self.logs.name, self.cache.name} <= there
        return bool(there) and not ours

    def _refused(self, error: OSError) -> Exception:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _full(self.path)
        return ConfigError(
            f"state_dir = {self.path}: cannot be used: {error.strerror}; "
            f"name a folder that you may write with --state-dir"
        )

    def runtime(self) -> Path:
        """Return the short, private directory for sockets; make it where it is missing.

        It lives as long as the farm: in the state directory where sockets can be made there, else
        in /tmp. Never in ``$XDG_RUNTIME_DIR``, which is removed when its user logs out.
        """
        if recorded := self.recorded_runtime():
            with suppress(OSError):
                recorded.mkdir(mode=0o700, exist_ok=True)
            if _is_private(recorded):
                return self._recorded(recorded)
        return self._recorded(self._make_runtime())

    def _recorded(self, folder: Path) -> Path:
        if not self._runtime_record.exists():
            write_text(self._runtime_record, f"{folder}\n")
        return folder

    @property
    def _runtime_record(self) -> Path:
        return self.path / "runtime"

    def recorded_runtime(self) -> Path | None:
        """Return the sockets' directory that was chosen before, even if it has been removed since.

        A lost record is recovered: the directory's name depends on this state directory only.
        """
        with suppress(OSError, ValueError):
            recorded = Path(self._runtime_record.read_text(encoding="utf-8").strip())
            if recorded in self._runtimes():
                return recorded
        return next((folder for folder in self._runtimes() if _is_private(folder)), None)

    def _runtimes(self) -> list[Path]:
        """List the possible directories for sockets, the best first."""
        digest = hashlib.sha256(os.fsencode(self.path.resolve())).hexdigest()[:10]
        return [
            self.path / "run",
            Path("/tmp") / f"gpufarm-{os.getuid()}-{digest}",  # noqa: S108 - checked
        ]

    def _make_runtime(self) -> Path:
        problems = []
        for folder in self._runtimes():
            if FORBIDDEN_IN_SOCKET_PATH.search(str(folder)):
                problems.append(f"{folder}: has characters that nginx cannot read")
                continue
            if len(os.fsencode(folder)) + LONGEST_SOCKET_NAME > SOCKET_PATH_LIMIT:
                problems.append(f"{folder}: too long for a socket's path")
                continue
            try:
                folder.mkdir(mode=0o700, exist_ok=True)
                if not _is_private(folder):
                    problems.append(f"{folder}: belongs to another user or is open to others")
                    continue
                _try_socket(folder)
            except OSError as error:
                problems.append(f"{folder}: {error.strerror}")
                continue
            return folder
        raise StateError(f"no directory for sockets: {'; '.join(problems)}; remove what is there")

    def remove_runtime(self) -> None:
        """Remove the sockets, and their directory where it lies outside of the state directory."""
        folder = self.recorded_runtime()
        if folder is not None and folder.parent != self.path:
            shutil.rmtree(folder, ignore_errors=True)
        elif folder is not None:
            for entry in folder.glob("*.sock*"):
                entry.unlink(missing_ok=True)
        self._runtime_record.unlink(missing_ok=True)

    @contextmanager
    def lock(self, wait: float = 0.0) -> Iterator[None]:
        """Lock the farm for one command, waiting ``wait`` seconds. Raises LockedError.

        The kernel releases the lock when the process ends; children do not inherit it.
        """
        deadline = time.monotonic() + wait
        try:
            file = (self.path / "lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise self._refused(error) from None
        with file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        file.seek(0)
                        holder = file.read().strip()
                        who = f" (pid {holder})" if holder else ""
                        raise LockedError(
                            f"another gpufarm command{who} is working on {self.path}; wait for it"
                        ) from None
                    time.sleep(0.05)
            with suppress(OSError):  # the pid is for error messages; a full disk may lose it
                file.truncate(0)
                file.write(f"{os.getpid()}\n")
                file.flush()
            yield

    def ports(self) -> tuple[int, ...]:
        """Return the recorded slot ports; empty where there are none."""
        recorded = read_json(self.ports_file)
        if not isinstance(recorded, list) or not all(isinstance(port, int) for port in recorded):
            return ()
        return tuple(recorded)

    def record_ports(self, ports: Sequence[int]) -> None:
        write_json(self.ports_file, list(ports))


def _try_socket(folder: Path) -> None:
    """Make a socket and a hard link to it, as supervisord does. Raises OSError."""
    path, second = folder / f"probe.sock.{os.getpid()}", folder / f"probe.sock.{os.getpid()}.2"
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.bind(str(path))
            os.link(path, second)
        finally:
            path.unlink(missing_ok=True)
            second.unlink(missing_ok=True)


def _is_private(folder: Path) -> bool:
    """Return whether this is a real directory (no link) of this user, closed to others."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.getuid()
        and not stat.S_IMODE(found.st_mode) & 0o077
    )


def write_json(path: Path, data: Any) -> None:
    """Replace ``path`` atomically: a reader sees the old or the new, even after a crash."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` atomically. Raises StateError (full disk) or ConfigError (not writable)."""
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(path) from None
        raise ConfigError(
            f"{path}: cannot be written: {error.strerror}; "
            f"name another folder with --state-dir, or correct its owner"
        ) from None


def _full(path: Path) -> StateError:
    return StateError(f"{path}: the disk is full; free some space and run the command again")


def read_json(path: Path) -> Any | None:
    """Read a JSON file; None where there is none.

    A corrupt file is renamed, with a warning, so that it is reported once.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; correct its owner") from None
    except ValueError:
        set_aside(path)
        return None


def set_aside(path: Path) -> None:
    """Rename a corrupt file, with a warning."""
    aside = path.with_name(f"{path.name}.corrupt-{time.strftime('%Y%m%dT%H%M%S')}")
    with suppress(OSError):
        path.replace(aside)
        log.warning("%s is corrupt; it was set aside as %s", path, aside.name)
