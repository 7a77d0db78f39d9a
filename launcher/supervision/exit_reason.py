"""Why a process ended: the last line of its log."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

_WORKER_RECORD = re.compile(
    r"\d{4}-\d\d-\d\dT[\d:.]+Z (?P<level>[A-Z]+) w\d+ (?:cannot load: )?(?P<message>.*)"
)
"""A text record of a worker's log: time, level, worker, message."""
LOG_TAIL = 64 * 1024
"""Bytes read from the end of a log."""
MAX_LENGTH = 300
"""Characters of an exit reason."""


def exit_reason(log: Path) -> str:
    """Return the last line that a process logged; empty if there is none or it is an INFO record.

    For a record of our own workers, only its message.
    """
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - LOG_TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if match := _WORKER_RECORD.fullmatch(last):
        last = "" if match["level"] == "INFO" else match["message"]
    elif (record := _json_record(last)) is not None:
        last = "" if record["level"] == "INFO" else str(record["message"])
        last = last.removeprefix("cannot load: ")
    return last[:MAX_LENGTH]


def _json_record(line: str) -> dict[str, Any] | None:
    """Parse a JSON record of one of our workers; None for any other line."""
    with suppress(ValueError, RecursionError):
        record = json.loads(line) if line.startswith("{") else None
        if isinstance(record, dict) and {"time", "level", "process", "message"} <= record.keys():
            return record
    return None


def exit_reason_since(log: Path, started: float) -> str:
    """Return the exit reason of the process started at ``started`` (Unix seconds).

    Empty if the log is older, since it then belongs to an earlier process.
    """
    with suppress(OSError):
        if log.stat().st_mtime >= started:
            return exit_reason(log)
    return ""
