"""The state directory: where a farm keeps its files, one farm a directory.

Everything in it belongs to one user (0700). Sockets live in a short runtime directory, since the
path of a Unix socket may not exceed some 104 bytes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from launcher.configuration.sources import ConfigError

log = logging.getLogger(__name__)

SOCKET_PATH_LIMIT = 104
"""Bytes that a Unix socket's path may have, by the strictest system (Linux: 107)."""
LONGEST_SOCKET_NAME = len("/supervisor.sock.12345678")
"""supervisord binds ``NAME.PID`` first and renames it."""


class StateError(Exception):
    """The state directory does not do what it should (a full disk, a held lock). Exit code 1."""


class LockedError(StateError):
    """Another gpufarm command is working on this farm."""


class StateDir:
    """A farm's directory. Building one touches nothing; ``create`` does."""

    def __init__(self, path: Path, environ: Mapping[str, str] | None = None) -> None:
        self.path = path.expanduser().absolute()
        self._environ = os.environ if environ is None else environ

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def cache(self) -> Path:
        """What workers compile or download once (``GPUFARM_CACHE_DIR``)."""
        return self.path / "cache"

    @property
    def settings_file(self) -> Path:
        return self.path / "settings.json"

    @property
    def plan_file(self) -> Path:
        return self.path / "plan.json"

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
        """Make the directory and its folders, private. Raises ConfigError where that is refused."""
        try:
            if self._is_somebody_elses():
                raise ConfigError(
                    f"state_dir = {self.path}: holds other files, and a farm would mix with them; "
                    f"name a new or an empty folder with --state-dir"
                )
            for folder in (self.path, self.logs, self.cache):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if stat.S_IMODE(self.path.stat().st_mode) & 0o077:
                self.path.chmod(0o700)
        except OSError as error:
            raise self._refused(error) from None
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise self._refused(PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
        return self

    def _is_somebody_elses(self) -> bool:
        """Whether the folder is in use for something else: a farm closes its folder to others,
        and `down` removes what it made there."""
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
        """The short, private directory for sockets; made when it is not there.

        The choice is recorded, since a later command may run without ``XDG_RUNTIME_DIR``.
        """
        if recorded := self.recorded_runtime():
            return recorded
        folder = self._make_runtime()
        write_text(self._runtime_record, f"{folder}\n")
        return folder

    @property
    def _runtime_record(self) -> Path:
        return self.path / "runtime"

    def recorded_runtime(self) -> Path | None:
        """The sockets' directory that was chosen before and is still there.

        Where the record was lost it is looked for: its name belongs to this state directory.
        """
        with suppress(OSError, ValueError):
            recorded = Path(self._runtime_record.read_text(encoding="utf-8").strip())
            if recorded.is_absolute() and _is_private(recorded):
                return recorded
        return next((folder for folder in self._runtimes() if _is_private(folder)), None)

    def _runtimes(self) -> list[Path]:
        """Where the sockets may lie, the best place first."""
        digest = hashlib.sha256(os.fsencode(self.path.resolve())).hexdigest()[:10]
        given = self._environ.get("XDG_RUNTIME_DIR")
        first = [Path(given) / f"gpufarm-{digest}"] if given and Path(given).is_absolute() else []
        return [*first, Path("/tmp") / f"gpufarm-{os.getuid()}-{digest}"]  # noqa: S108 - checked

    def _make_runtime(self) -> Path:
        problem = ""
        for folder in self._runtimes():
            if len(os.fsencode(folder)) + LONGEST_SOCKET_NAME > SOCKET_PATH_LIMIT:
                problem = f"{folder}: too long for a socket's path"
                continue
            try:
                folder.mkdir(mode=0o700, exist_ok=True)
            except OSError as error:
                problem = f"{folder}: {error.strerror}"
                continue
            if _is_private(folder):
                return folder
            problem = f"{folder}: exists and is not a folder of ours alone; remove it"
        raise StateError(f"no runtime directory for sockets ({problem})")

    def remove_runtime(self) -> None:
        """Take the sockets' directory away again; nothing happens where there is none."""
        folder = self.recorded_runtime()
        if folder is not None and folder.name.startswith("gpufarm-"):
            shutil.rmtree(folder, ignore_errors=True)
        self._runtime_record.unlink(missing_ok=True)

    @contextmanager
    def lock(self, wait: float = 0.0) -> Iterator[None]:
        """Hold the farm for one command, waiting ``wait`` seconds. Raises LockedError.

        The kernel lets go when the process ends, however it ends; children do not inherit it.
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
            with suppress(OSError):  # who holds it is told to others; a full disk is no obstacle
                file.truncate(0)
                file.write(f"{os.getpid()}\n")
                file.flush()
            yield

    def ports(self) -> tuple[int, ...]:
        """The slot ports that this farm has recorded; empty where it has none."""
        recorded = read_json(self.ports_file)
        if not isinstance(recorded, list) or not all(isinstance(port, int) for port in recorded):
            return ()
        return tuple(recorded)

    def record_ports(self, ports: Sequence[int]) -> None:
        write_json(self.ports_file, list(ports))


def _is_private(folder: Path) -> bool:
    """A real directory (no link) of this user, closed to everybody else."""
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
    """Replace ``path`` at once: a reader sees the old or the new, also after a crash."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """As ``write_json``. Raises StateError (full disk) or ConfigError (not writable)."""
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
    """What the file holds; None where there is none. A corrupt file is set aside, with a warning,
    so that nothing stumbles over it twice."""
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
    """Rename a file that makes no sense, and say so once."""
    aside = path.with_name(f"{path.name}.corrupt-{time.strftime('%Y%m%dT%H%M%S')}")
    with suppress(OSError):
        path.replace(aside)
        log.warning("%s is corrupt; it was set aside as %s", path, aside.name)
