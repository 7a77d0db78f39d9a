"""The log files of a farm's processes, merged by time and followed as they grow."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.cli.log_records import Record, parse_records
from launcher.config.settings import ConfigError

POLL_SECONDS = 0.2
NAMES = ("supervisord", "controller", "nginx", "nginx-error")
ON_DEMAND = ("nginx-access", "measure")
"""Printed only by name: the first has a line for each request, the second's worker has ended."""
_WORKER_LOG = re.compile(r"w\d+")


@dataclass
class LogFile:
    """Reads one growing file, which may be rotated at any time."""

    name: str
    path: Path
    position: int = 0
    inode: int = 0
    partial: bytes = field(default=b"", repr=False)
    """A line whose end has not been written yet."""
    last: float = 0.0
    """The time of its last record that has one (Unix seconds); 0 before the first."""
    written: float = 0.0
    """The file's modification time at the last read (Unix seconds)."""

    def skip_to_last(self, lines: int) -> None:
        """Start reading ``lines`` before the end."""
        try:
            data = self.path.read_bytes()
            self.inode = self.path.stat().st_ino
        except OSError:
            return
        kept = data.splitlines(keepends=True)[-lines:] if lines else []
        self.position = len(data) - sum(len(line) for line in kept)

    def new_records(self) -> list[Record]:
        """Parse what is new; a process that logs no times gets the file's modification time."""
        lines = self.new_lines()
        records = parse_records(self.name, lines, self.last, self.written)
        if records and (self.last or records[-1].time != self.written):
            self.last = records[-1].time
        return records

    def new_lines(self) -> list[str]:
        """Read the complete lines since the last call."""
        lines = []
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                self.written = status.st_mtime
                if self.inode and status.st_ino != self.inode:
                    lines = self._read_rotated()
                if status.st_ino != self.inode or status.st_size < self.position:
                    self.position, self.inode = 0, status.st_ino
                file.seek(self.position)
                lines += self._split(file.read())
                self.position = file.tell()
        except OSError:
            return lines
        return lines

    def _read_rotated(self) -> list[str]:
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
        *complete, self.partial = (self.partial + data).split(b"\n")
        return [line.decode(errors="replace") for line in complete if line]


def log_files(logs: Path, chosen: Sequence[str] = ()) -> list[LogFile]:
    """List the logs of all processes, or of the chosen ones. Raises ConfigError."""
    if not chosen:
        workers = sorted(
            (path.stem for path in logs.glob("w*.log") if _WORKER_LOG.fullmatch(path.stem)),
            key=lambda name: int(name[1:]),
        )
        return [LogFile(name, logs / f"{name}.log") for name in (*NAMES, *workers)]
    for name in chosen:
        if not (name in (*NAMES, *ON_DEMAND) or _WORKER_LOG.fullmatch(name)):
            known = ", ".join((*NAMES, *ON_DEMAND, "w1, w2, …"))
            raise ConfigError(f"unknown process: {name}; known: {known}")
    return [LogFile(name, logs / f"{name}.log") for name in chosen]


class LogTail:
    """Prints a set of logs ordered by time.

    Each line is prefixed with its process, or is one JSON object.
    """

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

    def print_new(self) -> bool:
        """Print what was written since the last call. Returns whether there was anything."""
        if not self._chosen:
            known = {file.name for file in self._files}
            self._files += [file for file in log_files(self._logs) if file.name not in known]
        new = [record for file in self._files for record in file.new_records()]
        for record in sorted(new, key=lambda record: record.time):
            self._print(record)
        return bool(new)

    def _print(self, record: Record) -> None:
        if self._as_json:
            self._write(record.to_json())
            return
        prefix = f"{record.process} | " if len(self._files) > 1 else ""
        for line in record.text:
            self._write(f"{prefix}{line}")

    def follow(self, until: Callable[[], bool] = lambda: False) -> None:
        """Print new records until ``until`` holds or an interrupt arrives."""
        while not until():
            if not self.print_new():
                time.sleep(POLL_SECONDS)
        self.print_new()
