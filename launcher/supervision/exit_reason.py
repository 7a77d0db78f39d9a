"""What a process wrote last, for whoever has to say why it ended."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

_OURS = re.compile(
    r"\d{4}-\d\d-\d\dT[\d:.]+Z (?P<level>[A-Z]+) w\d+ (?:cannot load: )?(?P<message>.*)"
)
"""A line of a worker's log: time, level, worker, message."""
LOG_TAIL = 64 * 1024
MAX_LENGTH = 300


def exit_reason(log: Path) -> str:
    """The last line that a process wrote; empty where there is none, or where all was well.

    Of a line of our own workers only its message.
    """
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - LOG_TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if ours := _OURS.fullmatch(last):
        last = "" if ours["level"] == "INFO" else ours["message"]
    elif (record := _json_record(last)) is not None:
        last = "" if record["level"] == "INFO" else str(record["message"])
        last = last.removeprefix("cannot load: ")
    return last[:MAX_LENGTH]


def _json_record(line: str) -> dict[str, Any] | None:
    """A record of a worker of ours that logs JSON; None for any other line."""
    with suppress(ValueError, RecursionError):
        record = json.loads(line) if line.startswith("{") else None
        if isinstance(record, dict) and {"time", "level", "process", "message"} <= record.keys():
            return record
    return None


def exit_reason_since(log: Path, started: float) -> str:
    """The last line of a process that was started then (Unix seconds), not of one before it."""
    with suppress(OSError):
        if log.stat().st_mtime >= started:
            return exit_reason(log)
    return ""
