"""The log files of a farm's processes, read together and, if asked, as they grow."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.cli.log_records import Record, records_of
from launcher.config.settings import ConfigError

POLL = 0.2
NAMES = ("supervisord", "controller", "nginx", "nginx-error")
ON_DEMAND = ("nginx-access", "measure")
"""Shown only where they are named: one has a line a request, one is of a worker that has ended."""
_WORKER_LOG = re.compile(r"w\d+")


@dataclass
class LogFile:
    """One growing file; it may be rotated away at any time."""

    name: str
    path: Path
    position: int = 0
    inode: int = 0
    rest: bytes = field(default=b"", repr=False)
    """The beginning of a line whose end has not been written yet."""
    last: float = 0.0
    """The time of its last record that tells one (Unix seconds); 0 while there was none."""
    written: float = 0.0
    """When the file was last written, as of the last look."""

    def skip_to_last(self, lines: int) -> None:
        """Begin ``lines`` before the end."""
        try:
            data = self.path.read_bytes()
            self.inode = self.path.stat().st_ino
        except OSError:
            return
        kept = data.splitlines(keepends=True)[-lines:] if lines else []
        self.position = len(data) - sum(len(line) for line in kept)

    def new_records(self) -> list[Record]:
        """What is new, as records. Lines of a process that tells no times have that of the file."""
        lines = self.new_lines()
        records = records_of(self.name, lines, self.last, self.written)
        if records and (self.last or records[-1].time != self.written):
            self.last = records[-1].time
        return records

    def new_lines(self) -> list[str]:
        """Complete lines since the last call."""
        lines = []
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                self.written = status.st_mtime
                if self.inode and status.st_ino != self.inode:
                    lines = self._rest_of_rotated()
                if status.st_ino != self.inode or status.st_size < self.position:
                    self.position, self.inode = 0, status.st_ino
                file.seek(self.position)
                lines += self._split(file.read())
                self.position = file.tell()
        except OSError:
            return lines
        return lines

    def _rest_of_rotated(self) -> list[str]:
        old = self.path.with_name(f"{self.path.name}.1")
        try:
            if old.stat().st_ino != self.inode:
                return []
            with old.open("rb") as file:
                file.seek(self.position)
                return self._split(file.read() + b"\n")
        except OSError:
            return []

    def _split(self, data: bytes) -> list[str]:
        *complete, self.rest = (self.rest + data).split(b"\n")
        return [line.decode(errors="replace") for line in complete if line]


def log_files(logs: Path, chosen: Sequence[str] = ()) -> list[LogFile]:
    """The logs of all processes, or of one. Raises ConfigError for a name that has none."""
    if not chosen:
        workers = sorted(
            (path.stem for path in logs.glob("w*.log") if _WORKER_LOG.fullmatch(path.stem)),
            key=lambda name: int(name[1:]),
        )
        return [LogFile(name, logs / f"{name}.log") for name in (*NAMES, *workers)]
    for name in chosen:
        if not (name in (*NAMES, *ON_DEMAND) or _WORKER_LOG.fullmatch(name)):
            known = ", ".join((*NAMES, *ON_DEMAND, "w1, w2, …"))
            raise ConfigError(f"{name}: there is no such process; known: {known}")
    return [LogFile(name, logs / f"{name}.log") for name in chosen]


class Follower:
    """Prints what is new in a set of logs in the order of time, each line with the name of its
    process; or as JSON, one object a line."""

    def __init__(
        self,
        logs: Path,
        chosen: Sequence[str],
        write: Callable[[str], None],
        lines: int,
        as_json: bool = False,
    ) -> None:
        self._as_json = as_json
        self._logs = logs
        self._chosen = chosen
        self._write = write
        self._files = log_files(logs, chosen)
        for file in self._files:
            file.skip_to_last(lines)

    def show_new(self) -> bool:
        """Print what has been written since; whether there was any."""
        if not self._chosen:
            known = {file.name for file in self._files}
            self._files += [file for file in log_files(self._logs) if file.name not in known]
        new = [record for file in self._files for record in file.new_records()]
        for record in sorted(new, key=lambda record: record.time):
            self._show(record)
        return bool(new)

    def _show(self, record: Record) -> None:
        if self._as_json:
            self._write(record.to_json())
            return
        prefix = f"{record.process} | " if len(self._files) > 1 else ""
        for line in record.text:
            self._write(f"{prefix}{line}")

    def follow(self, until: Callable[[], bool] = lambda: False) -> None:
        """Print on and on, until told or interrupted."""
        while not until():
            if not self.show_new():
                time.sleep(POLL)
        self.show_new()
